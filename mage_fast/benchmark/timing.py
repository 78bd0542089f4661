"""Timing of several functions side by side: their rounds alternate, so that a slow minute slows all of them.

On a CPU a sample is one call by the wall clock. On CUDA a sample is the time between two events around one
call, with the second-level cache overwritten before it; the calls of a round wait behind a sleeping kernel,
so the host is ahead and the time is the GPU's own for plain launches. The same work replayed as a CUDA graph
is timed alongside where that is asked for. Whole steps are timed by the wall clock on every device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
#: Calls in a round of one function on CUDA.
CALLS = 5
FEWEST_ROUNDS, MOST_ROUNDS = 4, 400
#: More than the second-level cache of any GPU in use.
_FLUSHED_BYTES = 256 * 2**20
_CYCLES_A_SECOND = 2e9


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    samples_ms: tuple[float, ...]
    graph_samples_ms: tuple[float, ...] = ()
    #: Memory that a call needs beside its inputs; CUDA only.
    peak_mib: float | None = None
    #: Why the work was not replayed as a graph, though asked for.
    graph_error: str = ""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def graph_ms(self) -> float | None:
        return statistics.median(self.graph_samples_ms) if self.graph_samples_ms else None

    def quantile_ms(self, percent: int) -> float:
        ordered = sorted(self.samples_ms)
        return ordered[round((len(ordered) - 1) * percent / 100)]


def interleaved(
    runs: Mapping[str, Run], device: str, seconds: float, graphed: Iterable[str] = ()
) -> dict[str, Timing]:
    """Time each function for about ``seconds``; ``graphed`` are replayed as CUDA graphs too."""
    if device == "cuda":
        return _on_cuda(runs, seconds, graphed)
    for run in runs.values():  # first calls allocate
        run()
    slowest = max(_seconds(run) for run in runs.values())
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_rounds(seconds, slowest)):
        for name, run in runs.items():
            samples[name].append(1e3 * _seconds(run))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def by_the_clock(
    runs: Mapping[str, Run], device: str, seconds: float, fewest: int = FEWEST_ROUNDS
) -> dict[str, Timing]:
    """Time whole steps, host's share included: the wall clock until the device is done, a call a sample.

    Rounds go on for about ``seconds`` a function, ``fewest`` at least. First calls, which compile, allocate
    and capture, are the caller's.
    """
    on_cuda = device == "cuda"
    peaks = {name: _peak_mib(run) if on_cuda else None for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    rounds, end = 0, time.perf_counter() + seconds * len(runs)
    while rounds < fewest or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        for name, run in runs.items():
            if on_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if on_cuda:
                torch.cuda.synchronize()
            samples[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return {name: Timing(tuple(values), peak_mib=peaks[name]) for name, values in samples.items()}


def _rounds(seconds: float, round_seconds: float) -> int:
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(round_seconds, 1e-9))))


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_cuda(runs: Mapping[str, Run], seconds: float, graphed: Iterable[str]) -> dict[str, Timing]:
    peaks = {name: _peak_mib(run) for name, run in runs.items()}
    timed: dict[tuple[str, bool], Run] = {(name, False): run for name, run in runs.items()}
    errors = dict.fromkeys(runs, "")
    for name in graphed:
        try:
            timed[name, True] = captured(runs[name]).replay
        except RuntimeError as error:  # as of an op that waits for the device
            errors[name] = str(error).splitlines()[0]
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    host = {}
    for key, run in timed.items():
        run()
        torch.cuda.synchronize()
        host[key] = _seconds(run)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for key, run in timed.items():
        _cuda_round(run, flushed, host[key])
    rounds = _rounds(seconds * len(timed), time.perf_counter() - start)
    samples: dict[tuple[str, bool], list[float]] = {key: [] for key in timed}
    for _ in range(rounds):
        for key, run in timed.items():
            samples[key] += _cuda_round(run, flushed, host[key])
    return {
        name: Timing(
            tuple(samples[name, False]), tuple(samples.get((name, True), ())), peaks[name], errors[name]
        )
        for name in runs
    }


def _cuda_round(run: Run, flushed: torch.Tensor, host_seconds: float) -> list[float]:
    """Milliseconds of a few calls, queued while the GPU sleeps."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(0.05, 2 * CALLS * host_seconds + 1e-4) * _CYCLES_A_SECOND))
    for start, end in events:
        flushed.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _peak_mib(run: Run) -> float:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the work of one call.

    Raises:
        RuntimeError: the work cannot be captured, for instance as it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as capture asks: first calls elsewhere, so that nothing is set up in it
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
