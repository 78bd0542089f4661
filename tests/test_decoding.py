"""Decoding leaves out work, not numbers: against all rows at every step, and the reference sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mage_fast import decoding, reference
from mage_fast.decoding import Decoding
from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.model import MAGE
from mage_fast.sampler_config import Approximation, SamplerConfig, masked_counts
from tests.models import assert_near, tiny, twin

few = settings(max_examples=12, deadline=None, derandomize=True)


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> MAGE:
    """In float64, so that which rows are computed together cannot change a sampled id through rounding."""
    torch.manual_seed(0)
    model = MAGE(tiny(**changes)).eval()
    nn.init.normal_(model.embedding.word_embeddings.weight, std=0.5)
    nn.init.normal_(model.head.bias, std=0.3)
    return model.to(dtype)


def partly_known(model: MAGE, unknown: Sequence[int], seed: int = 7) -> Tensor:
    """Ids with this many unknown tokens in each sample, at random places."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    ids = torch.randint(config.codebook_size, (len(unknown), config.num_tokens), generator=generator)
    for b, count in enumerate(unknown):
        ids[b, torch.randperm(config.num_tokens, generator=generator)[:count]] = config.mask_token_id
    return ids


@torch.no_grad()
def plain_steps(
    model: MAGE, ids: Tensor, config: SamplerConfig, *, labels: Tensor | None, seed: int, first_sample: int
) -> Iterator[Tensor]:
    """Every sample, every position, every step, by ``model.logits``; guidance in two passes."""
    mask_token_id = model.config.mask_token_id
    counts = masked_counts(config.schedule, config.steps, (ids == mask_token_id).sum(1))
    classes = model.class_ids(labels, len(ids))
    for t in range(config.steps):
        is_masked = ids == mask_token_id
        guidance = None
        if config.guidance_scale:
            guidance = model.logits(ids, is_masked, model.class_ids(None, len(ids)))
        sampled, ids = sample_confident(
            model.logits(ids, is_masked, classes),
            ids,
            counts[t],
            mask_token_id=mask_token_id,
            choice_temperature=config.choice_temperature * (1 - (t + 1) / config.steps),
            rng_state=torch.tensor([seed, t]),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            guidance_logits_NC=guidance,
            guidance_scale=config.guidance_scale,
            samples_B=first_sample + torch.arange(len(ids)),
            implementation="reference",
        )
        yield sampled


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
@few
@given(
    batch=st.integers(1, 5),
    labels=st.none() | st.lists(st.integers(0, 9), min_size=5, max_size=5),
    unknown=st.none() | st.lists(st.integers(0, 16), min_size=5, max_size=5),
    steps=st.sampled_from([1, 2, 5, 20]),
    options=st.sampled_from([{}, {"schedule": "linear", "top_k": 9}, {"temperature": 0.7, "top_p": 0.8}]),
    seed=st.integers(0, 2**60),
    first_sample=st.integers(0, 2**33),
)
def test_ids_are_those_of_every_row_at_every_step(
    encoder_tokens: str,
    guidance_scale: float,
    batch: int,
    labels: list[int] | None,
    unknown: list[int] | None,
    steps: int,
    options: dict,
    seed: int,
    first_sample: int,
) -> None:
    """From nothing and in inpainting (samples with no and with one unknown token), also more steps than
    tokens.
    """
    model = build(encoder_tokens=encoder_tokens)
    config = SamplerConfig(steps=steps, guidance_scale=guidance_scale, **options)
    labels_B = None if labels is None else torch.tensor(labels[:batch])
    ids = partly_known(model, [16] * batch if unknown is None else unknown[:batch])
    given = {"batch": batch} if unknown is None else {"ids_BL": ids}
    whole = {"labels_B": labels_B, "seed": seed, "first_sample": first_sample, **given}
    wanted = list(plain_steps(model, ids, config, labels=labels_B, seed=seed, first_sample=first_sample))
    decode = Decoding(model, config)
    got = list(decode.steps(**whole))
    assert len(got) == steps
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(decode(**whole), wanted[-1])


@pytest.mark.parametrize("labels", [None, [3, 0, 3]], ids=["unconditional", "labels"])
@pytest.mark.parametrize("known", [0, 5])
def test_the_reference_sampler_given_the_same_noise(
    labels: list[int] | None, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps, seed, temperature = build(), 6, 11, 4.5
    theirs = twin(model, model.config)
    length, codes = model.config.num_tokens, model.config.codebook_size
    start = torch.full((3, length), model.config.mask_token_id)
    start[:, :known] = torch.arange(known)
    step = 0

    def noise(kind: rng.Stream, columns: int) -> Tensor:
        return rng.gumbel(rng.new_state(seed, step), rng.stream(kind), 3, columns)

    def sample(self: torch.distributions.Categorical) -> Tensor:
        return (self.logits + noise(rng.Stream.SAMPLE_ID, length * codes).view(3, length, codes)).argmax(2)

    def exponential(self: Tensor) -> Tensor:
        nonlocal step
        drawn = torch.exp(-noise(rng.Stream.SAMPLE_CONFIDENCE, length).double()).float()
        step += 1
        return drawn

    monkeypatch.setattr(torch.distributions.Categorical, "sample", sample)
    monkeypatch.setattr(Tensor, "exponential_", exponential)
    labels_B = None if labels is None else torch.tensor(labels)
    class_ids = model.class_ids(labels_B, 3)
    wanted = reference.generate(theirs, steps=steps, temperature=temperature, ids=start, class_ids=class_ids)
    assert step == steps
    decode = Decoding(model, SamplerConfig(steps=steps, choice_temperature=temperature))
    assert torch.equal(decode(ids_BL=start, labels_B=labels_B, seed=seed), wanted.ids)


class Spy:
    """Notes how many rows each forward pass has, and how many logits it gives."""

    def __init__(self, model: MAGE, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.masked: list[int] = []
        self.plans: list[MaskPlan] = []
        true = model.masked_logits

        def masked_logits(ids: Tensor, classes: Tensor, plan: MaskPlan) -> Tensor:
            logits = true(ids, classes, plan)
            self.rows.append(len(ids))
            self.masked.append(len(logits))
            self.plans.append(plan)
            return logits

        monkeypatch.setattr(model, "masked_logits", masked_logits)


@pytest.mark.parametrize(
    ("labels", "guidance_scale", "first"),
    [
        (None, 0.0, 1),
        ([5] * 6, 0.0, 1),
        ([5, 1, 5, 5, 1, 5], 0.0, 2),
        ([5, 1, 5, 5, 1, 5], 1.0, 4),
        ([0, 1, 2, 3, 4, 5], 0.0, 6),
    ],
)
def test_the_first_step_runs_once_for_each_class(
    labels: list[int] | None, guidance_scale: float, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    spy = Spy(model, monkeypatch)
    labels_B = None if labels is None else torch.tensor(labels)
    Decoding(model, SamplerConfig(steps=3, guidance_scale=guidance_scale))(6, labels_B=labels_B, seed=0)
    halves = 2 if guidance_scale else 1
    assert spy.rows == [first, 6 * halves, 6 * halves]
    assert spy.masked == [16 * first, *(6 * halves * n for n in (13, 8))]


def test_only_unknown_rows_have_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    spy = Spy(model, monkeypatch)
    unknown = torch.tensor([7, 0, 16, 1])
    Decoding(model, SamplerConfig(steps=4))(ids_BL=partly_known(model, unknown.tolist()), seed=0)
    counts = masked_counts("cosine", 4, unknown).sum(1).tolist()
    assert spy.masked == [24, *counts[:-1]]
    # the encoder's last block computes visible rows
    rows: list[int] = []
    model.encoder.blocks[-1].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    Decoding(model, SamplerConfig(steps=4))(ids_BL=partly_known(model, unknown.tolist()), seed=0)
    assert rows == [4 * 17 - masked for masked in (24, *counts[:-1])]


def test_nothing_unknown_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    spy = Spy(model, monkeypatch)
    ids = partly_known(model, [0, 0])
    assert torch.equal(Decoding(model)(ids_BL=ids, seed=0), ids)
    assert Decoding(model)(ids_BL=ids[:0], seed=0).shape == (0, 16)
    assert spy.rows == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_logits_of_masked_rows_in_lower_precision(encoder_tokens: str, dtype: torch.dtype) -> None:
    """The rows that decoding computes are the rows of all logits, to the rounding of products of other
    sizes; under autocast decoding follows the seed, too.
    """
    model = build(torch.float32, encoder_tokens=encoder_tokens)
    decode = Decoding(model, SamplerConfig(steps=4))
    ids = partly_known(model, [3, 16, 0, 9])
    is_masked = ids == model.config.mask_token_id
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        wanted = model.logits(ids, is_masked)[is_masked]
        got, guidance = decode._logits(ids, model.class_ids(None, 4), (3, 16, 0, 9), torch.zeros(2).long())
        assert guidance is None
        assert got.dtype == wanted.dtype == dtype
        assert_near(got, wanted, 1e-5 if dtype == torch.float32 else 0.03)
        one, same, other = (decode(5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert ((one >= 0) & (one < model.config.codebook_size)).all()


class OnDevice(TorchDispatchMode):
    """Fails on whatever would wait for a GPU, or copy to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls += 1
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "_unique2"), func
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{func} with a tensor on the host"
        return out


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 2.0, "top_k": 4},
        {"order": "halton", "final_temperature": 0.5},
        *({"approximation": a} for a in get_args(Approximation)[1:]),
    ],
    ids=str,
)
def test_no_step_waits_for_a_gpu_or_copies_to_it(
    encoder_tokens: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph captures, on a device that holds no values and is not the host."""
    if encoder_tokens == "unmasked" and "approximation" in options:
        pytest.skip("refused")
    model = build(torch.float32, encoder_tokens=encoder_tokens)
    config = SamplerConfig(steps=4, **options)
    prepared = [
        Decoding(model, config)._prepare(*start, 3, 0)
        for start in ((4, None, torch.tensor([1, 1, 1, 2])), (None, partly_known(model, [9, 0, 16]), None))
    ]
    model.to("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # unknown on that device
    decode = Decoding(model, config)
    for kind, inputs in prepared:
        there = decoding._Inputs(*(x.to("meta") for x in inputs))
        with torch.no_grad(), OnDevice() as mode:
            assert decode._last(kind, there).shape == inputs.ids_BL.shape
        assert mode.calls > 100


def test_ids_of_any_integer_dtype_give_int64() -> None:
    model = build()
    ids, decode = partly_known(model, [5, 16]), Decoding(model, SamplerConfig(steps=2))
    narrow = decode(ids_BL=ids.int(), seed=0)
    assert narrow.dtype == torch.int64
    assert torch.equal(narrow, decode(ids_BL=ids, seed=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 2, "first_sample": -1}, "generate: first_sample is -1, wanted 0 or more"),
        ({"batch": -1}, "generate: number of images is -1, wanted at least 1"),
        ({"ids_BL": torch.zeros(16).long()}, r"generate: ids has shape \(16,\), wanted \(\*, 16\)"),
        ({"batch": 2, "labels_B": torch.tensor([0.5, 1])}, "labels is float32, wanted int64 or int32"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(build())(**arguments)
