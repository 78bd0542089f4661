"""What data-loading processes do: the order of an epoch, and the batch that a piece of it becomes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mage_fast.errors import InputError
from mage_fast.training.augment import Augmentation, augmented, item_generator
from mage_fast.training.images import UnreadableImage
from mage_fast.training.sources import Source


class Batch(NamedTuple):
    """float32 images [B, 3, H, W] in [0, 1] or ids [B, L], uint16 or int32; labels; the items' indices.

    With more than one view ``inputs`` is [V, B, 3, H, W] or [V, B, L].
    """

    inputs: Float[Tensor, "*V B 3 H W"] | Integer[Tensor, "*V B L"]
    labels: Int64[Tensor, " B"]
    indices: Int64[Tensor, " B"]


class Order(Sampler[tuple[int, np.ndarray]]):
    """(epoch, indices of a micro-batch), from global step ``first`` up to ``stop``."""

    def __init__(
        self,
        items: range,
        batch_size: int,
        *,
        steps: int,
        first: int,
        stop: int | None,
        seed: int | None,
        split: int = 1,
        shares: Sequence[int] = (0,),
    ) -> None:
        self.items, self.batch_size, self.steps = items, batch_size, steps
        self.first, self.stop, self.seed = first, stop, seed
        self.size, self.shares = batch_size // split, tuple(shares)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        step, epoch = self.first, -1
        while self.stop is None or step < self.stop:
            if step // self.steps != epoch:
                epoch = step // self.steps
                order = np.arange(self.items.start, self.items.stop, self.items.step)
                if self.seed is not None:
                    order = order[np.random.default_rng((self.seed, epoch)).permutation(len(order))]
            for share in self.shares:
                start = step % self.steps * self.batch_size + share * self.size
                if start < len(order):
                    yield epoch, order[start : start + self.size].copy()
            step += 1


class Received(NamedTuple):
    """What a worker sends: a batch (or the error that ends the iteration) and the files it found damaged."""

    batch: Batch | InputError
    bad_files: dict[str, str]


@dataclass(eq=False)
class Batches(Dataset[Received]):
    """Makes the batch that an entry of :class:`Order` asks for. Damaged files are known for each process
    by itself: which image stands in for one depends on the files alone, so no process needs to tell another.
    """

    source: Source
    image_size: int
    seed: int
    augmentation: Augmentation
    views: int
    drop: bool
    bad: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Received:
        epoch, indices = request
        known = set(self.bad)
        try:
            batch: Batch | InputError = self._batch(epoch, indices)
        except InputError as error:
            batch = error  # sent as a value: DataLoader would wrap a worker's exception in its traceback
        found = {self.source.name(index): self.bad[index] for index in self.bad.keys() - known}
        return Received(batch, found)

    def _batch(self, epoch: int, indices: np.ndarray) -> Batch:
        if self.source.kind == "tokens":
            views = [self.source.tokens(indices, epoch * self.views + view) for view in range(self.views)]
            inputs = torch.from_numpy(np.stack(views))
        else:
            images, used = [], []
            for index in indices.tolist():
                if (loaded := self._images(epoch, index)) is not None:
                    images.append(loaded[0])
                    used.append(loaded[1])
            indices = np.array(used, dtype=np.int64)
            shape = (self.views, len(images), 3, self.image_size, self.image_size)
            stacked = np.stack(images, axis=1) if images else np.empty(shape)
            inputs = torch.from_numpy(stacked.astype(np.float32) / np.float32(255))
        if self.views == 1:
            inputs = inputs[0]
        return Batch(inputs, torch.from_numpy(self.source.labels[indices]), torch.from_numpy(indices))

    def _images(self, epoch: int, index: int) -> tuple[np.ndarray, int] | None:
        """uint8 [V, 3, H, W] and the index it came from: ``index``, or the next one that is readable."""
        for offset in range(len(self.source)):
            candidate = (index + offset) % len(self.source)
            if candidate not in self.bad:
                try:
                    image = self.source.image(candidate)
                except UnreadableImage as error:
                    self.bad[candidate] = str(error)
                else:
                    views = [
                        augmented(
                            image,
                            self.image_size,
                            self.augmentation,
                            item_generator(self.seed, epoch, index, view),
                            default_resize_ratio=self.source.resize_ratio,
                            name=self.source.name(candidate),
                        )
                        for view in range(self.views)
                    ]
                    return np.stack([np.asarray(view).transpose(2, 0, 1) for view in views]), candidate
            if self.drop:
                return None
        raise InputError(f"{self.source.spec}: none of its {len(self.source)} images is readable")
