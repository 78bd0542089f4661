"""Mask ratios and counts: the truncated normal law, exact counts, what is dropped."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from mage_fast.masking import check_mask_ratios, draw_mask_ratios, draw_plan, token_counts

few = settings(max_examples=40, deadline=None, derandomize=True)


def law(mode: float, std: float, low: float, high: float) -> Any:
    return scipy.stats.truncnorm((low - mode) / std, (high - mode) / std, mode, std)


def tiny(**changes: Any) -> MAGEConfig:
    return MAGEConfig.tiny(tokenizer=None, **changes)


def ratios(
    mode: float, std: float, low: float, high: float, count: int = 20_000, **changes: Any
) -> np.ndarray:
    names = ("mask_ratio_mode", "mask_ratio_std", "mask_ratio_min", "mask_ratio_max")
    values: dict[str, Any] = dict(zip(names, (mode, std, low, high), strict=True))
    config = tiny(drop_ratio=0.0, **{"ratio_per": "sample"} | values | changes)
    return draw_mask_ratios(config, count, rng.new_state(0)).numpy()


@pytest.mark.parametrize(
    "parameters",
    [
        (0.55, 0.25, 0.5, 1.0),
        (0.55, 0.25, 0.0, 1.0),
        (0.9, 0.1, 0.5, 0.8),
        (0.55, 0.05, 0.95, 1.0),  # eight deviations over the mode: 1 - cdf is not representable near 1
        (0.55, 0.05, 0.0, 0.1),
    ],
    ids=str,
)
def test_law(parameters: tuple[float, float, float, float]) -> None:
    drawn = ratios(*parameters)
    assert scipy.stats.kstest(drawn, law(*parameters).cdf).pvalue > 1e-3
    assert parameters[2] <= drawn.min()
    assert drawn.max() <= parameters[3]
    assert len(np.unique(drawn)) > 0.99 * len(drawn)


def test_published_mean() -> None:
    config = MAGEConfig()
    drawn = draw_mask_ratios(config.replace(ratio_per="sample"), 20_000, rng.new_state(1))
    assert law(0.55, 0.25, 0.5, 1.0).mean() == pytest.approx(0.694, abs=5e-4)
    assert drawn.mean().item() == pytest.approx(0.694, abs=4 * 0.126 / math.sqrt(20_000))


def test_no_deviation_is_the_mode() -> None:
    assert (ratios(0.75, 0.0, 0.5, 1.0, count=5) == 0.75).all()


def test_one_ratio_a_batch_or_a_sample() -> None:
    states = [rng.new_state(3, step) for step in range(300)]
    batches = torch.stack([draw_mask_ratios(tiny(), 4, state) for state in states])
    assert (batches == batches[:, :1]).all()
    assert scipy.stats.kstest(batches[:, 0].numpy(), law(0.55, 0.25, 0.5, 1.0).cdf).pvalue > 1e-3
    samples = torch.stack([draw_mask_ratios(tiny(ratio_per="sample"), 4, state) for state in states])
    assert len(samples.unique()) == samples.numel()
    assert torch.equal(samples[:, :1], batches[:, :1]), "sample 0 draws the batch's ratio"
    assert torch.equal(draw_mask_ratios(tiny(ratio_per="sample"), 2, states[0]), samples[0, :2]), (
        "a sample's ratio does not depend on its batch"
    )


@few
@given(
    mode=st.floats(0, 1),
    std=st.floats(1e-3, 3),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**62),
)
def test_ratios_stay_inside_their_bounds(
    mode: float, std: float, bounds: tuple[float, float], seed: int
) -> None:
    low, high = sorted(bounds)
    config = tiny(
        **{"mask_ratio_mode": mode, "mask_ratio_std": std, "mask_ratio_min": low, "mask_ratio_max": high},
        **{"drop_ratio": 0.0, "ratio_per": "sample"},
    )
    drawn = draw_mask_ratios(config, 5, rng.new_state(seed))
    assert drawn.dtype == torch.float64
    assert ((drawn >= low) & (drawn <= high)).all()


# Counts


@few
@given(numerator=st.integers(0, 1000), denominator=st.integers(1, 1000), length=st.integers(1, 4096))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_are_exact(dtype: torch.dtype, numerator: int, denominator: int, length: int) -> None:
    """ceil(ratio * L) of the fraction that is meant, not of its neighbour in binary."""
    ratio = Fraction(min(numerator, denominator), denominator)
    got = token_counts(torch.tensor([float(ratio)], dtype=dtype), length)
    assert got.tolist() == [math.ceil(ratio * length)]


@pytest.mark.parametrize(
    ("ratio", "length", "wanted"),
    [(0.7, 10, 7), (0.55, 100, 55), (0.6, 10, 6), (0.5, 9, 5), (1.0, 256, 256), (0.0, 256, 0), (1e-3, 9, 1)],
)
def test_traps_of_floating_point(ratio: float, length: int, wanted: int) -> None:
    for dtype in (torch.float64, torch.float32):
        assert token_counts(torch.tensor([ratio], dtype=dtype), length).tolist() == [wanted]


@few
@given(
    drawn=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    drop=st.sampled_from([0.0, 0.3, 0.5]),
    mode=st.sampled_from(["paper", "unmasked"]),
    grid=st.integers(1, 5),
)
def test_plan_masks_and_drops_what_the_ratios_say(
    drawn: list[float], drop: float, mode: Any, grid: int
) -> None:
    config = tiny(grid_size=grid, drop_ratio=drop, encoder_tokens=mode)
    length, given = config.num_tokens, torch.tensor(drawn, dtype=torch.float64)
    plan = draw_plan(config, given, rng.new_state(0))
    masked = token_counts(given, length)
    dropped = masked if mode == "unmasked" else masked.clamp(max=math.ceil(Fraction(str(drop)) * length))
    assert plan.is_masked_BL.sum(1).tolist() == masked.tolist()
    assert plan.cu_seqlens.diff().tolist() == (length + 1 - dropped).tolist()
    assert plan.max_seqlen == int((length + 1 - dropped).max())
    assert len(plan.positions_T) == int(plan.cu_seqlens[-1])
    kept = torch.zeros(len(drawn), length + 1, dtype=torch.bool)
    kept.view(-1)[plan.positions_T.long()] = True
    assert kept[:, 0].all()
    assert (kept[:, 1:] | plan.is_masked_BL).all(), "only masked tokens are dropped"
    if mode == "unmasked":
        assert torch.equal(kept[:, 1:], ~plan.is_masked_BL)


def test_published_lengths() -> None:
    config = MAGEConfig()
    for ratio in (0.5, 0.694, 1.0):
        plan = draw_plan(config, torch.full((2,), ratio), rng.new_state(0))
        assert plan.cu_seqlens.tolist() == [0, 129, 258]
        assert plan.is_masked_BL.sum(1).tolist() == [math.ceil(ratio * 256)] * 2


def test_a_ratio_under_the_drop_ratio_drops_what_it_masks() -> None:
    plan = draw_plan(tiny(), torch.tensor([0.25, 0.75]), rng.new_state(0))
    assert plan.cu_seqlens.diff().tolist() == [13, 9]


@pytest.mark.parametrize("good", [[0.0, 1.0], [0.5, 0.5]])
def test_good_ratios(good: list[float]) -> None:
    check_mask_ratios(torch.tensor(good), 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0.5], r"mask_ratios has shape \(1,\) on cpu, wanted \(2,\) on the CPU"),
        ([0.5, 1.5], r"mask_ratios holds 1.5, wanted ratios in \[0, 1\]"),
        ([0.5, -1e-3], r"mask_ratios holds -0.001, wanted ratios in \[0, 1\]"),
        ([math.nan, 0.5], r"mask_ratios holds nan, wanted ratios in \[0, 1\]"),
    ],
)
def test_bad_ratios_are_named(wrong: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mask_ratios(torch.tensor(wrong), 2)


def test_ratios_are_float32_at_least() -> None:
    with pytest.raises(ValueError, match="MAGE: mask_ratios is int64, wanted float64 or float32"):
        check_mask_ratios(torch.tensor([1, 0]), 2)
