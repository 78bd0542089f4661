"""The randomness contract: the documented bits, and the laws they follow.

Every statistical test has a fixed seed, so it passes or fails for good; bounds are at p = 1e-4 or 4.5
standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import rng
from tests.kernels.suite import few
from tests.kernels.test_philox import python_block, seeds, streams

SIGMAS = 4.5
COUNT = 2**16


def state(seed: int = 0, step: int = 0) -> Tensor:
    return rng.new_state(seed, step)


# The layout, against Philox in Python integers


@few
@given(
    seed=seeds,
    step=st.integers(0, 2**40),
    stream=streams,
    rows=st.integers(0, 3),
    columns=st.integers(0, 21),
    first_row=st.integers(0, 2**31),
)
def test_words_layout(seed: int, step: int, stream: int, rows: int, columns: int, first_row: int) -> None:
    """Sample b, element e: word e % 4 of block e // 4 of counter row ``first_row + b``."""
    wanted = [
        [python_block(seed, step, stream, first_row + b, e // 4)[e % 4] for e in range(columns)]
        for b in range(rows)
    ]
    got = rng.words(state(seed, step), stream, first_row + torch.arange(rows), columns)
    assert (got.dtype, got.shape) == (torch.int64, (rows, columns))
    assert got.tolist() == wanted


def test_numbers_belong_to_the_sample() -> None:
    """A batch that starts at sample 2 draws what samples 2 and 3 draw in a batch of 5."""
    for draw in (rng.words, rng.uniform, rng.gumbel):
        assert torch.equal(draw(state(), 5, 5, 7)[2:4], draw(state(), 5, torch.tensor([2, 3]), 7))


def signed(value: int, bits: int) -> int:
    """Two's complement."""
    return value - 2**bits if value >= 2 ** (bits - 1) else value


@few
@given(
    seed=seeds,
    stream=streams,
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    p=st.floats(0, 1, exclude_max=True),
)
def test_keep_mask_layout(seed: int, stream: int, shape: tuple[int, ...], p: float) -> None:
    """Element e: half e % 8 of block e // 8, the low half of a word first; kept iff, as a signed
    integer, >= the threshold - 2**15."""
    halves = []
    for e in range(math.prod(shape)):
        word = python_block(seed, 3, stream, 0, e // 8)[e % 8 // 2]
        halves.append(word >> 16 * (e % 2) & 0xFFFF)
    got = rng.keep_mask(state(seed, 3), stream, shape, p)
    assert (got.dtype, got.shape) == (torch.bool, shape)
    bound = min(round(p * 2**16), 2**16 - 1) - 2**15
    assert got.flatten().tolist() == [signed(half, 16) >= bound for half in halves]


@few
@given(seed=seeds, stream=streams, rows=st.integers(0, 4), keys=st.integers(0, 35), p=st.floats(0, 0.999))
def test_keep_mask_attention_layout(seed: int, stream: int, rows: int, keys: int, p: float) -> None:
    """Row r, key k: byte (k + 15) % 16 of block (k + 15) // 16 of counter row r."""

    def octet(row: int, key: int) -> int:
        block = python_block(seed, 3, stream, row, (key + 15) // 16)
        byte = (key + 15) % 16
        return block[byte // 4] >> 8 * (byte % 4) & 0xFF

    got = rng.keep_mask_attention(state(seed, 3), stream, rows, keys, p)
    assert (got.dtype, got.shape) == (torch.bool, (rows, keys))
    bound = min(round(p * 2**8), 2**8 - 1) - 2**7
    assert got.tolist() == [[signed(octet(r, k), 8) >= bound for k in range(keys)] for r in range(rows)]


def test_uniform_is_exact_and_open() -> None:
    """The top 23 bits plus a half, exact in float32."""
    words = rng.words(state(), 5, 4, COUNT // 4)
    wanted = ((words // 512).double() + 0.5) / 2**23
    got = rng.uniform(state(), 5, 4, COUNT // 4)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), wanted)


def test_uniform_at_the_ends_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "words", lambda *_: torch.tensor([0, 2**32 - 1]))
    assert rng.uniform(state(), 0, 1, 2).tolist() == [2.0**-24, 1 - 2.0**-24]
    assert rng.gumbel(state(), 0, 1, 2).isfinite().all()


def test_streams_do_not_collide() -> None:
    ids = [rng.stream(kind, layer) for kind in rng.Stream for layer in range(300)]
    assert len(set(ids)) == len(ids)
    assert rng.stream(rng.Stream.ATTENTION_DROPOUT, 2) == 4 + 2 * 256


def test_new_state() -> None:
    assert rng.new_state(3, 4).tolist() == [3, 4]
    torch.manual_seed(0)
    first, second = rng.new_state(), rng.new_state()
    torch.manual_seed(0)
    assert torch.equal(rng.new_state(), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64


# The laws


def test_uniform_law() -> None:
    assert (
        scipy.stats.kstest(rng.uniform(state(1), 1, 4, COUNT // 4).flatten().numpy(), "uniform").pvalue > 1e-4
    )


def test_gumbel_law() -> None:
    assert (
        scipy.stats.kstest(
            rng.gumbel(state(2), 1, 4, COUNT // 4).flatten().double().numpy(), "gumbel_r"
        ).pvalue
        > 1e-4
    )


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_each_byte_of_the_words_is_uniform(shift: int) -> None:
    octets = (rng.words(state(3), 1, 4, COUNT // 4) >> shift & 0xFF).flatten().numpy()
    assert scipy.stats.chisquare(np.bincount(octets, minlength=256)).pvalue > 1e-4


def test_gumbel_max_draws_from_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    noise = rng.gumbel(state(4), 1, 10, 4 * 2000).view(-1, 4)
    drawn = (probabilities.log() + noise).argmax(1).bincount(minlength=4)
    assert scipy.stats.chisquare(drawn.numpy(), (probabilities * 20000).double().numpy()).pvalue > 1e-4


def activation_mask(seed: int, step: int, stream: int, p: float) -> Tensor:
    return rng.keep_mask(state(seed, step), stream, (64, 1024), p)


def attention_mask(seed: int, step: int, stream: int, p: float) -> Tensor:
    return rng.keep_mask_attention(state(seed, step), stream, 64, 1024, p)


MASKS = [(activation_mask, rng.ACTIVATION_BITS), (attention_mask, rng.ATTENTION_BITS)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("mask", "bits"), MASKS)
def test_dropout_counts(mask: Callable[..., Tensor], bits: int, p: float) -> None:
    """Counts of the rows, and of the columns, are binomial with the realised probability."""
    keep = mask(5, 1, 1, p)
    q = 1 - rng.threshold(p, bits) / 2**bits
    for counts, n in ((keep.sum(1), 1024), (keep.sum(0), 64)):
        statistic = ((counts - n * q) ** 2 / (n * q * (1 - q))).sum().item()
        assert 1e-4 < scipy.stats.chi2(len(counts)).cdf(statistic) < 1 - 1e-4
    assert abs(keep.double().mean().item() - q) < SIGMAS * math.sqrt(q * (1 - q) / keep.numel())


@pytest.mark.parametrize(
    "other",
    [(5, 1, 2), (5, 1, 1 + 256), (5, 2, 1), (6, 1, 1), (5 + 2**32, 1, 1), (-5, 1, 1)],
    ids=["stream", "layer", "step", "seed", "high word of the seed", "negative seed"],
)
@pytest.mark.parametrize(("mask", "bits"), MASKS)
def test_independence(mask: Callable[..., Tensor], bits: int, other: tuple[int, int, int]) -> None:
    pair = torch.stack([mask(5, 1, 1, 0.5), mask(*other, 0.5)]).flatten(1).double()
    assert abs(torch.corrcoef(pair)[0, 1].item()) < SIGMAS / math.sqrt(pair.shape[1])


@pytest.mark.parametrize("lag", [1, 2, 7, 8, 16, 1024])
@pytest.mark.parametrize(("mask", "bits"), MASKS)
def test_neighbours_are_independent(mask: Callable[..., Tensor], bits: int, lag: int) -> None:
    keep = mask(5, 1, 1, 0.5).flatten().double()
    pair = torch.stack([keep[lag:], keep[:-lag]])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < SIGMAS / math.sqrt(pair.shape[1])


# Dropout


@pytest.mark.parametrize(
    ("p", "bits", "wanted"), [(0.1, 16, 6554), (0.1, 8, 26), (0.5, 8, 128), (0.0, 16, 0)]
)
def test_threshold_and_scale(p: float, bits: int, wanted: int) -> None:
    assert rng.threshold(p, bits) == wanted
    assert rng.keep_scale(p, bits) == 1 / (1 - wanted / 2**bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_probability_next_to_one_keeps_a_finite_scale(bits: int) -> None:
    assert rng.threshold(math.nextafter(1.0, 0.0), bits) == 2**bits - 1
    assert rng.keep_scale(math.nextafter(1.0, 0.0), bits) == 2**bits


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_scales_what_it_keeps(p: float) -> None:
    x = torch.linspace(1, 2, 300, dtype=torch.float64).view(3, 100)
    keep = rng.keep_mask(state(6), 1, x.shape, p)
    got = rng.dropout(x, state(6), 1, p)
    assert (got[~keep] == 0).all()
    torch.testing.assert_close(got[keep], x[keep] * 65536 / (65536 - round(p * 65536)), rtol=1e-15, atol=0)
    assert 0 < keep.sum() < keep.numel()


def test_dropout_is_its_own_transpose() -> None:
    """<dropout(a), b> = <a, dropout(b)>: applied to the incoming gradient it is the backward."""
    a, b = torch.randn(2, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = (rng.dropout(a, state(7), 2, 0.3) * b).sum(), (a * rng.dropout(b, state(7), 2, 0.3)).sum()
    torch.testing.assert_close(left, right)


def test_no_dropout_is_the_identity() -> None:
    x = torch.randn(3)
    assert rng.dropout(x, None, 0, 0.0) is x
    assert rng.keep_mask(state(), 0, (50,), 0.0).all()
    assert rng.keep_mask_attention(state(), 0, 3, 50, 0.0).all()


def test_dropout_mask_follows_elements_not_memory() -> None:
    """A strided tensor drops the same elements as its contiguous copy."""
    x = torch.randn(6, 8)
    assert torch.equal(
        rng.dropout(x.t(), state(8), 1, 0.5), rng.dropout(x.t().contiguous(), state(8), 1, 0.5)
    )


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_a_state_holds_any_seed_of_64_bits(seed: int) -> None:
    assert rng.new_state(seed, 3).tolist() == [seed, 3]


def test_other_seeds_are_refused() -> None:
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=rf"seed is {seed}, wanted -2\*\*63 <= seed < 2\*\*63"):
            rng.new_state(seed)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        rng.new_state(1.5)  # type: ignore[arg-type]
