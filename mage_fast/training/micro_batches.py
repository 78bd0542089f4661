"""Micro-batches of a step over processes: which data each computes, and its random numbers.

A batch is cut into ``processes * accumulate`` equal micro-batches, of which process r of W computes numbers
r, r + W, ...: the same ones, in any order of processes and accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from mage_fast.kernels import rng
from mage_fast.training.data import Batch, training_batches
from mage_fast.training.distributed import Processes
from mage_fast.training.sources import Source
from mage_fast.training.step import MicroBatch


def step_batches(
    source: Source, batch_size: int, *, step: int, accumulate: int, processes: Processes, **options: object
) -> Iterator[list[Batch]]:
    """This process's data of each step from one on, without end.

    Args:
        source: of the data.
        batch_size: items a step over all processes.
        step: the first.
        accumulate: micro-batches that a process computes one after the other.
        processes: all of them.
        options: as for :func:`mage_fast.training.data.batches`.
    """
    split = processes.count * accumulate
    stream = training_batches(
        source,
        batch_size,
        step=step,
        split=split,
        shares=range(processes.rank, split, processes.count),
        pin_memory=processes.device.type == "cuda",
        **options,
    )
    try:
        while taken := list(islice(stream, accumulate)):
            yield taken
    finally:
        stream.close()


def with_random_states(
    batches: Sequence[Batch], *, seed: int, step: int, processes: Processes, labelled: bool = True
) -> list[MicroBatch]:
    """A process's micro-batches of a step, each with masks and dropout of a seed of its own."""
    return [
        MicroBatch(
            batch.inputs,
            batch.labels if labelled else None,
            rng.new_state(rng.split_seed(seed, processes.rank + processes.count * number), step),
        )
        for number, batch in enumerate(batches)
    ]
