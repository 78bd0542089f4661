"""The published linear probe: a head trained by LARS on frozen features, computed anew or kept.

Shape suffixes: V views of an image, H blocks of the encoder, N images, B images a step, D features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mage_fast.errors import InputError
from mage_fast.probe import linear_head
from mage_fast.recipes.features import FeatureReader, Features
from mage_fast.recipes.pictures import curves
from mage_fast.training.augment import named
from mage_fast.training.data import training_batches
from mage_fast.training.lars import Lars
from mage_fast.training.loading import Order
from mage_fast.training.logs import METRICS_FILE, RunLogger
from mage_fast.training.loop import TrainResult, train
from mage_fast.training.run import Run
from mage_fast.training.schedule import cosine_lr, scaled_lr, set_lr
from mage_fast.training.sources import Source

BATCH_SIZE = 4096
#: For a batch of 256, by the encoder's width: ViT-L's is 1024.
BASE_LR, BASE_LR_WIDE = 0.1, 0.05
WIDE = 1024
#: Steps between logs, at most.
LOG_EVERY = 50


@dataclass(frozen=True)
class HeadChoices:
    """How the recipes cached and exact train; the paper's values by default."""

    #: Passes over the data.
    epochs: int = 90
    #: Epochs in which the learning rate rises.
    warmup_epochs: int = 10
    #: Images a step; 4096, or all there are, without.
    batch_size: int | None = None
    #: For a batch of 256, it scales with the batch; 0.1, as wide as ViT-L 0.05, without.
    base_lr: float | None = None
    #: Crops and flips of training images: strong (the paper), weak, weak-no-flip, window or eval.
    augment: str = "strong"
    #: cached: augmented views whose features are kept, shown in turn; 0: only those of the evaluation's crop.
    views: int = 0
    #: Of weights, order and crops.
    seed: int = 0

    def checked(self, width: int, images: int) -> HeadChoices:
        """With everything filled in, for features of ``width`` of so many images.

        Raises:
            InputError: a number out of range, an unknown augmentation.
        """
        named(self.augment)
        base_lr = BASE_LR_WIDE if width >= WIDE else BASE_LR
        choices = dataclasses.replace(
            self,
            batch_size=min(BATCH_SIZE, images) if self.batch_size is None else self.batch_size,
            base_lr=base_lr if self.base_lr is None else self.base_lr,
        )
        assert choices.batch_size is not None
        assert choices.base_lr is not None
        if (
            not 0 <= choices.warmup_epochs <= choices.epochs
            or choices.epochs < 1
            or choices.batch_size < 2
            or not 0 < choices.base_lr < math.inf
            or min(choices.views, choices.seed) < 0
        ):
            raise InputError(
                f"probe: head.epochs {choices.epochs}, warmup_epochs {choices.warmup_epochs}, batch_size "
                f"{choices.batch_size}, base_lr {choices.base_lr}, views {choices.views}, seed "
                f"{choices.seed}: wanted 0 <= warmup_epochs <= epochs, epochs 1 or more, "
                "batch_size 2 or more (its statistics are the BatchNorm's), base_lr above 0 and the others 0 "
                "or more"
            )
        if images < choices.batch_size:
            raise InputError(f"probe: {images} training images, wanted head.batch_size {choices.batch_size}")
        return choices


class HeadTraining:
    """Heads of one block or of every block, trained together: their gradients do not mix, so each takes the
    steps it would take alone.

    Args:
        choices: checked ones.
        heads: how many.
        width: features of an image.
        classes: that labels tell apart.
        images: of the training data.
        test: features and labels that accuracies are measured on.
        device: where it is computed.

    Raises:
        InputError: fewer images than a batch.
    """

    def __init__(
        self,
        choices: HeadChoices,
        heads: int,
        width: int,
        classes: int,
        images: int,
        test: Features,
        device: torch.device,
    ) -> None:
        assert choices.batch_size is not None
        assert choices.base_lr is not None
        self.choices, self.test, self.device = choices, test, device
        self.steps_an_epoch = images // choices.batch_size
        if self.steps_an_epoch < 1:
            raise InputError(
                f"probe: {images} training images, wanted at least batch_size {choices.batch_size}"
            )
        self.total_steps = choices.epochs * self.steps_an_epoch
        self.highest_lr = scaled_lr(choices.base_lr, choices.batch_size)
        made = (linear_head(width, classes, seed=choices.seed) for _ in range(heads))
        self.heads = nn.ModuleList(made).to(device)
        self.optimizer = Lars(self.heads.parameters(), self.highest_lr)
        self.every_steps = self.steps_an_epoch  # of its evaluation

    def run(self, folder: Path, settings: dict[str, Any], features_from: FeatureStream) -> TrainResult:
        """Train to the end, or to a stop; goes on with what ``folder`` holds.

        Raises:
            InputError: the folder holds another run.
            TrainingError: the loss is not finite.
        """
        state = Run(folder, settings, heads=self.heads, optimizer=self.optimizer)
        start = state.resume()
        if start >= self.total_steps:
            return TrainResult(start)
        self.heads.train()
        with RunLogger(
            folder,
            self.total_steps,
            "probe",
            start_step=start,
            samples_per_step=self.choices.batch_size,
            tensorboard=False,
        ) as logger:
            logger.resumed()
            result = train(
                self.step,
                total_steps=self.total_steps,
                batches_from=features_from,
                save=state.save,
                logger=logger,
                start_step=start,
                log_every=min(LOG_EVERY, self.steps_an_epoch),
                evaluation=self,
            )
        curves(folder / METRICS_FILE, folder / "curves.png")
        return result

    def step(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor | float]:
        """One step of every head; the loss is that of the last."""
        features_HBD, labels_B = batch
        lr = cosine_lr(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.choices.warmup_epochs * self.steps_an_epoch,
            base_lr=self.highest_lr,
        )
        set_lr(self.optimizer, lr)
        losses = [
            F.cross_entropy(head(x), labels_B) for head, x in zip(self.heads, features_HBD, strict=True)
        ]
        self.optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        self.optimizer.step()
        return {"loss": losses[-1].detach(), "lr": lr}

    def __call__(self, step: int) -> dict[str, float]:
        return {"linear_top1": self.accuracies()[-1]}

    @torch.no_grad()
    def accuracies(self) -> list[float]:
        """Top-1 accuracy in [0, 1] of each head on the test features."""
        labels_N = self.test.labels_N.to(self.device)
        self.heads.eval()
        found = [
            (head(x.to(self.device)).argmax(1) == labels_N).double().mean().item()
            for head, x in zip(self.heads, self.test.features_HND, strict=True)
        ]
        self.heads.train()
        return found


class FreshFeatures:
    """Features of a source's images, augmented anew each epoch: the exact recipe."""

    def __init__(self, reader: FeatureReader, source: Source, choices: HeadChoices) -> None:
        self.reader, self.source, self.choices = reader, source, choices

    def __call__(self, step: int) -> Iterator[tuple[Float[Tensor, "H B D"], Int64[Tensor, " B"]]]:
        """The batches from ``step`` on, without end."""
        assert self.choices.batch_size is not None
        batch_size, device = self.choices.batch_size, self.reader.model.head.bias.device
        # A step's images are read and encoded in parts: 4096 photographs and their activations are many GB.
        # The parts read are equal, be they small ones: those encoded are as large as they may be.
        largest = min(batch_size, self.reader.batch_size)
        size = next(size for size in range(largest, 0, -1) if batch_size % size == 0)
        split, together = batch_size // size, self.reader.batch_size // size
        stream = training_batches(
            self.source,
            batch_size,
            step=step,
            split=split,
            shares=range(split),
            seed=self.choices.seed,
            augment=self.choices.augment,
            workers=self.reader.workers,
            pin_memory=device.type == "cuda",
        )
        try:
            while True:
                features, labels = [], []
                for first in range(0, split, together):
                    parts = list(islice(stream, min(together, split - first)))
                    inputs = [part.inputs.to(device, non_blocking=True) for part in parts]
                    features.append(self.reader.encode(torch.cat(inputs)))
                    labels += [part.labels for part in parts]
                yield torch.cat(features, 1), torch.cat(labels).to(device, non_blocking=True)
        finally:
            stream.close()


class KeptFeatures:
    """The same batches out of features that were computed once, the V views of an image in turn.

    Epoch e shows view ``e mod V``, in the order of the exact recipe's epoch e: with as many views as epochs
    it is that recipe.
    """

    def __init__(self, views: list[Features], choices: HeadChoices, device: torch.device) -> None:
        self.views, self.choices, self.device = views, choices, device

    def __call__(self, step: int) -> Iterator[tuple[Float[Tensor, "H B D"], Int64[Tensor, " B"]]]:
        """The batches from ``step`` on, without end."""
        assert self.choices.batch_size is not None
        labels_N, batch_size = self.views[0].labels_N, self.choices.batch_size
        order = Order(
            range(len(labels_N)),
            batch_size,
            steps=len(labels_N) // batch_size,
            first=step,
            stop=None,
            seed=self.choices.seed,
        )
        for epoch, indices in order:
            chosen_B = torch.from_numpy(indices)
            features_HND = self.views[epoch % len(self.views)].features_HND
            parts = features_HND[:, chosen_B], labels_N[chosen_B]
            yield parts[0].to(self.device, non_blocking=True), parts[1].to(self.device, non_blocking=True)


FeatureStream = FreshFeatures | KeptFeatures
