"""Batches of images or tokens from a data source: shuffled, augmented, resumable to the bit.

The order of an epoch is a function of (seed, epoch), an item's augmentation one of (seed, epoch, index):
an iterator that starts in the middle of a run yields the batches that the unbroken run yields from there,
with any number of workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mage_fast.errors import InputError
from mage_fast.training.augment import Augmentation, augmented, item_generator, named, without_flip
from mage_fast.training.huggingface import HuggingFaceSource
from mage_fast.training.images import UnreadableImage
from mage_fast.training.sources import DigitsSource, FolderSource, Source, Split, TokenSource

KNOWN_SOURCES = "digits, folder:PATH, tokens:PATH, hf:NAME[:SPLIT]"

log = logging.getLogger(__name__)


def open_source(
    spec: str, *, image_size: int = 256, split: Split = "train", min_side: int = 1, verify: bool = True
) -> Source:
    """The data source that a string names: ``digits``, ``folder:PATH``, ``tokens:PATH``, ``hf:NAME[:SPLIT]``.

    Args:
        spec: the string.
        image_size: pixels along a side of the inputs that will be made; digits are scaled to it here.
        split: "train", "test" or "all"; see each source for what its splits are.
        min_side: images with a shorter side are skipped as damaged files are. The default takes all, as
            small images are scaled up.
        verify: check a token cache's checksums.

    Raises:
        InputError: an unknown source, a missing or empty folder, a damaged cache, a missing package.
    """
    if split not in ("train", "test", "all"):
        raise InputError(f"split is {split!r}, wanted train, test or all")
    if image_size < 1:
        raise InputError(f"image_size is {image_size}, wanted 1 or more")
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return DigitsSource(image_size=image_size, split=split)
    if kind == "folder":
        return FolderSource(rest, image_size=image_size, split=split, min_side=min_side)
    if kind == "tokens":
        return TokenSource(rest, split=split, verify=verify)
    if kind == "hf":
        return HuggingFaceSource(rest, image_size=image_size, split=split, min_side=min_side)
    raise InputError(f"unknown data source {spec!r}, wanted one of {KNOWN_SOURCES}")


class Batch(NamedTuple):
    """float32 images [B, 3, H, W] in [0, 1] or ids [B, L], uint16 or int32; labels; the items' indices."""

    inputs: Float[Tensor, "B 3 H W"] | Integer[Tensor, "B L"]
    labels: Int64[Tensor, " B"]
    indices: Int64[Tensor, " B"]


def steps_per_epoch(
    source: Source, batch_size: int, *, drop_last: bool = True, items: range | None = None
) -> int:
    """Batches an epoch, of the whole source or of some items.

    Raises:
        InputError: there would be none.
    """
    count = len(source) if items is None else len(items)
    steps = count // batch_size if drop_last else -(-count // batch_size)
    if steps < 1:
        raise InputError(f"{source.spec} has {count} items, wanted at least batch_size {batch_size}")
    return steps


def batches(
    source: Source,
    batch_size: int,
    *,
    image_size: int | None = None,
    items: range | None = None,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    epochs: int | None = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    augment: Augmentation | str = "eval",
    on_bad_file: Literal["substitute", "drop"] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Iterate over a source, from step ``start_step`` of epoch ``epoch``.

    A damaged image is found when it is first read. In training ("substitute", the default with ``shuffle``)
    the next readable image of the source stands in for it, so batches stay full; in evaluation ("drop")
    it is left out, so nothing counts twice. Either way the file is named in ``source.bad_files`` and
    logged once.

    Args:
        source: see :func:`open_source`.
        batch_size: items a batch.
        image_size: pixels along a side of the images made; the source's own by default.
        items: the part of the source to iterate over; all of it by default.
        seed: of order and augmentation, 0 or more.
        epoch: first epoch.
        start_step: first batch of that epoch; may exceed an epoch's length (then it counts on).
        epochs: epochs until the end, the first one included; None: without end.
        shuffle: a new order every epoch, or the source's own.
        drop_last: leave out an incomplete last batch.
        augment: an :class:`Augmentation` or the name of one; flips are left out where the source says so.
        on_bad_file: see above.
        workers: data-loading processes; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.

    Raises:
        InputError: at once: fewer items than a batch, an image smaller than a crop that does not resize.
            While iterating: no image of the source is readable.
    """
    image_size = image_size or source.image_size
    if min(batch_size, image_size) < 1 or min(seed, epoch, start_step, workers) < 0:
        raise InputError(
            f"batches: batch_size {batch_size}, image_size {image_size}, seed {seed}, epoch {epoch}, "
            f"start_step {start_step}, workers {workers}: wanted 1 or more twice, then 0 or more"
        )
    steps = steps_per_epoch(source, batch_size, drop_last=drop_last, items=items)
    augmentation = named(augment)
    if not source.can_flip:
        augmentation = without_flip(augmentation)
    if source.kind == "images" and not augmentation.resize:
        source.require_size(image_size)
    dataset = _Batches(
        source,
        image_size,
        seed,
        augmentation,
        drop=(on_bad_file or ("drop", "substitute")[shuffle]) == "drop",
    )
    order = _Order(
        items or range(len(source)),
        batch_size,
        steps=steps,
        first=epoch * steps + start_step,
        stop=None if epochs is None else (epoch + epochs) * steps,
        seed=seed if shuffle else None,
    )
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_own_process_group,
        generator=torch.Generator().manual_seed(seed),  # else an iterator would advance torch's global one
    )
    return _received(loader, source)


def training_batches(
    source: Source, batch_size: int, *, step: int = 0, **options: object
) -> Generator[Batch, None, None]:
    """Batches without end from global step ``step`` on; ``options`` as for :func:`batches`."""
    return batches(source, batch_size, start_step=step, epochs=None, **options)  # type: ignore[arg-type]


class _Order(Sampler[tuple[int, np.ndarray]]):
    """(epoch, indices of a batch), from global step ``first`` up to ``stop``."""

    def __init__(
        self, items: range, batch_size: int, *, steps: int, first: int, stop: int | None, seed: int | None
    ) -> None:
        self.items, self.batch_size, self.steps = items, batch_size, steps
        self.first, self.stop, self.seed = first, stop, seed

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        step, epoch = self.first, -1
        while self.stop is None or step < self.stop:
            if step // self.steps != epoch:
                epoch = step // self.steps
                order = np.arange(self.items.start, self.items.stop, self.items.step)
                if self.seed is not None:
                    order = order[np.random.default_rng((self.seed, epoch)).permutation(len(order))]
            start = step % self.steps * self.batch_size
            yield epoch, order[start : start + self.batch_size].copy()
            step += 1


class _Received(NamedTuple):
    """What a worker sends: a batch (or the error that ends the iteration) and the files it found damaged."""

    batch: Batch | InputError
    bad_files: dict[str, str]


@dataclass(eq=False)
class _Batches(Dataset[_Received]):
    """Makes the batch that an entry of :class:`_Order` asks for. Damaged files are known for each process
    by itself: which image stands in for one depends on the files alone, so no process needs to tell another.
    """

    source: Source
    image_size: int
    seed: int
    augmentation: Augmentation
    drop: bool
    bad: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, request: tuple[int, np.ndarray]) -> _Received:
        epoch, indices = request
        known = set(self.bad)
        try:
            batch: Batch | InputError = self._batch(epoch, indices)
        except InputError as error:
            batch = error  # sent as a value: DataLoader would wrap a worker's exception in its traceback
        found = {self.source.name(index): self.bad[index] for index in self.bad.keys() - known}
        return _Received(batch, found)

    def _batch(self, epoch: int, indices: np.ndarray) -> Batch:
        if self.source.kind == "tokens":
            inputs = torch.from_numpy(self.source.tokens(indices, epoch))
        else:
            images, used = [], []
            for index in indices.tolist():
                if (loaded := self._image(epoch, index)) is not None:
                    images.append(loaded[0])
                    used.append(loaded[1])
            indices = np.array(used, dtype=np.int64)
            stacked = np.stack(images) if images else np.empty((0, 3, self.image_size, self.image_size))
            inputs = torch.from_numpy(stacked.astype(np.float32) / np.float32(255))
        return Batch(inputs, torch.from_numpy(self.source.labels[indices]), torch.from_numpy(indices))

    def _image(self, epoch: int, index: int) -> tuple[np.ndarray, int] | None:
        """uint8 [3, H, W] and the index it came from: ``index``, or the next one that is readable."""
        generator = item_generator(self.seed, epoch, index)
        for offset in range(len(self.source)):
            candidate = (index + offset) % len(self.source)
            if candidate not in self.bad:
                try:
                    image = self.source.image(candidate)
                except UnreadableImage as error:
                    self.bad[candidate] = str(error)
                else:
                    image = augmented(
                        image,
                        self.image_size,
                        self.augmentation,
                        generator,
                        default_resize_ratio=self.source.resize_ratio,
                        name=self.source.name(candidate),
                    )
                    return np.asarray(image).transpose(2, 0, 1), candidate
            if self.drop:
                return None
        raise InputError(f"{self.source.spec}: none of its {len(self.source)} images is readable")


def _received(loader: DataLoader[_Received], source: Source) -> Generator[Batch, None, None]:
    """Batches out of what the workers send; damaged files are noted on the way, a sum of them at the end."""
    noted, received, yielded = len(source.bad_files), 0, 0
    try:
        for batch, bad_files in loader:
            received += 1
            for name, reason in bad_files.items():
                source.report_bad(name, reason)
            if isinstance(batch, InputError):
                raise batch
            if len(batch.labels):
                yielded += 1
                yield batch
        if received and not yielded:  # only bad files empty a batch
            raise InputError(f"{source.spec}: none of its {len(source)} images is readable")
    finally:
        if len(source.bad_files) > noted:
            names = ", ".join(list(source.bad_files)[:5]) + (", ..." if len(source.bad_files) > 5 else "")
            log.warning("%s: skipped %d files in all: %s", source.spec, len(source.bad_files), names)


def _unchanged(received: Any) -> Any:
    return received


def _own_process_group(_: int) -> None:
    """Ctrl-C in a terminal, or a scheduler's SIGTERM, reaches the whole process group: workers leave it, so
    that the training loop can finish its step and save before they go.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
