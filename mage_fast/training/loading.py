"""What data-loading processes do: the order of an epoch, and the batch that a piece of it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mage_fast.errors import InputError
from mage_fast.training.augment import Augmentation, Crop, applied, drawn, item_generator, rand_augmented
from mage_fast.training.images import UnreadableImage, whole_jpeg_size
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


class Item(NamedTuple):
    """An image of a batch: its views, uint8 [V, 3, H, W], or a whole JPEG file and what to cut out of it."""

    content: np.ndarray | bytes
    crops: list[Crop]
    #: Which item of the source it shows, and which one was asked for.
    shown: int
    requested: int


class Undecoded(NamedTuple):
    """A batch with JPEG files that are decoded elsewhere."""

    epoch: int
    items: list[Item]


class Received(NamedTuple):
    """What a worker sends: a batch (or the error that ends the iteration) and the files it found damaged."""

    batch: Batch | Undecoded | InputError
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
    #: Leave JPEG files to be decoded elsewhere.
    encoded: bool = False
    bad: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Received:
        return self.noting_bad_files(lambda: self._batch(*request))

    def noting_bad_files(self, make: Callable[[], Batch | Undecoded]) -> Received:
        """What ``make`` returns, and the files that it found damaged."""
        known = set(self.bad)
        try:
            batch: Batch | Undecoded | InputError = make()
        except InputError as error:
            batch = error  # sent as a value: DataLoader would wrap a worker's exception in its traceback
        found = {self.source.name(index): self.bad[index] for index in self.bad.keys() - known}
        return Received(batch, found)

    def _batch(self, epoch: int, indices: np.ndarray) -> Batch | Undecoded:
        if self.source.kind == "tokens":
            views = [self.source.tokens(indices, epoch * self.views + view) for view in range(self.views)]
            return self.batch(torch.from_numpy(np.stack(views)), indices)
        loaded = [self.item(epoch, index, encoded=self.encoded) for index in indices.tolist()]
        items = [item for item in loaded if item is not None]
        if self.encoded:
            return Undecoded(epoch, items)
        shape = (self.views, len(items), 3, self.image_size, self.image_size)
        stacked = np.stack([item.content for item in items], axis=1) if items else np.empty(shape)
        images = torch.from_numpy(stacked.astype(np.float32) / np.float32(255))
        return self.batch(images, [item.shown for item in items])

    def batch(self, inputs: Tensor, indices: Sequence[int] | np.ndarray) -> Batch:
        """A batch of ``inputs`` [V, B, ...], with the labels of the items."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = torch.from_numpy(self.source.labels[chosen])
        return Batch(inputs if self.views > 1 else inputs[0], labels, torch.from_numpy(chosen))

    def item(self, epoch: int, index: int, *, encoded: bool = False) -> Item | None:
        """Item ``index``, or the next one that is readable; None for a damaged one that is left out."""
        for offset in range(len(self.source)):
            candidate = (index + offset) % len(self.source)
            if candidate not in self.bad:
                try:
                    return self._loaded(epoch, index, candidate, encoded=encoded)
                except UnreadableImage as error:
                    self.bad[candidate] = str(error)
            if self.drop:
                return None
        raise InputError(f"{self.source.spec}: none of its {len(self.source)} images is readable")

    def _loaded(self, epoch: int, index: int, candidate: int, *, encoded: bool) -> Item:
        if encoded:
            content = self.source.encoded(candidate)
            size = whole_jpeg_size(content)
            if size is not None and min(size) >= self.source.min_side:
                return Item(content, self._crops(size, epoch, index, candidate), candidate, index)
        image = self.source.image(candidate)
        crops = self._crops(image.size, epoch, index, candidate)
        views = [np.asarray(self._applied(image, crop)).transpose(2, 0, 1) for crop in crops]
        return Item(np.stack(views), crops, candidate, index)

    def _applied(self, image: Image.Image, crop: Crop) -> Image.Image:
        image = applied(image, crop, self.image_size)
        words = self.augmentation.rand_augment
        return image if words is None else rand_augmented(image, words, crop.seed)

    def _crops(self, size: tuple[int, int], epoch: int, index: int, candidate: int) -> list[Crop]:
        return [
            drawn(
                size,
                self.image_size,
                self.augmentation,
                item_generator(self.seed, epoch, index, view),
                default_resize_ratio=self.source.resize_ratio,
                name=self.source.name(candidate),
            )
            for view in range(self.views)
        ]
