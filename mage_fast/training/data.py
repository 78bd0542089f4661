"""Batches of images or tokens from a data source: shuffled, augmented, resumable to the bit.

The order of an epoch is a function of (seed, epoch), an item's augmentation one of (seed, epoch, index):
an iterator that starts in the middle of a run yields the batches that the unbroken run yields from there,
with any number of workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from mage_fast.errors import InputError
from mage_fast.training.augment import Augmentation, check_rand_augment, named, without_flip
from mage_fast.training.device_augment import Decoder, decoded
from mage_fast.training.huggingface import HuggingFaceSource
from mage_fast.training.loading import Batch, Batches, Order, Received, Undecoded
from mage_fast.training.sources import (
    DigitsSource,
    FolderSource,
    Source,
    Split,
    TokenSource,
    summary_of_bad_files,
)
from mage_fast.training.webdataset import WebDatasetSource

KNOWN_SOURCES = "digits, folder:PATH, webdataset:PATH, tokens:PATH, hf:NAME[:SPLIT]"

log = logging.getLogger(__name__)


def open_source(
    spec: str, *, image_size: int = 256, split: Split = "train", min_side: int = 1, verify: bool = True
) -> Source:
    """The data source that a string names, one of ``KNOWN_SOURCES``.

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
    if kind == "webdataset":
        return WebDatasetSource(rest, image_size=image_size, split=split, min_side=min_side)
    if kind == "tokens":
        return TokenSource(rest, split=split, verify=verify)
    if kind == "hf":
        return HuggingFaceSource(rest, image_size=image_size, split=split, min_side=min_side)
    raise InputError(f"unknown data source {spec!r}, wanted one of {KNOWN_SOURCES}")


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
    views: int = 1,
    split: int = 1,
    shares: Sequence[int] = (0,),
    on_bad_file: Literal["substitute", "drop"] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    decoder: Decoder | None = None,
) -> Generator[Batch, None, None]:
    """Iterate over a source, from step ``start_step`` of epoch ``epoch``.

    A damaged image is found when it is first read. In training ("substitute", the default with ``shuffle``)
    the next readable image of the source stands in for it, so batches stay full; in evaluation ("drop")
    it is left out, so nothing counts twice. Either way the file is named in ``source.bad_files`` and
    logged once.

    Processes that train together each take their part of every batch: it is cut into ``split`` equal
    micro-batches, of which this process yields the ``shares``, so a step is ``len(shares)`` batches here.
    What an epoch holds, and in which order, does not depend on it. An incomplete last batch is cut into
    micro-batches of the same size, which end with a short one; an empty one is left out.

    Args:
        source: see :func:`open_source`.
        batch_size: items a batch, over all processes.
        image_size: pixels along a side of the images made; the source's own by default.
        items: the part of the source to iterate over; all of it by default.
        seed: of order and augmentation, 0 or more.
        epoch: first epoch.
        start_step: first batch of that epoch; may exceed an epoch's length (then it counts on).
        epochs: epochs until the end, the first one included; None: without end.
        shuffle: a new order every epoch, or the source's own.
        drop_last: leave out an incomplete last batch.
        augment: an :class:`Augmentation` or the name of one; flips are left out where the source says so.
        views: crops of every image, drawn independently; above 1, ``inputs`` has an axis of them in front,
            and the first is the one of ``views=1``. A token cache of K views shows views
            ``(epoch * views + v) mod K``.
        split: equal micro-batches that every batch is cut into.
        shares: numbers of those that are yielded, in this order.
        on_bad_file: see above.
        workers: data-loading processes; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.
        decoder: decode JPEG files, crop and resize on its device, where ``inputs`` then are; by default
            the loading processes do it with Pillow. See :mod:`mage_fast.training.device_augment`.

    Raises:
        InputError: at once: fewer items than a batch, an image smaller than a crop that does not resize,
            a batch that ``split`` does not divide, shares outside ``split``, more views than a cache has,
            a decoder for a source without image files or with RandAugment, which timm does not have or does
            not understand.
            While iterating: no image of the source is readable.
    """
    image_size = image_size or source.image_size
    if min(batch_size, image_size, views, split) < 1 or min(seed, epoch, start_step, workers) < 0:
        raise InputError(
            f"batches: batch_size {batch_size}, image_size {image_size}, views {views}, split {split}, "
            f"wanted 1 or more; seed {seed}, epoch {epoch}, start_step {start_step}, workers {workers}, "
            "wanted 0 or more"
        )
    if batch_size % split:
        raise InputError(f"batches: batch_size is {batch_size}, wanted a multiple of split {split}")
    if not shares or not all(0 <= share < split for share in shares):
        raise InputError(f"batches: shares are {list(shares)}, wanted numbers from 0 to {split - 1}")
    steps = steps_per_epoch(source, batch_size, drop_last=drop_last, items=items)
    augmentation = named(augment)
    if not source.can_flip:
        augmentation = without_flip(augmentation)
    if source.kind == "images" and not augmentation.resize:
        source.require_size(image_size)
    source.require_views(views)
    if decoder is not None and not source.has_files:
        raise InputError(f"batches: {source.spec} has no image files that a decoder could decode")
    if augmentation.rand_augment is not None and source.kind == "images":
        if decoder is not None:
            raise InputError("batches: rand_augment with a decoder, wanted one of them: it is Pillow's work")
        check_rand_augment(augmentation.rand_augment)
    dataset = Batches(
        source,
        image_size,
        seed,
        augmentation,
        views,
        drop=(on_bad_file or ("drop", "substitute")[shuffle]) == "drop",
        encoded=decoder is not None,
    )
    order = Order(
        items or range(len(source)),
        batch_size,
        steps=steps,
        first=epoch * steps + start_step,
        stop=None if epochs is None else (epoch + epochs) * steps,
        seed=seed if shuffle else None,
        split=split,
        shares=shares,
    )
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory and decoder is None,  # its batches are on the device already
        worker_init_fn=_own_process_group,
        generator=torch.Generator().manual_seed(seed),  # else an iterator would advance torch's global one
    )
    return _received(loader, dataset, decoder, alone=split == 1)


def training_batches(
    source: Source, batch_size: int, *, step: int = 0, **options: object
) -> Generator[Batch, None, None]:
    """Batches without end from global step ``step`` on, ``len(shares)`` a step; ``options`` as for
    :func:`batches`.
    """
    return batches(source, batch_size, start_step=step, epochs=None, **options)  # type: ignore[arg-type]


def _received(
    loader: DataLoader[Received], dataset: Batches, decoder: Decoder | None, *, alone: bool
) -> Generator[Batch, None, None]:
    """Batches out of what the workers send; damaged files are noted on the way, a sum of them at the end."""
    source = dataset.source
    noted, received, yielded = source.bad_count, 0, 0
    try:
        for batch, bad_files in loader:
            received += 1
            if isinstance(batch, Undecoded):
                assert decoder is not None
                batch, more = decoded(batch, dataset, decoder)
                bad_files |= more
            for name, reason in bad_files.items():
                source.report_bad(name, reason)
            if isinstance(batch, InputError):
                raise batch
            if len(batch.labels):
                yielded += 1
                yield batch
        # Only bad files empty a batch. One process of several may meet nothing else; the others go on.
        if received and not yielded and alone:
            raise InputError(f"{source.spec}: none of its {len(source)} images is readable")
    finally:
        if source.bad_count > noted:
            log.warning("%s: skipped %s", source.spec, summary_of_bad_files(source.bad_files))


def _unchanged(received: Any) -> Any:
    return received


def _own_process_group(_: int) -> None:
    """Ctrl-C in a terminal, or a scheduler's SIGTERM, reaches the whole process group: workers leave it, so
    that the training loop can finish its step and save before they go.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
