"""Functions run by several processes of one group, on the CPU, as torchrun's processes would run them."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mage_fast.training.distributed import Processes
from mage_fast.training.processes import in_processes

#: Processes forked from one that has imported everything: starting one takes seconds else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mage_fast.recipes.pretrain", "sklearn.datasets", "pytest", "hypothesis"])


def in_ranks(
    count: int, meeting: Path, function: Callable[..., Any], *arguments: Any, seconds: float = 300.0
) -> list[Any]:
    """``function(processes, *arguments)`` in ``count`` ranks; what each returned.

    ``meeting`` is a new file; a rank is waited for so many seconds.
    """
    calls = [(function, rank, count, str(meeting), seconds, arguments) for rank in range(count)]
    with mock.patch("mage_fast.training.processes.get_context", return_value=FORKS):
        return [torch.load(io.BytesIO(found)) for found in in_processes(_rank, calls)]


def _rank(
    function: Callable[..., Any], rank: int, count: int, meeting: str, seconds: float, arguments: tuple
) -> bytes:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, count)
    group = dist.PrefixStore("group", store)
    dist.init_process_group(
        "gloo", store=group, rank=rank, world_size=count, timeout=timedelta(seconds=seconds)
    )
    processes = Processes(rank, count, store=dist.PrefixStore("words", store))
    try:
        with processes.naming_the_lost():
            found = io.BytesIO()  # tensors themselves would be shared with a process that ends
            torch.save(function(processes, *arguments), found)
            return found.getvalue()
    finally:
        dist.destroy_process_group()
