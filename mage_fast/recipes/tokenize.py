"""``mage-fast tokenize``: images to a token cache, several augmented views each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.recipes.loading import Precision, load_tokenizer, precision_context
from mage_fast.tokenizer import VQGAN
from mage_fast.training.data import Batch, batches, open_source
from mage_fast.training.distributed import torchrun_processes
from mage_fast.training.logs import progress_bar
from mage_fast.training.processes import in_processes
from mage_fast.training.run import pick_device
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.sources import Source
from mage_fast.training.token_cache import TokenCacheWriter

#: Seconds that a rank waits for the slowest share of the work, however long that takes.
PATIENCE_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class TokenizeConfig:
    """Encode a data set once, so that training reads tokens at memory speed. Started again, it goes on."""

    #: Where the images are: digits, folder:PATH, webdataset:PATH or hf:NAME[:SPLIT].
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
    #: Images a file of the cache, the unit of work that an interruption costs.
    shard_size: int = 8192
    seed: int = 0
    #: Processes that encode, each its share of the shards, on all GPUs in turn. torchrun does as well.
    processes: int = 1
    #: Processes that decode images for each of these; 0 decodes in the same one.
    workers: int = 0
    device: str = "auto"
    precision: Precision = "fp32"


class Share(NamedTuple):
    """What a process tells of its shards."""

    #: Damaged files and why.
    bad_files: dict[str, str]
    #: Part of the first batch's ids that are those of float32; None in float32.
    agreement: float | None


def run(config: TokenizeConfig) -> dict[str, Any]:
    """Write the cache, or what is missing of it.

    A damaged image is named, counted, and stood in for by the next readable one, so that items keep their
    numbers and an interrupted run goes on where it stopped, with any number of processes.

    Returns:
        ``items`` and ``views`` of the cache; of what this run encoded, ``bad_files``, the number of damaged
        files, and with bf16 ``agreement_with_fp32``, the part of the first batch's ids that float32 chooses.

    Raises:
        InputError: an unknown source or augmentation, tokens as a source, a cache with other settings.
        ChildProcessError: one of the processes died.
    """
    for name in ("views", "batch_size", "processes"):
        if getattr(config, name) < 1:
            raise InputError(f"tokenize: {name} {getattr(config, name)}: wanted 1 or more")
    tokenizer, source = _opened(config, pick_device("cpu"))
    pick_device(config.device)
    # made once to check the augmentation and the images' sizes before the cache is begun
    for stream in _views(config, source, range(len(source))):
        stream.close()
    with torchrun_processes(torch.device("cpu"), PATIENCE_SECONDS) as group:
        rank, ranks = group.rank, group.count
        if ranks > 1 and config.processes > 1:
            raise InputError(f"tokenize: processes {config.processes}, but torchrun starts them: wanted 1")
        begun: list[Any] = [None, None]
        if rank == 0:
            begun[0] = _writer(config, tokenizer, source)
            begun[1] = begun[0].missing(len(source))
        if ranks > 1:
            torch.distributed.broadcast_object_list(begun)
        writer, missing = begun
        result = {"items": len(source), "views": config.views}
        if writer.complete:
            return result
        if ranks > 1:
            shares: list[Any] = [None] * ranks
            number = torch.distributed.get_node_local_rank()
            share = encode_shards(config, writer, missing[rank::ranks], number)
            torch.distributed.all_gather_object(shares, share)
        else:
            shares = _encode_all(config, writer, missing)
        if rank == 0:
            writer.close()
    result["bad_files"] = len(set().union(*(share.bad_files for share in shares)))
    agreements = [share.agreement for share in shares if share.agreement is not None]
    return result | ({"agreement_with_fp32": agreements[0]} if agreements else {})


def _encode_all(config: TokenizeConfig, writer: TokenCacheWriter, missing: list[int]) -> list[Share]:
    """Encode in this process, or in as many as there are to be."""
    processes = min(config.processes, len(missing))
    with progress_bar("tokenize", len(missing)) as done:
        if processes <= 1:
            return [encode_shards(config, writer, missing, done=done)]
        threads = max(1, torch.get_num_threads() // processes)
        calls = [(config, writer, missing[n::processes], n, threads) for n in range(processes)]
        return in_processes(encode_shards, calls, lambda: done(sum(map(writer.is_done, missing))))


def encode_shards(
    config: TokenizeConfig,
    writer: TokenCacheWriter,
    shards: list[int],
    number: int = 0,
    threads: int | None = None,
    done: Callable[[float], None] | None = None,
) -> Share:
    """Encode and write some shards, as process ``number`` of several, on ``threads`` threads.

    ``done`` is told, after every batch, how many shards are encoded.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", number % torch.cuda.device_count())
    tokenizer, source = _opened(config, device)
    agreement = None
    for before, shard in enumerate(shards):
        first = shard * config.shard_size
        items = range(first, min(first + config.shard_size, len(source)))
        ids, labels, encoded = [], [], 0
        views: Iterator[tuple[Batch, ...]] = zip(*_views(config, source, items), strict=True)
        for batch in views:
            ids.append(torch.stack([_encode(tokenizer, view.inputs, device, config) for view in batch], 1))
            labels.append(batch[0].labels)
            if config.precision != "fp32" and number == 0 and agreement is None:
                exact_BL = tokenizer.encode(batch[0].inputs.to(device)).cpu()
                agreement = (exact_BL == ids[0][:, 0]).double().mean().item()
            encoded += len(batch[0].labels)
            if done is not None:
                done(before + encoded / len(items))
        writer.write_shard(shard, torch.cat(ids), torch.cat(labels))
    return Share(source.bad_files, agreement)


def _opened(config: TokenizeConfig, device: torch.device) -> tuple[VQGAN, Source]:
    tokenizer = load_tokenizer(config.tokenizer, device)
    source = open_source(config.data, image_size=tokenizer.config.image_size, split=config.split)
    if source.kind != "images":
        raise InputError(f"tokenize: {config.data} holds tokens already, wanted images")
    return tokenizer, source


def _writer(config: TokenizeConfig, tokenizer: VQGAN, source: Source) -> TokenCacheWriter:
    return TokenCacheWriter(
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


def _views(config: TokenizeConfig, source: Source, items: range) -> list[Generator[Batch, None, None]]:
    """Every view of some images; batches do not cross shards, so a shard is the same whoever makes it."""
    return [
        batches(
            source,
            config.batch_size,
            items=items,
            seed=config.seed,
            epoch=view,
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
