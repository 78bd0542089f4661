"""Shapes of ``mask_plan`` in training, shared by tests and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.reference import plan_tensors
from mage_fast.kernels.roofline import PHILOX_BLOCK, Direction, Work


@dataclass(frozen=True)
class Spec:
    """Samples of ``length`` tokens; counts step from sample to sample between two bounds."""

    name: str
    batch: int
    length: int
    masked: tuple[int, int]
    dropped: tuple[int, int]

    def inputs(self, dtype: torch.dtype = torch.int32, device: str = "cpu") -> dict:
        """Integer op: ``dtype`` is that of the counts."""
        masked = torch.linspace(*self.masked, self.batch).long()
        dropped = torch.minimum(torch.linspace(*self.dropped, self.batch).long(), masked)
        return {
            "rng_state": rng.new_state(0, device=device),
            "num_masked_B": masked.to(device, dtype),
            "num_dropped_B": dropped.to(device, dtype),
            "length": self.length,
            "total_masked": int(masked.sum()),
            "total_kept": (self.length + 1) * self.batch - int(dropped.sum()),
            "total_visible": (self.length + 1) * self.batch - int(masked.sum()),
            "max_seqlen": self.length + 1 - int(dropped.min()),
            "stream": rng.stream(rng.Stream.MASK_PLAN),
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        assert direction == "fwd"
        plan = self.inputs(dtype)
        # reads: two counts a sample; writes int32: T positions, V visible rows, N masked, B S sources,
        # B + 1 ends twice; B L bools
        read = 2 * self.batch * dtype.itemsize
        integers = plan["total_kept"] + plan["total_visible"] + plan["total_masked"]
        integers += self.batch * (self.length + 1) + 2 * (self.batch + 1)
        # a random word a token and its rank: L log2 L comparisons
        ranks = self.length * math.ceil(math.log2(max(self.length, 2)))
        flops = self.batch * (PHILOX_BLOCK * -(-self.length // 4) + ranks)
        return Work(read, 4 * integers + self.batch * self.length, flops)


def baseline(
    rng_state: Tensor,
    num_masked_B: Tensor,
    num_dropped_B: Tensor,
    length: int,
    *,
    total_masked: int,
    total_kept: int,
    total_visible: int,
    max_seqlen: int,
    stream: int,
) -> tuple[Tensor, ...]:
    """The eager chain, on torch's own random numbers."""
    rank_BL = torch.rand(num_masked_B.shape[0], length, device=rng_state.device).argsort(1).argsort(1)
    is_masked_BL, is_dropped_BL = rank_BL < num_masked_B[:, None], rank_BL < num_dropped_B[:, None]
    return plan_tensors(is_masked_BL, is_dropped_BL, total_masked, total_kept, total_visible)


def invariant(inputs: dict[str, Any], outputs: list[Tensor]) -> list[Tensor]:
    """What right plans have in common whatever numbers they draw: the counts."""
    _positions_T, cu_seqlens, masked_index_N, source_BS, is_masked_BL, _visible_V, visible_ends = outputs
    visible_B = (source_BS >= 0).sum(1)
    return [cu_seqlens, visible_ends, (masked_index_N >= 0).sum(), visible_B, is_masked_BL.sum(1)]


SPECS = (
    Spec("tiny", 3, 7, (4, 7), (3, 4)),
    Spec("tiny_nothing_masked", 2, 5, (0, 0), (0, 0)),
    Spec("small_paper", 2, 256, (178, 178), (128, 128)),
    Spec("small_odd_length", 3, 37, (0, 37), (0, 37)),
    Spec("small_long", 1, 4096, (2867, 2867), (2048, 2048)),
    Spec("paper_batch4", 4, 256, (178, 178), (128, 128)),
    Spec("unmasked_batch4", 4, 256, (128, 256), (128, 256)),
    Spec("paper_batch128", 128, 256, (178, 178), (128, 128)),
)
GPU_SPECS = (
    Spec("paper_batch1024", 1024, 256, (128, 256), (128, 128)),
    Spec("unmasked_batch128", 128, 256, (128, 256), (128, 256)),
    Spec("length4096_batch128", 128, 4096, (2048, 4096), (2048, 2048)),
)
