"""Iterative decoding of the reference path: schedule, frozen tokens, confidence, sampling law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mage_fast.reference import generate, num_remasked
from tests.reference_oracle import tiny, tiny_vqgan


def test_schedule() -> None:
    assert [num_remasked(t, 4, 16, 16) for t in range(4)] == [14, 11, 6, 1]
    assert num_remasked(0, 20, 256, 256) == math.floor(256 * math.cos(math.pi / 40)) == 255
    assert num_remasked(0, 100, 256, 256) == 255
    assert num_remasked(3, 8, 10, 1) == 1


@pytest.mark.parametrize("known", [0, 6])
def test_decoding_freezes_what_it_keeps(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(vqgan=tiny_vqgan())
    start = torch.full((3, 16), model.mask_token_id)
    start[:, :known] = torch.arange(known)
    inputs: list[Tensor] = []
    encode = model.forward_encoder
    monkeypatch.setattr(model, "forward_encoder", lambda ids, *rest: inputs.append(ids) or encode(ids, *rest))
    out = generate(model, steps=5, ids=start)
    assert len(inputs) == 5
    unknown = 16 - known
    for step, (ids, after) in enumerate(zip(inputs, [*inputs[1:], out.ids], strict=True)):
        kept = ids != model.mask_token_id
        assert torch.equal(after[kept], ids[kept])
        assert ((~kept).sum(1) == unknown).all()
        unknown = num_remasked(step, 5, 16 - known, unknown)
    assert ((out.ids >= 0) & (out.ids < 24)).all()
    assert torch.equal(out.images, model.vqgan.decode_ids(out.ids))


def test_the_least_confident_are_masked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    inputs: list[Tensor] = []
    samples: list[Tensor] = []
    encode, sample = model.forward_encoder, torch.distributions.Categorical.sample
    monkeypatch.setattr(model, "forward_encoder", lambda ids, *rest: inputs.append(ids) or encode(ids, *rest))
    monkeypatch.setattr(
        torch.distributions.Categorical, "sample", lambda self: samples.append(sample(self)) or samples[-1]
    )
    generate(model, 2, steps=4, temperature=0.0)
    for ids, drawn, after in zip(inputs[:-1], samples[:-1], inputs[1:], strict=True):
        unknown, again = ids == 30, after == 30
        p = model(ids % 24, mask=unknown).logits[:, 1:, :24].softmax(-1).gather(-1, drawn[..., None])[..., 0]
        assert (again <= unknown).all()
        for b in range(2):
            assert p[b][again[b]].max() <= p[b][unknown[b] & ~again[b]].min()


def test_sampling_follows_the_categorical() -> None:
    model = tiny()
    torch.manual_seed(3)
    drawn = generate(model, 4000, steps=1).ids[:, 0]
    logits = model(torch.zeros(1, 16, dtype=torch.int64), mask=torch.ones(1, 16, dtype=torch.bool)).logits
    p = logits[0, 1, :24].softmax(-1).detach().numpy()
    counts = np.bincount(drawn.numpy(), minlength=24)
    assert stats.chisquare(counts, p * 4000).pvalue > 1e-3


def test_unequal_unknown_counts_are_refused() -> None:
    start = torch.full((2, 16), 30)
    start[0, 0] = 1
    with pytest.raises(ValueError, match=r"\[15, 16\] tokens to sample"):
        generate(tiny(), ids=start)
