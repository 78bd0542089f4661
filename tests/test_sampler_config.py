"""Orders, the constant schedule and the final temperature: their numbers by hand, and what decoding makes of
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc
from torch import Tensor

from mage_fast import MAGE, SamplerConfig
from mage_fast.decoding import Decoding
from mage_fast.kernels import rng
from mage_fast.sampler_config import halton_order, last_in_order, masked_counts
from tests.sampler_stub import Stub
from tests.test_decoding import build, partly_known

few = settings(max_examples=12, deadline=None, derandomize=True)

# The constant schedule


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.integers(1, 30), unknown=st.lists(st.integers(0, 70), min_size=1, max_size=4))
def test_a_constant_number_is_decided_at_each_step(steps: int, unknown: list[int]) -> None:
    counts = masked_counts("constant", steps, torch.tensor(unknown))
    assert counts.shape == (steps, len(unknown))
    for b, start in enumerate(unknown):
        each = math.ceil(start / steps)
        for t in range(steps):
            assert counts[t, b] == (max(1, start - (t + 1) * each) if start else 0)


def test_constant_and_linear_differ_where_steps_do_not_divide() -> None:
    whole = torch.tensor([36])
    constant, linear = (masked_counts(name, 8, whole)[:, 0].tolist() for name in ("constant", "linear"))
    assert constant == [31, 26, 21, 16, 11, 6, 1, 1]
    assert linear == [31, 27, 22, 18, 13, 9, 4, 1]
    assert torch.equal(masked_counts("constant", 9, whole), masked_counts("linear", 9, whole))


# Temperatures


@given(
    steps=st.integers(2, 60), first=st.floats(0.01, 9), final=st.none() | st.floats(0.01, 9), data=st.data()
)
def test_the_temperatures_of_a_step(
    steps: int, first: float, final: float | None, data: st.DataObject
) -> None:
    t = data.draw(st.integers(0, steps - 1))
    config = SamplerConfig(steps=steps, temperature=first, final_temperature=final, choice_temperature=3.0)
    wanted = first if final is None else first + (final - first) * t / (steps - 1)
    assert config.temperature_at(t) == pytest.approx(wanted, rel=1e-12)
    assert config.temperature_at(0) == first
    assert config.temperature_at(steps - 1) == (first if final is None else final)
    assert config.choice_temperature_at(t) == pytest.approx(3.0 * (steps - 1 - t) / steps, abs=1e-12)
    assert config.choice_temperature_at(steps - 1) == 0.0


def test_an_only_step_has_the_final_temperature() -> None:
    assert SamplerConfig(steps=1, final_temperature=0.25).temperature_at(0) == 0.25


def test_each_step_samples_at_its_temperature() -> None:
    """Gumbel-max by hand: the ids that a step draws for the tokens it is given."""
    torch.manual_seed(0)
    stub = Stub(torch.randn(16, 5, dtype=torch.float64))
    config = SamplerConfig(steps=3, temperature=4.0, final_temperature=0.1)
    decided = stub.decode(stub.unknown(2), config, seed=8)
    for t, temperature in enumerate((4.0, 2.05, 0.1)):
        before = stub.calls[t][0].expand(2, -1)  # the first step is the same for both
        noise = rng.gumbel(rng.new_state(8, t), rng.stream(rng.Stream.SAMPLE_ID), 2, 16 * 5).view(2, 16, 5)
        drawn = (stub.logits_LC / temperature + noise).argmax(2)
        unknown = before == stub.config.mask_token_id
        assert torch.equal(decided[t][unknown], drawn[unknown])


# The Halton order


def scipy_order(grid_size: int) -> list[int]:
    """Cells in the order in which scipy's Halton points first fall in them."""
    points = qmc.Halton(2, scramble=False).random(4 * (3 * grid_size) ** 2)
    rows, columns = (points * grid_size + 1e-9).astype(int).T  # thirds are not exact in float64
    return list(dict.fromkeys((rows * grid_size + columns).tolist()))


@pytest.mark.parametrize("grid_size", [1, 2, 3, 6, 7, 14, 16, 27, 32])
def test_the_order_is_that_of_scipy_s_points(grid_size: int) -> None:
    order = halton_order(grid_size).tolist()
    assert sorted(order) == list(range(grid_size**2)), "every token once"
    assert order == scipy_order(grid_size)


def test_early_tokens_are_spread_evenly() -> None:
    """Of 6 x 6 tokens the first six lie one in each of 2 x 3 parts of the grid."""
    assert len({(i // 6 // 3, i % 6 // 2) for i in halton_order(6)[:6].tolist()}) == 6


@few
@given(data=st.data(), batch=st.integers(1, 4))
def test_places_count_unknown_tokens_from_the_last(data: st.DataObject, batch: int) -> None:
    order = torch.tensor(data.draw(st.permutations(range(9))))
    unknown = torch.tensor(data.draw(st.lists(st.booleans(), min_size=9 * batch, max_size=9 * batch)))
    places = last_in_order(unknown.view(batch, 9), order)
    for b in range(batch):
        left = [i for i in order.tolist() if unknown.view(batch, 9)[b, i]]
        for i in range(9):
            assert places[b, i] == (len(left) - left.index(i) if i in left else 10)


@torch.no_grad()
def by_hand(
    model: MAGE, ids: Tensor, config: SamplerConfig, labels: Tensor | None, seed: int
) -> Iterator[Tensor]:
    """Every row at every step, Gumbel-max with the sampler's noise, tokens taken one by one in the order."""
    mask_token_id, order = model.config.mask_token_id, scipy_order(model.config.grid_size)
    batch, length, codes = len(ids), model.config.num_tokens, model.config.codebook_size
    unknown_B = (ids == mask_token_id).sum(1)
    counts, ids = masked_counts(config.schedule, config.steps, unknown_B), ids.clone()
    classes, none = model.class_ids(labels, batch), model.class_ids(None, batch)
    for t in range(config.steps):
        is_masked = ids == mask_token_id
        logits = model.logits(ids, is_masked, classes)
        if config.guidance_scale:
            plain = model.logits(ids, is_masked, none)
            logits = logits + config.guidance_at(t) * (logits - plain)
        logits = logits / config.temperature_at(t)
        if config.top_k:
            least = logits.sort(2, descending=True).values[..., config.top_k - 1 : config.top_k]
            logits = logits.masked_fill(logits < least, -torch.inf)
        noise = rng.gumbel(rng.new_state(seed, t), rng.stream(rng.Stream.SAMPLE_ID), batch, length * codes)
        drawn = (logits + noise.view(batch, length, codes)).argmax(2)
        sampled = torch.where(is_masked, drawn, ids)
        for b in range(batch):
            waiting = [i for i in order if is_masked[b, i]]
            for i in waiting[: len(waiting) - int(counts[t, b])]:
                ids[b, i] = sampled[b, i]
        yield sampled


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@few
@given(
    unknown=st.lists(st.integers(0, 16), min_size=1, max_size=4),
    labels=st.booleans(),
    steps=st.sampled_from([1, 3, 5, 20]),
    options=st.sampled_from(
        [{}, {"schedule": "constant", "top_k": 9}, {"final_temperature": 0.3, "guidance_scale": 1.5}]
    ),
    seed=st.integers(0, 2**60),
)
def test_tokens_are_decided_in_the_order(
    encoder_tokens: str, unknown: list[int], labels: bool, steps: int, options: dict[str, Any], seed: int
) -> None:
    model = build(encoder_tokens=encoder_tokens)
    config = SamplerConfig(steps=steps, order="halton", choice_temperature=0.0, **options)
    ids, labels_B = partly_known(model, unknown), torch.arange(len(unknown)) if labels else None
    wanted = list(by_hand(model, ids, config, labels_B, seed))
    got = list(Decoding(model, config).steps(ids_BL=ids, labels_B=labels_B, seed=seed))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


def test_a_sample_of_an_order_does_not_depend_on_its_batch_nor_on_confidence_noise() -> None:
    model, labels = build(), torch.arange(16) % 5
    ids = partly_known(model, [*range(16, 0, -1)])
    config = SamplerConfig(steps=5, order="halton", top_k=7, guidance_scale=1.0, final_temperature=0.5)
    together = Decoding(model, config)(ids_BL=ids, labels_B=labels, seed=3)
    for b in range(16):
        alone = Decoding(model, config)(
            ids_BL=ids[b : b + 1], labels_B=labels[b : b + 1], seed=3, first_sample=b
        )
        assert torch.equal(alone, together[b : b + 1])
    quiet = Decoding(model, SamplerConfig(**{**vars(config), "choice_temperature": 0.0}))
    assert torch.equal(quiet(ids_BL=ids, labels_B=labels, seed=3), together)
    by_confidence = Decoding(model, SamplerConfig(**{**vars(config), "order": "confidence"}))
    assert not torch.equal(by_confidence(ids_BL=ids, labels_B=labels, seed=3), together)


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_what_is_masked_again_after_each_step(order: Any) -> None:
    model, unknown = build(), [16, 5, 0]
    ids, config = partly_known(model, unknown), SamplerConfig(steps=4, order=order)
    decode = Decoding(model, config)
    counts = masked_counts("cosine", 4, torch.tensor(unknown))
    before = ids
    for t, ((sampled, masked), same) in enumerate(
        zip(decode.masked_steps(ids_BL=ids, seed=0), decode.steps(ids_BL=ids, seed=0), strict=True)
    ):
        assert torch.equal(sampled, same)
        assert masked.sum(1).tolist() == (counts[t].tolist() if t < 3 else [0, 0, 0])
        known = before != model.config.mask_token_id
        assert torch.equal(sampled[known], before[known])
        assert not masked[known].any(), "what is decided stays decided"
        before = sampled.masked_fill(masked, model.config.mask_token_id)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_follows_the_order_of_each_batch() -> None:
    model = build(torch.float32).cuda()
    config = SamplerConfig(steps=5, order="halton", final_temperature=0.5)
    decode = Decoding(model, config)
    for seed in (1, 2, 3):
        ids = partly_known(model, [9, 16, 4], seed=seed)
        wanted = list(Decoding(model, config).steps(ids_BL=ids, seed=seed))[-1]
        assert torch.equal(decode(ids_BL=ids, seed=seed), wanted)
    assert decode._graph is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "raster"}, "order is 'raster', wanted one of confidence, halton"),
        ({"schedule": "step"}, "schedule is 'step', wanted one of cosine, linear, .*, constant"),
        ({"final_temperature": 0.0}, "final_temperature is 0.0, wanted a finite number more than 0, or None"),
        ({"final_temperature": math.nan}, "final_temperature is nan"),
        ({"final_temperature": math.inf}, "final_temperature is inf"),
        ({"temperature": math.inf}, r"\(6.0, inf\), wanted finite numbers, 0 or more"),
        ({"choice_temperature": math.nan}, r"\(nan, 1.0\), wanted finite"),
        ({"choice_temperature": math.inf}, r"\(inf, 1.0\), wanted finite"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


def test_more_codes_than_there_are_are_refused_before_decoding() -> None:
    with pytest.raises(ValueError, match="Decoding: top_k is 33, wanted at most the 32 codes"):
        Decoding(build(), SamplerConfig(top_k=33))
