"""How fast training reads cached tokens, beside a plain copy of the same bytes.

    python -m benchmarks.token_cache [--items 1281167] [--views 1]

A cache of random tokens, 256 an image, is written to a temporary folder and opened with and without
verification. Then batches of shuffled items are read: by ``TokenCache.batch`` alone, and as training does,
through the data pipeline in one process. "copy" copies as many bytes from one place of the memory to another.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mage_fast.training.data import training_batches
from mage_fast.training.sources import TokenSource
from mage_fast.training.token_cache import TokenCache, TokenCacheWriter

LENGTH, CODES, SHARD = 256, 1024, 8192
BATCHES = (128, 4096)


def write(folder: Path, items: int, views: int) -> None:
    """A cache of random tokens."""
    generator = torch.Generator().manual_seed(0)
    writer = TokenCacheWriter(
        folder, length=LENGTH, codebook_size=CODES, views=views, shard_size=SHARD, split="train"
    )
    with writer:
        for number in writer.missing(items):
            count = min(SHARD, items - number * SHARD)
            ids = torch.randint(CODES, (count, views, LENGTH), generator=generator, dtype=torch.int16)
            writer.write_shard(number, ids, torch.zeros(count, dtype=torch.int64))


def milliseconds(call: Callable[[], object], seconds: float = 2.0) -> float:
    """Median of repeated calls."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_281_167, help="images; ImageNet's by default")
    parser.add_argument("--views", type=int, default=1)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.items, options.views)
        gigabytes = options.items * options.views * LENGTH * 2 / 1e9
        for verify in (True, False):
            seconds = milliseconds(lambda verify=verify: TokenCache(folder, verify=verify), 0) / 1000  # type: ignore[misc]
            console.print(
                f"open {gigabytes:.2f} GB, {'verified' if verify else 'unverified'}: {seconds:.3f} s"
            )
        source = TokenSource(name, verify=False)
        table = Table("batch", "read by", "ms", "million tokens/s", "GB/s", "of a copy's speed")
        for size in BATCHES:
            order = np.random.default_rng(0).permutation(options.items)
            starts = itertools.cycle(range(0, options.items - size + 1, size))
            pipeline = training_batches(source, size)
            memory = np.zeros((max(2, 2**28 // (size * LENGTH * 2)), size, LENGTH), np.uint16)
            target, places = np.empty_like(memory[0]), itertools.cycle(range(len(memory)))

            def cached(order: np.ndarray = order, starts: itertools.cycle = starts, size: int = size) -> None:
                source.cache.batch(order[(start := next(starts)) : start + size])

            ways: dict[str, Callable[[], object]] = {
                "copy": lambda t=target, m=memory, p=places: np.copyto(t, m[next(p)]),  # type: ignore[misc]
                "TokenCache.batch": cached,
                "training_batches": lambda p=pipeline: next(p),  # type: ignore[misc]
            }
            times = {name: milliseconds(call) for name, call in ways.items()}
            for name, ms in times.items():
                tokens = size * LENGTH / ms * 1000
                table.add_row(
                    *(str(size), name, f"{ms:.3f}", f"{tokens / 1e6:,.0f}", f"{tokens * 2 / 1e9:.2f}"),
                    f"{times['copy'] / ms:.2f}",
                )
        console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
