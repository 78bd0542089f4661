"""Operations and bytes of whole steps on paper, against torch's own counter and hand counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mage_fast import counts, reference
from mage_fast.benchmark import eager, paper, records
from mage_fast.cli import main
from mage_fast.config import MAGEConfig
from mage_fast.kernels.roofline import DEVICES, Device, Work, data_sheet

TINY, VIT_B, VIT_L = MAGEConfig.tiny(), MAGEConfig.vit_b(), MAGEConfig.vit_l()
H100 = DEVICES["h100"]
#: One byte or operation a second.
UNIT = Device("unit", 1.0, {"float32": 1.0, "bfloat16": 1.0, "tf32": 1.0})


@pytest.mark.parametrize("changes", [{}, {"encoder_width": 48, "mlp_ratio": 2.5, "decoder_depth": 3}])
def test_the_release_s_training_step_is_what_torch_counts(changes: dict[str, Any]) -> None:
    config = TINY.replace(tokenizer=None, mask_ratio_std=0.0, **changes)
    model = reference.MAGE.from_config(config).train()
    ids = torch.zeros(3, config.num_tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).loss.backward()
    assert counter.get_total_flops() == 3 * counts.training(config, "release")


def test_the_release_s_decoding_is_what_torch_counts() -> None:
    model = reference.MAGE.from_config(TINY).eval()
    assert TINY.tokenizer is not None
    with FlopCounterMode(display=False) as counter:
        reference.generate(model, 2, steps=3)
    wanted = counts.decoding(TINY, 3, "release") + counts.tokenizer(TINY.tokenizer, "decode")
    assert counter.get_total_flops() == 2 * wanted


def test_the_published_sizes() -> None:
    """161 GFLOP an image of a ViT-B step, 129 to encode, 187 to decode."""
    assert VIT_B.tokenizer is not None
    assert round(counts.training(VIT_B) / 1e9) == 161
    assert round(counts.tokenizer(VIT_B.tokenizer, "encode") / 1e9) == 129
    assert round(counts.tokenizer(VIT_B.tokenizer, "decode") / 1e9) == 187
    for config in (VIT_B, VIT_L):
        assert counts.training(config) < counts.training(config, "release")
        assert counts.decoding(config, 20) < counts.decoding(config, 20, "release")
    # the head at masked rows and 1024 columns in place of 257 rows and 2025: the only difference
    rows, d = (257, 178), 768
    heads = [2 * n * d * (3 * d + 2 * classes) for n, classes in zip(rows, (2025, 1024), strict=True)]
    assert counts.training(VIT_B, "release") - counts.training(VIT_B) == heads[0] - heads[1]


def test_parameters() -> None:
    model = reference.MAGE.from_config(TINY)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.parameters(TINY) == learned
    assert counts.optimizer_bytes(TINY) == (12 * learned, 12 * learned)


# Eager PyTorch, kernel by kernel


def test_kernels_counted_by_hand() -> None:
    def prepare() -> Any:
        a, b = torch.empty(3, 5), torch.empty(5, 7)

        def run() -> None:
            c = a @ b  # reads 15 + 35, writes 21 floats; 210 operations
            d = F.relu(c.t().view(7, 3)[1:])  # views are free; reads and writes 18
            d.add_(1.0)  # in place: reads and writes 18

        return run

    with eager.FakeTensorMode():
        run = prepare()
        with eager.Kernels() as kernels:
            run()
    assert [(k.name, k.work) for k in kernels.found] == [
        ("aten.mm", Work(200, 84, 210, matrix=True)),
        ("aten.relu", Work(72, 72, 0)),
        ("aten.add_", Work(72, 72, 0)),
    ]
    assert eager.cost(UNIT, prepare, half=False) == eager.Cost(284.0 + 144 + 144, 3)
    assert eager.cost(UNIT, prepare, half=False, free=("aten.relu",)) == eager.Cost(284.0 + 144, 2)


def test_products_counted_are_those_of_the_formula() -> None:
    """With memory for nothing, the release's bound is its operations."""
    fast_memory = Device("", 1e30, {"float32": 1.0, "bfloat16": 1.0, "tf32": 1.0})
    batch, config = 2, TINY
    assert config.tokenizer is not None
    embed = counts.linear(config.num_tokens + 1 - 8, 32, 32)  # between encoder and decoder: left out
    bound = eager.training(fast_memory, config, batch, online=False).seconds
    assert bound == pytest.approx(batch * (counts.training(config, "release") - 3 * embed))
    with_images = eager.training(fast_memory, config, batch, online=True).seconds
    assert with_images - bound == pytest.approx(batch * counts.tokenizer(config.tokenizer, "encode"))


def test_fused_normalisation_saves_bytes() -> None:
    fused = eager.tokenizer(H100, TINY, 4, "decode", ours=True)
    plain = eager.tokenizer(H100, TINY, 4, "decode")
    assert fused.seconds < plain.seconds
    silus = sum(
        isinstance(m, nn.GroupNorm) for m in reference.VQGAN.from_config(TINY.tokenizer).decoder.modules()
    )
    assert plain.kernels - fused.kernels == silus
    assert torch.get_default_dtype() is torch.float32


# Floors


def test_a_linear_layer_counted_by_hand() -> None:
    forward, to_input, to_weight = paper.product(3, 5, 7, learns=True)
    assert forward == Work(2 * (15 + 35), 2 * 21, 210, matrix=True)
    assert to_input == Work(2 * (35 + 21), 2 * 15, 210, matrix=True)
    assert to_weight == Work(2 * (15 + 21), 2 * 35, 210, matrix=True)
    assert paper.product(3, 5, 7, learns=False) == [forward]


@pytest.mark.parametrize("config", [TINY, VIT_B], ids=["tiny", "vit_b"])
def test_our_kernels_execute_what_is_needed(config: MAGEConfig) -> None:
    """Attention's scores are computed again backward; nothing else is counted twice."""
    batch, kept = 2, config.num_tokens // 2 + 1
    products = sum(work.flops for work in paper._step(config, batch) if work.matrix)
    again = sum(
        2.0 * getattr(config, f"{part}_depth") * rows**2 * getattr(config, f"{part}_width")
        for part, rows in (("encoder", kept), ("decoder", config.num_tokens + 1))
    )
    assert products == pytest.approx(batch * (counts.training(config) + again), rel=1e-12)
    decoding = sum(work.flops for work in paper._decoding_step(config, batch) if work.matrix)
    positions = config.num_tokens + 1
    assert decoding == batch * counts.forward(config, positions, config.num_tokens, config.codebook_size)


@pytest.mark.parametrize("suite", ["train", "generate", "tokenize"])
def test_bounds_are_in_order(suite: str) -> None:
    for floor in paper.floors(suite, H100, ("vit_b",)):
        assert 0 < floor.ideal < floor.kernels < floor.release
        assert 0 < floor.mfu_percent(H100) < 100
        goals = {"train": 2, "generate": 2 if floor.batch == 1 else 1, "tokenize": 0}
        assert len(floor.verdicts(H100)) == goals[suite]


def test_a_goal_is_possible_or_not() -> None:
    floor = paper.Floor("train", "x", 10, 989e12 * 0.06, 0.0, 0.5, 1.0, 4.9)
    assert floor.verdicts(H100) == [
        "train/x: 5 times the release: not by these bounds (4.9)",
        "train/x: 50 % MFU: possible (60)",
    ]
    one = paper.Floor("generate", "y", 1, 1.0, 1.0, 0.01, 0.024, 0.12)
    assert one.verdicts(H100) == [
        "generate/y: 10 times the release: not by these bounds (5)",
        "generate/y: 25 ms for one image: possible (24)",
    ]


def test_the_roofline_of_whole_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "paper.json"
    options = ("--roofline", "h100", "--model", "vit_b", "--batch", "2", "--out", str(out))
    assert main(["bench", "--suite", "train", *options]) == 0
    printed = capsys.readouterr().out
    assert "train/vit_b/cached" in printed
    assert "50 % MFU" in printed
    found = json.loads(out.read_text())
    assert all(tuple(r) == records.FIELDS for r in found)
    assert {(r["device"], r["implementation"], r["median_ms"]) for r in found} == {
        ("H100 SXM", "data-sheet", None)
    }
    assert all(r["floor_ms"] > 0 for r in found)


def test_data_sheets_by_a_device_s_name() -> None:
    assert data_sheet("NVIDIA H100 80GB HBM3") is H100
    assert data_sheet("NVIDIA H200") is DEVICES["h200"]
    assert data_sheet("AMD EPYC, 2 threads") is None
