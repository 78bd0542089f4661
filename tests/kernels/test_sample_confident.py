"""sample_confident: its law, its confidence order, and what it must never touch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.kernels.ops.sample_confident.specs import SPECS, Spec
from mage_fast.kernels.rng import Stream
from tests.kernels.suite import ExactOpSuite, Target

MASK = 99


def oracle(
    logits_BLC: Tensor,
    ids_BL: Tensor,
    num_masked_B: Tensor,
    *,
    mask_token_id: int,
    choice_temperature: float,
    rng_state: Tensor,
    temperature: float = 1.0,
    guidance_logits_BLC: Tensor | None = None,
    guidance_scale: float = 0.0,
    stream: int = 0,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor]:
    """A loop over samples, and over their unknown tokens in the order of confidence."""
    wide = torch.promote_types(logits_BLC.dtype, torch.float32)
    _, length, codes = logits_BLC.shape
    sampled, following = ids_BL.clone(), ids_BL.clone()
    for b, logits_LC in enumerate(logits_BLC.to(wide)):
        if guidance_logits_BLC is not None:
            logits_LC = logits_LC + guidance_scale * (logits_LC - guidance_logits_BLC[b].to(wide))
        logits_LC = logits_LC / temperature
        row = first_sample + b
        id_noise = rng.gumbel(rng_state, rng.stream(Stream.SAMPLE_ID, stream), 1, length * codes, row)
        noise = rng.gumbel(rng_state, rng.stream(Stream.SAMPLE_CONFIDENCE, stream), 1, length, row)[0]
        drawn_L = (logits_LC + id_noise.view(length, codes)).argmax(1)
        log_p_L = logits_LC.log_softmax(1)[torch.arange(length), drawn_L]
        confidence = (log_p_L + choice_temperature * noise).tolist()
        unknown = [token for token in range(length) if ids_BL[b, token] == mask_token_id]
        for token in unknown:
            sampled[b, token] = following[b, token] = drawn_L[token]
        unknown.sort(key=lambda token: (confidence[token], token))
        for token in unknown[: max(1, min(len(unknown) - 1, int(num_masked_B[b])))]:
            following[b, token] = mask_token_id
    return sampled, following


class TestSampleConfident(ExactOpSuite):
    op = "sample_confident"
    oracle = staticmethod(oracle)
    bad = {  # noqa: RUF012
        "top_k": ({"top_k": 12}, "top_k is 12, wanted 0 <= top_k <= 11"),
        "top_p": ({"top_p": 0.0}, r"top_p is 0\.0, wanted 0 < top_p <= 1"),
        "temperature": ({"temperature": 0.0}, r"temperature is 0\.0, wanted more than 0"),
        "choice temperature": ({"choice_temperature": math.nan}, "choice_temperature is nan, wanted 0 or"),
        "id": ({"ids_BL": torch.full((2, 6), 12)}, "ids holds 12, wanted 0 <= ids < 11"),
        "ids' shape": ({"ids_BL": torch.zeros(2, 5).long()}, r"ids has shape \(2, 5\), wanted \(2, 6\)"),
        "ids' dtype": ({"ids_BL": torch.zeros(2, 6)}, "ids is float32, wanted int64 or int32"),
        "counts": ({"num_masked_B": torch.zeros(3).long()}, r"num_masked has shape \(3,\), wanted \(2,\)"),
        "state": ({"rng_state": torch.zeros(2)}, "rng_state is float32, wanted int64"),
        "guidance": (
            {"guidance_logits_BLC": torch.zeros(2, 6, 10)},
            r"guidance_logits has shape \(2, 6, 10\), wanted \(2, 6, 11\)",
        ),
        "device": ({"ids_BL": torch.zeros(2, 6, device="meta").long()}, "ids is on meta, wanted cpu"),
    }

    def specs(self) -> tuple:
        return tuple(spec for spec in SPECS if spec.batch < 64)  # a loop over 16 million codes is slow

    def test_options(self, target: Target) -> None:
        inputs = Spec("options", 3, 5, 7, 4).inputs(target.widest, target.device)
        inputs |= {"temperature": 0.7, "stream": 3, "first_sample": 11, "guidance_scale": 1.5}
        inputs["guidance_logits_BLC"] = inputs["logits_BLC"].flip(0)
        self.check(self.function(target), inputs)

    def test_sizes_of_one_and_none(self, target: Target) -> None:
        for batch, length, codes in ((0, 4, 3), (1, 1, 1), (2, 1, 5), (2, 6, 1)):
            inputs = Spec("small", batch, length, codes, 1).inputs(torch.float32, target.device)
            self.check(self.function(target), inputs)


def step(logits: torch.Tensor, ids: torch.Tensor, count: int, seed: int = 0, **options: object) -> tuple:
    arguments = {
        "mask_token_id": MASK,
        "choice_temperature": 1.0,
        "rng_state": rng.new_state(seed),
    }
    counts = torch.full((logits.shape[0],), count)
    return sample_confident(logits, ids, counts, **(arguments | options))  # type: ignore[arg-type]


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
    ours = step(conditional, ids, 10, guidance_logits_BLC=unconditional, guidance_scale=1.5)
    theirs = step(2.5 * conditional - 1.5 * unconditional, ids, 10)
    assert torch.equal(ours[0], theirs[0])


def test_noise_belongs_to_the_sample() -> None:
    logits = torch.randn(6, 9, 4)
    ids = torch.full((6, 9), MASK)
    whole = step(logits, ids, 4)
    part = step(logits[2:5], ids[2:5], 4, first_sample=2)
    assert torch.equal(whole[0][2:5], part[0])
    assert torch.equal(whole[1][2:5], part[1])


def test_dtype_of_ids_is_kept_and_half_logits_work() -> None:
    arguments = SPECS[0].inputs(torch.bfloat16)
    arguments["ids_BL"] = arguments["ids_BL"].int()
    sampled, following = sample_confident(**arguments)
    assert sampled.dtype == following.dtype == torch.int32
