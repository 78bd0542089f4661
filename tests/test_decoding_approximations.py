"""The named approximations of decoding compute what they say, and are refused where they mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mage_fast import reference
from mage_fast.decoding import Decoding
from mage_fast.feature_cache import FeatureCache
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, plan_of_mask
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig, masked_counts
from tests.models import assert_near, masks, tiny, twin


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> MAGE:
    torch.manual_seed(0)
    model = MAGE(tiny(**changes)).eval()
    nn.init.normal_(model.embedding.word_embeddings.weight, std=0.5)
    return model.to(dtype)


@pytest.mark.parametrize("drop_ratio", [0.5, 0.2, 0.0])
def test_drop_masked_drops_as_training_does(drop_ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """ceil(drop_ratio L) masked tokens or as many as there are, anew at each step; the logits are those of
    the reference model which does not see them.
    """
    model, steps = build(drop_ratio=drop_ratio), 6
    theirs, length = twin(model, model.config), model.config.num_tokens
    true, seen = model.masked_logits, []

    def spy(ids: Tensor, classes: Tensor, plan: MaskPlan) -> Tensor:
        logits = true(ids, classes, plan)
        seen.append((ids, classes, plan, logits))
        return logits

    monkeypatch.setattr(model, "masked_logits", spy)
    config = SamplerConfig(steps=steps, approximation="drop_masked")
    together = Decoding(model, config)(3, seed=4)
    counts = [length, *masked_counts("cosine", steps, torch.tensor([length]))[:-1, 0].tolist()]
    orders = set()
    for (ids, classes, plan, logits), count in zip(seen, counts, strict=True):
        dropped, masked = masks(plan)
        wanted = min(count, -(-int(length * drop_ratio * 10) // 10))
        assert (dropped <= masked).all()
        assert dropped.sum(1).tolist() == [wanted] * len(ids)
        encoded = theirs.forward_encoder(ids, dropped, masked, classes)
        all_logits = theirs.forward_decoder(encoded, dropped, masked)[:, 1:, : model.config.codebook_size]
        assert_near(logits, all_logits[masked], 1e-11)
        orders.add(tuple(dropped[0].tolist()))
    assert len(orders) == (steps if drop_ratio else 1)
    alone = [Decoding(model, config)(1, seed=4, first_sample=b) for b in range(3)]
    assert torch.equal(together, torch.cat(alone)), "no sample depends on its batch"
    exact = Decoding(model, SamplerConfig(steps=steps))(3, seed=4)
    assert torch.equal(together, exact) == (drop_ratio == 0.0)


class PlainCache:
    """Of the reference model: a partial pass puts the whole pass's rows back before every block."""

    def __init__(self, theirs: reference.MAGE, ids: Tensor, mask: Tensor, classes: Tensor) -> None:
        self.model, self.mask, self.kept = theirs, mask, []
        x = theirs.embed(ids, classes)
        for block in theirs.blocks:
            self.kept.append(x)
            x = block(x)
        self.features = theirs.norm(x)

    def logits(self, ids: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        class_token = torch.ones(len(ids), 1, dtype=torch.bool)
        is_new = torch.cat([class_token, self.mask & ~mask], 1)[..., None]
        x = self.model.embed(ids, classes)
        for block, kept in zip(self.model.blocks, self.kept, strict=True):
            x = block(torch.where(is_new, x, kept))
        features = torch.where(is_new, self.model.norm(x), self.features)
        nothing = torch.zeros_like(mask)
        return self.model.forward_decoder(features, nothing, mask)[:, 1:, : self.model.codebook_size][mask]


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
@torch.no_grad()
def test_a_partial_pass_computes_new_rows_only(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(padding=padding)
    theirs = twin(model, model.config)
    config, length = model.config, model.config.num_tokens
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(config.codebook_size, (3, length), generator=generator)
    rank = torch.rand(3, length, generator=generator).argsort(1).argsort(1)
    before = rank < torch.tensor([[16], [9], [0]])
    classes = model.class_ids(torch.tensor([1, 0, 3]), 3)
    cache, rows = FeatureCache(model), []
    model.encoder.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    start = ids.masked_fill(before, config.mask_token_id)
    first = cache.masked_logits(start, classes, plan_of_mask(before, [16, 9, 0]), [16, 9, 0], partial=False)
    assert_near(first, model.logits(start, before, classes)[before], 1e-11)
    plain = PlainCache(theirs, start, before, classes)
    for left in ([12, 8, 0], [5, 1, 0]):  # a second partial pass renews the first one's rows
        after = rank < torch.tensor(left)[:, None]
        now = ids.masked_fill(after, config.mask_token_id)
        got = cache.masked_logits(now, classes, plan_of_mask(after, left), left, partial=True)
        if left == [12, 8, 0]:
            assert_near(got, plain.logits(now, after, classes), 1e-11)
        assert (got - model.logits(now, after, classes)[after]).abs().max() > 1e-4, "it is an approximation"
    assert rows[0] == 3 * 17
    assert rows[2] == 3 + 25 - 20


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_cached_features_by_step(guidance_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, partial = build(), 6, []
    true = FeatureCache.masked_logits

    def spy(self: FeatureCache, *args: Any, **keywords: Any) -> Tensor:
        partial.append(keywords["partial"])
        return true(self, *args, **keywords)

    monkeypatch.setattr(FeatureCache, "masked_logits", spy)
    config = SamplerConfig(steps=steps, guidance_scale=guidance_scale, approximation="cached_features")
    labels = torch.tensor([3, 3, 1])
    together = Decoding(model, config)(3, labels_B=labels, seed=4)
    assert partial == [False, True, False, True, False], "the shared first step needs no cache"
    alone = [Decoding(model, config)(1, labels_B=labels[b : b + 1], seed=4, first_sample=b) for b in range(3)]
    assert torch.equal(together, torch.cat(alone)), "no sample depends on its batch"
    exact = SamplerConfig(steps=2, guidance_scale=guidance_scale)
    two = SamplerConfig(steps=2, guidance_scale=guidance_scale, approximation="cached_features")
    assert torch.equal(Decoding(model, two)(3, seed=4), Decoding(model, exact)(3, seed=4))


@pytest.mark.parametrize("approximation", ["drop_masked", "cached_features"])
def test_refused_where_masked_tokens_are_never_seen(approximation: str) -> None:
    model = build(encoder_tokens="unmasked")
    with pytest.raises(ValueError, match=f"approximation is '{approximation}', wanted 'none': this model"):
        Decoding(model, SamplerConfig(approximation=approximation))  # type: ignore[arg-type]


def test_none_by_default_and_others_are_named() -> None:
    assert SamplerConfig().approximation == "none"
    with pytest.raises(ValueError, match="approximation is 'fast', wanted one of none, drop_masked, cached"):
        SamplerConfig(approximation="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("approximation", ["drop_masked", "cached_features"])
def test_inpainting_keeps_known_tokens(approximation: str) -> None:
    model = build(torch.float32)
    ids = torch.full((4, 16), model.config.mask_token_id)
    for b, known in enumerate((0, 16, 5, 15)):
        ids[b, :known] = b
    got = Decoding(model, SamplerConfig(steps=7, approximation=approximation))(ids_BL=ids, seed=1)  # type: ignore[arg-type]
    known = ids != model.config.mask_token_id
    assert torch.equal(got[known], ids[known])
    assert ((got >= 0) & (got < model.config.codebook_size)).all()
