"""``mage-fast tokenize``: images to a token cache, several augmented views each."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.recipes.loading import Precision, load_tokenizer, precision_context
from mage_fast.tokenizer import VQGAN
from mage_fast.training.data import Batch, batches, open_source, steps_per_epoch
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.sources import Source
from mage_fast.training.token_cache import TokenCacheWriter


@dataclass(frozen=True)
class TokenizeConfig:
    """Encode a data set once, so that training reads tokens at memory speed. Started again, it goes on."""

    #: Where the images are: digits, folder:PATH or hf:NAME[:SPLIT].
    data: str = "digits"
    #: A tokenizer's folder, a model's folder, or a published .pth.
    tokenizer: Path = Path("out/tokenizer")
    #: Folder of the cache; read it with --data tokens:PATH.
    out: Path = Path("out/tokens")
    split: Literal["train", "test", "all"] = "all"
    #: Augmented views of each image; epochs of training cycle through them.
    views: int = 1
    #: strong, weak, weak-no-flip, window or eval.
    augment: str = "eval"
    batch_size: int = 64
    #: Images a file of the cache.
    shard_size: int = 8192
    seed: int = 0
    #: Processes that decode images; 0 decodes in this one.
    workers: int = 0
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: TokenizeConfig) -> dict[str, int]:
    """Write the cache; returns how many items and views it holds and how many files were damaged.

    A damaged image is named, counted, and stood in for by the next readable one, so that items keep their
    numbers and an interrupted run goes on where it stopped.

    Raises:
        InputError: an unknown source or augmentation, tokens as a source, a cache with other settings.
    """
    if config.views < 1 or config.batch_size < 1:
        raise InputError(f"tokenize: views {config.views}, batch_size {config.batch_size}: wanted 1 or more")
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer, device)
    source = open_source(config.data, image_size=tokenizer.config.image_size, split=config.split)
    if source.kind != "images":
        raise InputError(f"tokenize: {config.data} holds tokens already, wanted images")
    # made once to check the augmentation and the images' sizes before the cache is begun
    for stream in _views(config, source, 0):
        stream.close()
    writer = TokenCacheWriter(
        config.out,
        length=tokenizer.grid_size**2,
        codebook_size=tokenizer.codebook_size,
        views=config.views,
        shard_size=config.shard_size,
        tokenizer_fingerprint=module_fingerprint(tokenizer),
        augmentation=f"{config.augment}, seed {config.seed}, {config.precision}, of {config.data}",
        class_names=source.class_names,
        split=config.split,
    )
    result = {"items": len(source), "views": config.views}
    if writer.complete:
        return result
    with writer:
        first, skip = divmod(writer.next_item, config.batch_size)
        steps = steps_per_epoch(source, config.batch_size, drop_last=False) - first
        views: Iterator[tuple[Batch, ...]] = zip(*_views(config, source, first), strict=True)
        for batch in progress(views, "tokenize", steps):
            ids_BKL = torch.stack([_encode(tokenizer, view.inputs, device, config) for view in batch], 1)
            writer.append(ids_BKL[skip:], batch[0].labels[skip:])
            skip = 0
    return {**result, "bad_files": len(source.bad_files)}


def _views(config: TokenizeConfig, source: Source, first: int) -> list[Generator[Batch, None, None]]:
    """Every view of every image, from batch ``first`` on."""
    return [
        batches(
            source,
            config.batch_size,
            seed=config.seed,
            epoch=view,
            start_step=first,
            shuffle=False,
            drop_last=False,
            augment=config.augment,
            on_bad_file="substitute",
            workers=config.workers,
        )
        for view in range(config.views)
    ]


def _encode(tokenizer: VQGAN, images: Tensor, device: torch.device, config: TokenizeConfig) -> Tensor:
    with precision_context(config.precision, device):
        return tokenizer.encode(images.to(device, non_blocking=True)).cpu()
