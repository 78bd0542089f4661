"""Bytes, FLOPs and floors: cases counted by hand, and what holds of every op."""

from __future__ import annotations

import pytest
import torch

from mage_fast.benchmark import cases
from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.add_norm.specs import Spec as AddNorm
from mage_fast.kernels.ops.attention.specs import Spec as Attention
from mage_fast.kernels.ops.bias_gelu.specs import Spec as BiasGelu
from mage_fast.kernels.ops.embed_kept.specs import Spec as EmbedKept
from mage_fast.kernels.ops.group_norm_silu.specs import Spec as GroupNorm
from mage_fast.kernels.ops.linear_cross_entropy.specs import Spec as LinearCrossEntropy
from mage_fast.kernels.ops.mask_plan.specs import Spec as MaskPlan
from mage_fast.kernels.ops.masked_cross_entropy.specs import Spec as CrossEntropy
from mage_fast.kernels.ops.nearest_code.specs import Spec as NearestCode
from mage_fast.kernels.ops.pad_decoder.specs import Spec as PadDecoder
from mage_fast.kernels.ops.philox.specs import Spec as Philox
from mage_fast.kernels.ops.sample_confident.specs import Spec as Sample
from mage_fast.kernels.roofline import DEVICES, Device, Work

HALF, FULL = torch.bfloat16, torch.float32
PLAN = MaskPlan("hand", 2, 7, (4, 4), (3, 3))  # 2 x (1 + 7 - 3) = 10 rows kept, 8 visible, 8 tokens masked

#: spec, dtype, direction, bytes read, bytes written, FLOPs (None: only that there are some)
COUNTED = [
    (Philox("", 3, 5), torch.int32, "fwd", 0, 15 * 16, 15 * 98),
    # 4 x (10 positions + 3 ends + 8 masked + 2 x 8 sources) + 14 bools; 2 words' blocks, 7 x 3 comparisons
    (PLAN, torch.int32, "fwd", 2 * 2 * 4, 4 * 48 + 14, 2 * (2 * 98 + 21)),
    # words used: 8 visible (2 class tokens among them) and [M]; 8 positions, 2 vectors; 13 bytes a row
    (
        *(EmbedKept("", PLAN, 20, 16, 0.0), HALF, "fwd"),
        *((9 + 8 + 2) * 32 + 130, 10 * 32 + 40 + 80, 160 * 9),
    ),
    (
        *(EmbedKept("", PLAN, 20, 16, 0.0), HALF, "bwd"),
        *(10 * 32 + (9 + 8 + 1) * 32 + 80 + 80, (20 + 8 + 2) * 32, 160 * 16),
    ),
    (AddNorm("", 5, 24, 0.0), FULL, "fwd", 2 * 480 + 2 * 96, 2 * 480 + 40, 120 * 9),
    (AddNorm("", 5, 24, 0.0), FULL, "bwd", 3 * 480 + 40 + 96, 2 * 480 + 2 * 96, 120 * 14),
    # a word block for 8 elements, a comparison and a scaling
    (AddNorm("", 5, 24), FULL, "fwd", 2 * 480 + 2 * 96, 2 * 480 + 40, 120 * 9 + 15 * 98 + 240),
    # rows x heads x features = 10 x 2 x 8 = 160 elements; lengths 4 and 6: 16 + 36 = 52 pairs
    (Attention("", (4, 6), 2, 8), HALF, "fwd", 3 * 320 + 12, 320 + 80, 4 * 52 * 2 * 8),
    (Attention("", (4, 6), 2, 8), HALF, "bwd", 5 * 320 + 80 + 12, 3 * 320, 10 * 52 * 2 * 8),
    (BiasGelu("", 5, 24, 0.0), HALF, "fwd", 240 + 48, 240, 120 * 6),
    (BiasGelu("", 5, 24, 0.0), HALF, "bwd", 480 + 48, 240 + 48, 120 * 13),
    # 3 x (1 + 2) rows read, 7 positions, 4 x (21 sources + 4 ends); 3 x 7 rows written
    (PadDecoder("", 3, 6, 4, 2, 8), HALF, "fwd", (9 + 7) * 16 + 100, 21 * 16, 168),
    (PadDecoder("", 3, 6, 4, 2, 8), HALF, "bwd", 21 * 16 + 100, (15 + 7) * 16, 336),
    (PadDecoder("", 3, 6, 4, 2, 8, mask_token=True), HALF, "bwd", 21 * 16 + 100, (15 + 7 + 1) * 16, 336),
    (CrossEntropy("", 6, 11, padding=2), HALF, "fwd", 4 * 22 + 48, 4 + 24, 4 * 11 * 5),
    (CrossEntropy("", 6, 11, padding=2), HALF, "bwd", 4 * 22 + 4 * 4 + 48 + 4, 6 * 22, 4 * 11 * 4),
    # 3 rows of 8 with a target, 5 x (8 + 1) parameters, 4 targets -> 2 float32; 2 x 3 x 5 x 8 operations
    (LinearCrossEntropy("", 4, 8, 5, padding=1), HALF, "fwd", 48 + 90 + 32, 8, 240),
    (LinearCrossEntropy("", 4, 8, 5, padding=1), HALF, "bwd", 48 + 90 + 32 + 8, 64 + 10, 240),
    (
        *(LinearCrossEntropy("", 4, 8, 5, padding=1, weight_learns=True), HALF, "bwd"),
        *(48 + 90 + 32 + 8, 64 + 10 + 80, 480),
    ),
    # the residual stream and the parameters stay float32
    (AddNorm("", 5, 24, 0.0, autocast=True), HALF, "fwd", 120 * 6 + 2 * 96, 120 * 6 + 40, 120 * 9),
    (AddNorm("", 5, 24, 0.0, autocast=True), HALF, "bwd", 120 * 10 + 96 + 40, 120 * 6 + 2 * 96, 120 * 14),
    (Sample("", 2, 6, 11, 4, guidance_scale=1.5), HALF, "fwd", 2 * 8 * 22 + 14 * 8, 2 * 96, 3212),
    # logits of 2 x 4 unknown tokens, 12 ids and 2 counts of 8 bytes; 24.5 + 12 operations a code
    (Sample("", 2, 6, 11, 4), HALF, "fwd", 8 * 22 + 14 * 8, 2 * 96, 3212),
    (GroupNorm("", 2, 6, 3, num_groups=3), HALF, "fwd", 216 + 24, 216 + 48, 108 * 12),
    (GroupNorm("", 2, 6, 3, num_groups=3), HALF, "bwd", 432 + 24 + 48, 216 + 24, 108 * 24),
    (NearestCode("", 7, 5, 6), HALF, "fwd", 12 * 12, 56, 2 * 7 * 5 * 6),
]
EVERY = [(op, spec) for op in dispatch.OPS for spec in cases.specs(op, "cuda")]


@pytest.mark.parametrize(("spec", "dtype", "direction", "read", "written", "flops"), COUNTED)
def test_hand_counted(
    spec: object, dtype: torch.dtype, direction: str, read: int, written: int, flops: int
) -> None:
    work = spec.work(dtype, direction)  # type: ignore[attr-defined]
    assert (work.read_bytes, work.written_bytes, work.flops) == (read, written, flops)


@pytest.mark.parametrize(("op", "spec"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_every_op_has_a_floor(op: str, spec: object) -> None:
    dtypes = (HALF, torch.float16, FULL) if cases.is_floating(spec) else (torch.int32,)
    for dtype in dtypes:
        for direction in ("fwd", "bwd")[: len(cases.directions(op))]:
            work = spec.work(dtype, direction)  # type: ignore[attr-defined]
            assert work.read_bytes >= 0
            assert work.written_bytes > 0
            assert work.flops > 0
            floors = [DEVICES[name].floor_seconds(work, dtype) for name in ("a100", "h100", "h200")]
            assert floors == sorted(floors, reverse=True), "each is the faster one"
            assert floors[-1] > 0


@pytest.mark.parametrize(("op", "spec"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_float32_moves_up_to_twice_as_much(op: str, spec: object) -> None:
    if not cases.is_floating(spec):
        pytest.skip("no floating input")
    for direction in ("fwd", "bwd")[: len(cases.directions(op))]:
        half, full = (spec.work(dtype, direction) for dtype in (HALF, FULL))  # type: ignore[attr-defined]
        assert spec.work(torch.float16, direction) == half  # type: ignore[attr-defined]
        # indices and statistics stay as they are, under autocast the residual stream too
        assert 1.2 * half.bytes < full.bytes <= 2 * half.bytes
        assert full.flops == half.flops


def test_a_tensor_core_runs_matrix_products_only() -> None:
    h100 = DEVICES["h100"]
    assert h100.peak(HALF, matrix=True) == 989e12
    assert h100.peak(HALF, matrix=False) == 67e12
    assert h100.peak(FULL, matrix=True) == 495e12 / 3  # tf32x3
    assert Device("", 1.0, {"float32": 5.0}).peak(FULL, matrix=True) == 5.0


def test_floor_is_the_larger_bound() -> None:
    device = Device("", bandwidth_bytes_s=10.0, peak_flops={"float32": 100.0})
    assert device.floor_seconds(Work(15, 5, 100), FULL) == 2.0
    assert device.bound(Work(15, 5, 100), FULL) == "memory"
    assert device.floor_seconds(Work(15, 5, 1000), FULL) == 10.0
    assert device.bound(Work(15, 5, 1000), FULL) == "compute"
    both = Work(1, 2, 3) + Work(10, 20, 30)
    assert (both.read_bytes, both.written_bytes, both.flops, both.bytes) == (11, 22, 33, 33)
    assert both.intensity == 1.0
