"""Iterative decoding: schedules, exact counts, frozen tokens, seeds, guidance, and the law of the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mage_fast import reference
from mage_fast.config import MAGEConfig
from mage_fast.decoding import Decoding
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, plan_of_mask
from mage_fast.model import MAGE
from mage_fast.sampler import generate, generate_batches, generate_ids
from mage_fast.sampler_config import SCHEDULES, SamplerConfig, masked_counts
from tests.sampler_stub import Stub

few = settings(max_examples=40, deadline=None, derandomize=True)


def build(**changes: Any) -> MAGE:
    """In float64, so that a batch's size cannot change a sampled id through rounding."""
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny(**{"tokenizer": None} | changes)).double().eval()
    nn.init.normal_(model.embedding.word_embeddings.weight, std=0.5)
    return model


def partly_known(model: MAGE, unknown: list[int]) -> Tensor:
    """Ids with this many unknown tokens in each sample, at random places."""
    config = model.config
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(config.codebook_size, (len(unknown), config.num_tokens), generator=generator)
    for b, count in enumerate(unknown):
        ids[b, torch.randperm(config.num_tokens, generator=generator)[:count]] = config.mask_token_id
    return ids


# Schedules and counts


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_nothing(name: str) -> None:
    values = [SCHEDULES[name](t / 100) for t in range(101)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.0, abs=1e-15)
    assert all(a > b for a, b in pairwise(values))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cosine", 0.5**0.5),
        ("linear", 0.5),
        ("square", 0.75),
        ("square_root", 1 - 0.5**0.5),
        ("arccos", 2 / 3),
    ],
)
def test_schedules_half_way(name: str, wanted: float) -> None:
    assert SCHEDULES[name](0.5) == pytest.approx(wanted)


@few
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 30),
    unknown=st.lists(st.integers(0, 40), min_size=1, max_size=4),
)
def test_counts_of_each_sample(name: str, steps: int, unknown: list[int]) -> None:
    counts = masked_counts(name, steps, torch.tensor(unknown))
    assert counts.shape == (steps, len(unknown))
    for b, start in enumerate(unknown):
        left = start
        for t in range(steps):
            wanted = math.floor(start * SCHEDULES[name]((t + 1) / steps))
            left = max(1, min(left - 1, wanted)) if start else 0
            assert counts[t, b] == left
        alone = masked_counts(name, steps, torch.tensor([start]))
        assert torch.equal(alone[:, 0], counts[:, b]), "no sample's count depends on another's"


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1024])
def test_counts_of_a_full_grid_are_the_reference_s(tokens: int) -> None:
    for steps in range(1, 38):
        left, wanted = tokens, []
        for step in range(steps):
            left = reference.num_remasked(step, steps, tokens, left)
            wanted.append(left)
        assert masked_counts("cosine", steps, torch.tensor([tokens]))[:, 0].tolist() == wanted


def test_a_count_on_the_border_is_not_rounded_off() -> None:
    """cos(pi / 3) is one half, and float64 holds every count."""
    for steps in range(3, 300, 3):
        assert masked_counts("cosine", steps, torch.tensor([1000]))[2 * steps // 3 - 1].item() == 500
    huge = 2**24 + 1  # not a float32
    assert masked_counts("linear", 2, torch.tensor([2 * huge]))[0].item() == huge


# Decoding


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_known_tokens_are_frozen(encoder_tokens: str, guidance_scale: float) -> None:
    """Inpainting with another number of unknown tokens in each sample, none and all among them."""
    model = build(encoder_tokens=encoder_tokens)
    ids = partly_known(model, [0, 1, 5, 16])
    known = ids != model.config.mask_token_id
    config = SamplerConfig(steps=5, guidance_scale=guidance_scale)
    for decided in Decoding(model, config).steps(ids_BL=ids, seed=1):
        assert torch.equal(decided[known], ids[known])
        assert ((decided >= 0) & (decided < model.config.codebook_size)).all()
    result = generate_ids(model, ids_BL=ids, config=config, seed=1)
    assert torch.equal(result, decided)


def test_each_sample_follows_its_own_schedule() -> None:
    stub = Stub(torch.randn(16, 5))
    ids, unknown = stub.unknown(4), [16, 9, 2, 0]
    for b, count in enumerate(unknown):
        ids[b, count:] = 0
    stub.decode(ids, SamplerConfig(steps=4))
    wanted = torch.cat([torch.tensor([unknown]), masked_counts("cosine", 4, torch.tensor(unknown))])[:-1]
    for (seen, _, plan), count in zip(stub.calls, wanted, strict=True):
        assert torch.equal(plan.is_masked_BL, seen == stub.config.mask_token_id)
        assert plan.is_masked_BL.sum(1).tolist() == count.tolist()
        assert plan.masked_index_N.tolist() == plan.is_masked_BL.flatten().nonzero().flatten().tolist()
    for (before, _, _), (after, _, _) in pairwise(stub.calls):
        decided = before != stub.config.mask_token_id
        assert torch.equal(after[decided], before[decided]), "what is decided stays decided"


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_any_number_of_steps(steps: int) -> None:
    """One step, and more steps than tokens."""
    model = build(grid_size=3)
    decode = Decoding(model, SamplerConfig(steps=steps))
    decided = list(decode.steps(ids_BL=partly_known(model, [9, 4]), seed=0))
    assert len(decided) == steps
    assert ((decided[-1] >= 0) & (decided[-1] < 32)).all()


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_a_seed_gives_the_same_images_in_any_batch(encoder_tokens: str, schedule: str) -> None:
    model, config = build(encoder_tokens=encoder_tokens), SamplerConfig(steps=4, schedule=schedule)
    labels = torch.tensor([0, 3, 3, 1, 2])
    whole = generate_ids(model, 5, labels_B=labels, config=config, seed=9)
    alone = [
        generate_ids(model, 1, labels_B=labels[b : b + 1], config=config, seed=9, first_sample=b)
        for b in range(5)
    ]
    assert torch.equal(whole, torch.cat(alone))
    assert len(whole.unique(dim=0)) == 5
    assert torch.equal(whole, generate_ids(model, 5, labels_B=labels, config=config, seed=9))
    assert not torch.equal(whole, generate_ids(model, 5, labels_B=labels, config=config, seed=10))


def test_the_global_seed_governs_by_default() -> None:
    model, config = build(), SamplerConfig(steps=2)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(generate_ids(model, 2, config=config))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_labels_change_what_is_generated() -> None:
    model, config = build(), SamplerConfig(steps=3)
    one, other = (
        generate_ids(model, 4, labels_B=torch.full((4,), label), config=config, seed=0) for label in (0, 1)
    )
    assert not torch.equal(one, other)


def test_guidance_equals_two_separate_passes() -> None:
    model, config = build(), SamplerConfig(steps=4, guidance_scale=2.0)
    labels = torch.tensor([0, 4, 2])
    plain, doubled = model.masked_logits, 0

    def separate(ids: Tensor, classes: Tensor, plan: MaskPlan) -> Tensor:
        nonlocal doubled
        doubled += len(ids) == 6
        halves = zip(ids.chunk(2), classes.chunk(2), plan.is_masked_BL.chunk(2), strict=True)
        return torch.cat([plain(i, c, plan_of_mask(m, m.sum(1).tolist())) for i, c, m in halves])

    together = generate_ids(model, 3, labels_B=labels, config=config, seed=2)
    model.masked_logits = separate  # type: ignore[method-assign, assignment]
    assert torch.equal(generate_ids(model, 3, labels_B=labels, config=config, seed=2), together)
    assert doubled == 4
    model.masked_logits = plain  # type: ignore[method-assign]
    assert not torch.equal(
        generate_ids(model, 3, labels_B=labels, config=SamplerConfig(steps=4), seed=2), together
    )


def test_decoding_is_in_eval_mode_and_restores_each_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().train()
    model.encoder.eval()  # frozen by the user
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    plain = model.masked_logits

    def spy(*args: Any, **keywords: Any) -> Tensor:
        seen.append(any(module.training for module in model.modules()))
        return plain(*args, **keywords)

    monkeypatch.setattr(model, "masked_logits", spy)
    generate_ids(model, 2, config=SamplerConfig(steps=2), seed=0)
    assert seen == [False, False]
    assert {name: module.training for name, module in model.named_modules()} == modes

    def fail(*args: Any, **keywords: Any) -> Tensor:
        raise KeyError

    monkeypatch.setattr(model, "masked_logits", fail)
    with pytest.raises(KeyError):
        generate_ids(model, 2, seed=0)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_nothing_is_recorded_for_autograd() -> None:
    model = MAGE(MAGEConfig.tiny())
    assert not generate(model, 1, config=SamplerConfig(steps=1)).requires_grad


# Images


def test_batches_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = MAGE(MAGEConfig.tiny()).double(), SamplerConfig(steps=2)
    sizes = []
    true = Decoding.__call__

    def spy(self: Decoding, count: int, **keywords: Any) -> Tensor:
        sizes.append((count, keywords["first_sample"]))
        return true(self, count, **keywords)

    monkeypatch.setattr(Decoding, "__call__", spy)
    labels = torch.tensor([0, 1, 2, 3, 4])
    batches: Iterator[Tensor] = generate_batches(
        model, 5, labels_B=labels, config=config, seed=3, batch_size=2
    )
    first = next(batches)
    assert sizes == [(2, 0)], "a batch is decoded when it is asked for"
    streamed = torch.cat([first, *batches])
    assert sizes == [(2, 0), (2, 2), (1, 4)]
    assert streamed.shape == (5, 3, 16, 16)
    whole = generate(model, 5, labels_B=labels, config=config, seed=3)
    torch.testing.assert_close(streamed, whole)


# What it refuses


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"steps": 0}, "SamplerConfig: steps is 0, wanted at least 1"),
        ({"schedule": "sine"}, "schedule is 'sine', wanted one of cosine, linear"),
        ({"temperature": 0.0}, "SamplerConfig: .choice_temperature, temperature. is"),
        ({"choice_temperature": -1.0}, "SamplerConfig: .choice_temperature, temperature. is"),
        ({"top_k": -1}, "SamplerConfig: .top_k, top_p. is"),
        ({"top_p": 0.0}, "SamplerConfig: .top_k, top_p. is"),
    ],
)
def test_bad_settings_are_named(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings_)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "generate: number of images is 0, wanted at least 1"),
        ({"ids_BL": torch.zeros(2, 9).long()}, r"generate: ids has shape \(2, 9\), wanted \(\*, 16\)"),
        ({"ids_BL": torch.full((2, 16), 32)}, "generate: ids holds 32, wanted 0 <= ids < 32"),
        ({"ids_BL": torch.zeros(2, 16)}, "generate: ids is float32, wanted int64 or int32"),
        ({"batch": 2, "labels_B": torch.tensor([1])}, r"labels has shape \(1,\), wanted \(2,\)"),
        ({"batch": 1, "labels_B": torch.tensor([11])}, "labels holds 11, wanted 0 <= labels < 11"),
    ],
)
def test_bad_ids_and_labels_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ids(build(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "number of images is 0, wanted at least 1"),
        ({"batch_size": 0}, "batch_size is 0, wanted at least 1"),
        ({"labels_B": torch.tensor([0, 1, 2])}, r"generate: labels has shape \(3,\), wanted \(4,\)"),
    ],
)
def test_bad_counts_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(MAGE(MAGEConfig.tiny()), **{"num_images": 4} | arguments)


def test_images_want_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="this model has no tokenizer to decode ids; use generate_ids"):
        generate(build(), 1)
