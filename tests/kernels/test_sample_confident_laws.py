"""sample_confident: its law, its confidence order, and what it must never touch, on a step of its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_fast.kernels import dispatch, rng
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.kernels.ops.sample_confident.specs import SPECS

MASK = 99


def step(logits: torch.Tensor, ids: torch.Tensor, count: int, seed: int = 0, **options: object) -> tuple:
    arguments = {
        "mask_token_id": MASK,
        "choice_temperature": 1.0,
        "rng_state": rng.new_state(seed),
    }
    counts = torch.full((logits.shape[0],), count)
    return sample_confident(logits, ids, counts, **(arguments | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_rows_without_a_finite_largest_logit(options: dict) -> None:
    """C++ draws as the reference: the first NaN, else the first infinity, else the first code."""
    if isinstance(reason := dispatch._find("sample_confident", "cpp"), str):
        pytest.skip(reason)
    logits = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 5] = math.nan
    logits[0, 1] = -math.inf
    logits[0, 2, 7] = math.inf
    logits[0, 3, 3:] = -math.inf
    logits[0, 4] *= 1e30
    logits[0, 5, [8, 9]] = torch.tensor([math.inf, math.nan])
    ids = torch.full((1, 7), MASK)
    got, wanted = (step(logits, ids, 3, implementation=name, **options) for name in ("cpp", "reference"))
    assert got[0].tolist() == wanted[0].tolist()
    assert got[1].tolist() == wanted[1].tolist()


@given(
    unknown=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    count=st.integers(0, 9),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=50, deadline=None)
def test_known_ids_are_frozen_and_counts_exact(unknown: list[int], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, (len(unknown), 6), generator=generator)
    for b, n in enumerate(unknown):
        ids[b, torch.randperm(6, generator=generator)[:n]] = MASK
    sampled, following = step(torch.randn(len(unknown), 6, 5, generator=generator), ids, count, seed)
    known = ids != MASK
    assert torch.equal(sampled[known], ids[known])
    assert torch.equal(following[known], ids[known])
    assert not (sampled == MASK).any()
    for b, n in enumerate(unknown):
        assert int((following[b] == MASK).sum()) == (max(1, min(n - 1, count)) if n else 0)
    kept = following != MASK
    assert torch.equal(following[kept], sampled[kept])


def test_samples_follow_the_categorical_law() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    ids = torch.full((40, 500), MASK)
    sampled, _ = step(logits.expand(40, 500, 4), ids, 1)
    times = torch.bincount(sampled.flatten(), minlength=4).double()
    expected = logits.double().softmax(0) * sampled.numel()
    assert float(((times - expected) ** 2 / expected).sum()) < 16.3  # 0.1% point, 3 degrees of freedom


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.randn(4, 300, 6)
    ids = torch.full((4, 300), MASK)
    ours, _ = step(logits, ids, 1, temperature=temperature)
    theirs, _ = step(logits / temperature, ids, 1)
    assert torch.equal(ours, theirs)


def test_without_noise_the_least_probable_are_masked() -> None:
    p = torch.tensor([0.9, 0.55, 0.8, 0.6, 0.99])
    logits = torch.full((1, 5, 2), 0.0)
    logits[0, :, 0], logits[0, :, 1] = p.log(), (1 - p).log()
    greedy = {"choice_temperature": 0.0, "top_k": 1}
    sampled, following = step(logits, torch.full((1, 5), MASK), 3, **greedy)
    assert sampled.tolist() == [[0] * 5]
    # top_k = 1 renormalises every p to 1: ties, broken by position
    assert following.tolist() == [[MASK, MASK, MASK, 0, 0]]
    sampled, following = step(10 * logits, torch.full((1, 5), MASK), 2, choice_temperature=0.0)
    assert following[0, 1] == MASK, "the most even chance is the least confident"


def test_confidence_noise_follows_gumbel_choice() -> None:
    """With equal probabilities, which token is masked is uniform."""
    ids = torch.full((2000, 5), MASK)
    _, following = step(torch.zeros(2000, 5, 3), ids, 1, choice_temperature=2.0)
    times = (following == MASK).sum(0).double()
    assert float(((times - 400) ** 2 / 400).sum()) < 18.5  # 0.1% point, 4 degrees of freedom


def test_top_k_and_top_p_exclude_the_rest() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20, 200, 4)
    ids = torch.full((20, 200), MASK)
    assert set(step(logits, ids, 1, top_k=2)[0].unique().tolist()) == {0, 1}
    assert set(step(logits, ids, 1, top_p=0.65)[0].unique().tolist()) == {0, 1}
    assert set(step(logits, ids, 1, top_p=0.75)[0].unique().tolist()) == {0, 1, 2}
    assert set(step(logits, ids, 1, top_p=0.05)[0].unique().tolist()) == {0}


def test_guidance_mixes_the_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    conditional, unconditional = torch.randn(2, 3, 50, 7, generator=generator)
    ids = torch.full((3, 50), MASK)
    ours = step(conditional, ids, 10, guidance_logits_NC=unconditional, guidance_scale=1.5)
    theirs = step(2.5 * conditional - 1.5 * unconditional, ids, 10)
    assert torch.equal(ours[0], theirs[0])


def test_noise_belongs_to_the_sample() -> None:
    logits = torch.randn(6, 9, 4)
    ids = torch.full((6, 9), MASK)
    whole = step(logits, ids, 4)
    part = step(logits[2:5], ids[2:5], 4, samples_B=torch.tensor([2, 3, 4]))
    assert torch.equal(whole[0][2:5], part[0])
    assert torch.equal(whole[1][2:5], part[1])


def test_dtype_of_ids_is_kept_and_half_logits_work() -> None:
    arguments = SPECS[0].inputs(torch.bfloat16)
    arguments["ids_BL"] = arguments["ids_BL"].int()
    sampled, following = sample_confident(**arguments)
    assert sampled.dtype == following.dtype == torch.int32
