"""Mixup and CutMix against timm's, given the same draws; their law; RandAugment as a function of its seed."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mage_fast.errors import InputError
from mage_fast.optional import optional
from mage_fast.training import augment
from mage_fast.training.augment import Augmentation, rand_augmented
from mage_fast.training.data import batches
from mage_fast.training.mixing import Mix, Mixing, soft_cross_entropy
from mage_fast.training.sources import DigitsSource

WORDS = "rand-m9-mstd0.5-inc1"


class Draws:
    """A generator in the words of ``numpy.random``: what timm's Mixup reads."""

    def __init__(self, seed: int) -> None:
        self.generator, self.first = np.random.default_rng(seed), True

    def rand(self) -> float:
        if self.first:  # whether to mix at all, which is certain: ours does not ask
            self.first = False
            return 0.0
        return self.generator.random()

    def beta(self, a: float, b: float) -> float:
        return self.generator.beta(a, b)

    def randint(self, low: int, high: int, size: None) -> int:
        assert low == 0
        assert size is None
        return int(self.generator.integers(high))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_equals_timms_mixup_given_the_same_draws(
    mixup: float, cutmix: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = optional("timm.data.mixup", extra="finetune")
    numbers = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 11, 14, generator=numbers, dtype=torch.float64)
    labels, kinds = torch.tensor([2, 0, 4, 4]), set()
    for seed in range(30):
        with monkeypatch.context() as patch:
            for name in ("rand", "beta", "randint"):
                draws = Draws(seed) if name == "rand" else draws
                patch.setattr(np.random, name, getattr(draws, name))
            oracle = theirs.Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=5)
            wanted_images, wanted_targets = oracle(images.clone(), labels)
        mix = Mixing(mixup, cutmix).drawn(11, 14, np.random.default_rng(seed))
        kinds.add(mix.box is None)
        torch.testing.assert_close(mix.images(images), wanted_images, rtol=1e-12, atol=1e-12)
        targets = mix.targets(labels, 5, 0.1)
        torch.testing.assert_close(targets, wanted_targets, rtol=1e-5, atol=1e-6)
        logits = torch.randn(4, 5, generator=numbers)
        loss = optional("timm.loss", extra="finetune").SoftTargetCrossEntropy()(logits, targets)
        torch.testing.assert_close(soft_cross_entropy(logits, targets), loss)
    assert kinds == {kind for kind, alpha in ((True, mixup), (False, cutmix)) if alpha}


def test_the_law_of_mixing() -> None:
    """Each kind half of the time; Mixup's share is a Beta's, CutMix's the part of the image that stays."""
    generator = np.random.default_rng(0)
    mixes = [Mixing(0.8, 1.0).drawn(32, 32, generator) for _ in range(4000)]
    shares = np.array([mix.share for mix in mixes if mix.box is None])
    assert abs(len(shares) / 4000 - 0.5) < 4 * math.sqrt(0.25 / 4000)
    variance = 1 / (4 * (2 * 0.8 + 1))  # of Beta(a, a)
    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(variance / len(shares))
    assert shares.var() == pytest.approx(variance, rel=0.1)
    for mix in mixes[:50]:
        if mix.box is not None:
            left, top, right, bottom = mix.box
            ones = torch.zeros(2, 1, 32, 32)
            ones[1] = 1
            assert mix.images(ones)[0].sum() == (right - left) * (bottom - top)
            assert mix.images(ones)[1].mean().item() == pytest.approx(mix.share)


def test_nothing_to_mix() -> None:
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 1])
    mix = Mixing(0, 0).drawn(4, 4, np.random.default_rng(0))
    assert mix == Mix()
    assert mix.images(images) is images
    assert torch.equal(mix.targets(labels, 2, 0.0), torch.tensor([[1.0, 0], [0, 1], [0, 1]]))
    before = images.clone()
    for seed in range(4):  # what was given is not written into
        Mixing().drawn(4, 4, np.random.default_rng(seed)).images(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("values", [(-0.1, 1.0), (0.8, -1.0), (math.nan, 1.0), (0.8, math.inf)])
def test_wrong_alphas(values: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"mixup is .* and cutmix .*, wanted 0 or more"):
        Mixing(*values)


# RandAugment


def picture() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC)


def test_rand_augment_is_timms_and_leaves_the_generators_alone() -> None:
    image = picture()
    timm: Any = optional("timm.data", extra="finetune")
    options = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    transform = timm.rand_augment_transform(WORDS, options)
    changed = 0
    for seed in range(20):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        wanted = np.asarray(transform(image))
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        got = np.asarray(rand_augmented(image, WORDS, seed))
        after = random.getstate(), np.random.get_state()  # noqa: NPY002
        assert before[0] == after[0]
        assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
        assert np.array_equal(got, wanted)
        changed += not np.array_equal(got, np.asarray(image))
    assert changed > 10


def test_batches_are_the_same_whatever_the_workers_and_where_they_begin() -> None:
    augmentation = Augmentation(scale=(0.8, 1.0), rand_augment=WORDS)
    source = DigitsSource(image_size=16, split="test")

    def inputs(**options: Any) -> list[torch.Tensor]:
        found = batches(source, 32, seed=5, augment=augmentation, items=range(96), **options)
        return [batch.inputs for batch in found]

    wanted = inputs(epochs=2)
    assert len(wanted) == 6
    random.seed(77)  # neither is read
    np.random.seed(77)  # noqa: NPY002
    assert all(torch.equal(a, b) for a, b in zip(inputs(epochs=2, workers=2), wanted, strict=True))
    resumed = inputs(start_step=2, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(resumed, wanted[2:], strict=True))
    plain = Augmentation(scale=(0.8, 1.0))
    cropped = next(batches(source, 32, seed=5, augment=plain, items=range(96))).inputs
    same = (cropped == wanted[0]).flatten(1).all(1)  # the crops are those of a run without
    assert 0 < same.sum() < len(same)


def test_words_that_timm_does_not_have() -> None:
    for words in ("randm9", "rand-x9", "none", "rand-foo-m9", "rand-m"):
        with pytest.raises(InputError, match=f"rand_augment is '{words}'"):
            augment.check_rand_augment(words)


def test_without_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    augment._rand_augment.cache_clear()
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(InputError, match=r"timm.data does not load: pip install 'mage-fast\[finetune\]'"):
        batches(DigitsSource(image_size=16, split="test"), 32, augment=Augmentation(rand_augment=WORDS))
