"""A step of fine-tuning against plain PyTorch, in micro-batches, in two processes, and its wrong inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast import MAGE, MAGEClassifier, MAGEConfig
from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.recipes.finetune import HeldOut
from mage_fast.training.classifier_step import ClassifierStep
from mage_fast.training.distributed import Processes, replicated
from mage_fast.training.mixing import Mixing
from mage_fast.training.optim import build_adamw, layer_decay_groups
from mage_fast.training.schedule import set_lr
from mage_fast.training.sources import DigitsSource
from mage_fast.training.step import MicroBatch
from tests.models import assert_near, draw_ids
from tests.ranks import in_ranks

CLASSES, LR = 10, 0.01


def built(drop_path: float = 0.3, dropout: float = 0.1) -> MAGEClassifier:
    torch.manual_seed(0)
    classifier = MAGEClassifier(MAGE(MAGEConfig.tiny(dropout=dropout)), CLASSES, drop_path=drop_path)
    torch.nn.init.normal_(classifier.head.weight, std=0.1)
    return classifier.train()


def step_of(classifier: MAGEClassifier, **options: Any) -> ClassifierStep:
    optimizer = build_adamw(layer_decay_groups(classifier.layers, 0.5), LR, betas=(0.9, 0.999))
    set_lr(optimizer, LR)
    return ClassifierStep(classifier, optimizer, **options)


def data(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, 16, 16, generator=generator)
    return images, torch.randint(CLASSES, (batch,), generator=generator)


def values(classifier: MAGEClassifier) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in classifier.named_parameters()}


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_equals_plain_pytorch(seed: int) -> None:
    """Mixed by hand, the same dropout and drop path, AdamW's first step with a rate for each layer."""
    classifier = built()
    plain, (images, labels) = copy.deepcopy(classifier), data()
    state = rng.new_state(seed, 3)
    metrics = step_of(classifier, mixing=Mixing())(images, labels, rng_state=state)

    mix = Mixing().drawn(16, 16, np.random.default_rng((seed, 3)))
    mixed = images.clone()
    if mix.box is None:
        mixed = mix.share * images + (1 - mix.share) * images.flip(0)
    else:
        left, top, right, bottom = mix.box
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    log_p = plain(mixed, rng_state=state).log_softmax(1)
    terms = [0.9 * F.nll_loss(log_p, y) - 0.1 * log_p.mean() for y in (labels, labels.flip(0))]
    loss = mix.share * terms[0] + (1 - mix.share) * terms[1]
    torch.testing.assert_close(metrics["loss"], loss.detach())
    loss.backward()
    trained = {name: x for name, x in plain.named_parameters() if x.requires_grad}
    norm = torch.stack([x.grad.square().sum() for x in trained.values()]).sum().sqrt()  # type: ignore[union-attr]
    torch.testing.assert_close(metrics["gradient_norm"], norm)
    scales = {"mage.embedding": 0.5**3, "mage.encoder.blocks.0": 0.5**2, "mage.encoder.blocks.1": 0.5}
    got = values(classifier)
    for name, x in plain.named_parameters():
        wanted = x.detach()
        if x.requires_grad:
            lr = LR * next((scale for start, scale in scales.items() if name.startswith(start)), 1.0)
            decay = 0.05 if x.ndim > 1 else 0.0
            assert x.grad is not None
            wanted = wanted * (1 - lr * decay) - lr * x.grad / (x.grad.abs() + 1e-8)
            # where a gradient is rounding alone its sign is anyone's
            clear = x.grad.abs() > 1e-6
            assert_near(got[name][clear], wanted[clear], 1e-4, name)
        else:
            assert torch.equal(got[name], wanted), name


def micro_batches(number: int, parts: int) -> list[MicroBatch]:
    """Of a step: without anything random but the images."""
    images, labels = data()
    cut = zip(images.chunk(parts), labels.chunk(parts), strict=True)
    return [MicroBatch(x, y, rng.new_state(part, number)) for part, (x, y) in enumerate(cut)]


def test_micro_batches_are_the_batch() -> None:
    whole, parts = built(0.0, 0.0), built(0.0, 0.0)
    first, second = step_of(whole), step_of(parts)
    for number in range(3):
        losses = [
            first.accumulate(micro_batches(number, 1))["loss"],
            second.accumulate(micro_batches(number, 3))["loss"],
        ]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert losses[0] < 2.2
    wanted = values(whole)
    for name, x in values(parts).items():
        assert (x - wanted[name]).abs().max() < LR, name  # Adam's steps are signs where gradients vanish
        assert_near(x.norm(), wanted[name].norm(), 1e-2, name)


def trained_in_ranks(processes: Processes) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Two steps of a share of the micro-batches, and what all then see on held-out digits."""
    classifier = built()
    step = step_of(classifier, mixing=Mixing(), parallel=replicated(classifier, processes))
    for number in range(2):
        step.accumulate(micro_batches(number, 2)[processes.rank :: processes.count])
    source = DigitsSource(image_size=16, split="test")
    look = HeldOut(classifier, source, every_steps=1, batch_size=100, processes=processes)
    return values(classifier), look(2)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    alone, seen = trained_in_ranks(Processes())
    (first, seen_by_first), (second, seen_by_second) = in_ranks(2, tmp_path / "meeting", trained_in_ranks)
    assert seen_by_first == seen_by_second
    assert seen_by_first == pytest.approx(seen, rel=1e-2, abs=3 / 359)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        assert_near(x.norm(), alone[name].norm(), 1e-3, name)


def test_ids_and_autocast() -> None:
    """From a token cache nothing is mixed; bfloat16 comes near."""
    ids, labels = draw_ids(MAGEConfig.tiny(), 4).to(torch.uint16), torch.tensor([1, 2, 3, 4])
    losses = []
    for precision in ("fp32", "bf16"):
        step = step_of(built(0.0, 0.0), mixing=Mixing(), precision=precision)
        losses.append(step(ids, labels, rng_state=rng.new_state(0))["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    classifier = built(0.0, 0.0)
    wanted = F.cross_entropy(classifier(ids), labels, label_smoothing=0.1).item()
    assert losses[0] == pytest.approx(wanted, rel=1e-5)


def test_wrong_batches_change_nothing() -> None:
    classifier, (images, labels) = built(), data()
    step, before = step_of(classifier), values(classifier)
    for wrong, message in (
        (None, "got no labels"),
        (labels[:2], r"labels has shape \(2,\), wanted \(6,\)"),
        (labels.float(), "labels is float32"),
        (torch.full((6,), CLASSES), "labels holds 10"),
        (torch.full((6,), -1), "labels holds -1"),
    ):
        with pytest.raises(ValueError, match=message):
            step(images, wrong)
    with pytest.raises(ValueError, match="rng_state is on meta, wanted it on the CPU"):
        step(images, labels, rng_state=rng.new_state(0, device="meta"))
    with pytest.raises(ValueError, match="got no micro-batch"):
        step.accumulate([])
    for smoothing in (-0.1, 1.5):
        with pytest.raises(InputError, match=f"label_smoothing is {smoothing}"):
            step_of(classifier, label_smoothing=smoothing)
    assert all(torch.equal(x, before[name]) for name, x in values(classifier).items())
