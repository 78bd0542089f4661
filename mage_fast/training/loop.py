"""The training loop of every recipe: fetch, step, log, save, and stop cleanly."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mage_fast.errors import InputError, TrainingError
from mage_fast.training.distributed import Agreement, Processes
from mage_fast.training.logs import RunLogger
from mage_fast.training.throughput import Throughput

BatchT = TypeVar("BatchT")
Metrics = Mapping[str, float | Tensor]


@dataclass
class TrainResult:
    """How training ended: steps done in all, the signal that stopped it if one did, logged metrics."""

    step: int
    stopped_by: str | None = None
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    #: Steps of this process that changed nothing.
    skipped: int = 0


class Skips(NamedTuple):
    """Steps that change nothing, as their gradients are not finite: how one tells them, and how many are
    too many.
    """

    metric: str = "gradient_norm"
    most_in_a_row: int = 20


class Evaluation(Protocol):
    """Looks at the model every so many steps; of several processes, in all of them."""

    every_steps: int

    def __call__(self, step: int) -> Mapping[str, float]:
        """Metrics after so many steps."""


def train(
    step_fn: Callable[[BatchT, int], Metrics],
    *,
    total_steps: int,
    batches_from: Callable[[int], Iterator[BatchT]],
    save: Callable[[int], None],
    logger: RunLogger | None = None,
    start_step: int = 0,
    log_every: int = 10,
    save_every_steps: int | None = None,
    save_every_seconds: float = 600.0,
    finite: tuple[str, ...] = ("loss",),
    skips: Skips | None = None,
    throughput: Throughput | None = None,
    evaluation: Evaluation | None = None,
    processes: Processes | None = None,
) -> TrainResult:
    """Run ``step_fn`` from ``start_step`` to ``total_steps``.

    The first Ctrl-C or SIGTERM lets the current step end, saves and returns (``stopped_by`` says so); a
    second Ctrl-C stops at once. Metrics may be device tensors: they are read, and checked, only every
    ``log_every`` steps and before every save, so nothing else waits for the device. Of several processes all
    save, log, evaluate and stop after the same step, whichever of them got the signal.

    Args:
        step_fn: ``(batch, step) -> metrics``: forward, backward and optimiser step; ``step`` counts from 0.
        total_steps: steps of the whole run, the ones before ``start_step`` included.
        batches_from: batches from a step on, as :func:`mage_fast.training.data.training_batches`.
        save: writes the state after so many steps; called at the end, on a stop, and as below.
        logger: gets the mean of every metric over processes and the steps since the last log; the first step
            is logged.
        start_step: steps done before.
        log_every: steps between logs.
        save_every_steps: steps between saves; None: by time alone.
        save_every_seconds: seconds between saves.
        finite: metrics that stop the training when they are NaN or infinite.
        skips: which metric tells that a step was skipped, and how many may be; None: none are.
        throughput: measures steps and waiting; its windows are logged.
        evaluation: called every so many steps; what it gives is logged.
        processes: those that train together; by default this one alone.

    Raises:
        TrainingError: a metric of ``finite`` is not finite, too many steps in a row were skipped, a process
            is lost. Nothing is saved over the last good state.
        InputError: the batches end before ``total_steps``, ``log_every`` below 1.
    """
    if log_every < 1 or (save_every_steps is not None and save_every_steps < 1):
        raise InputError(
            f"train: log_every {log_every}, save_every_steps {save_every_steps}: wanted 1 or more"
        )
    result = TrainResult(step=start_step)
    if start_step >= total_steps:
        return result
    processes = processes or Processes()
    window = _Window(finite, skips, start_step, processes)
    saved_at, asked = time.monotonic(), False
    batches = batches_from(start_step)
    if throughput is not None:
        batches = throughput.batches(batches)
    agreement = Agreement(processes)
    try:
        with _StopSignals() as stop:
            for step in range(start_step, total_steps):
                try:
                    batch = next(batches)
                except StopIteration:
                    raise InputError(f"train: the batches end at step {step}, wanted {total_steps}") from None
                window.add(step, step_fn(batch, step))
                done = result.step = step + 1
                ask = processes.is_main and not asked and time.monotonic() - saved_at >= save_every_seconds
                asked = asked or ask
                number, by_time = agreement.exchange((stop.number, ask))
                save_now = (
                    bool(number or by_time)
                    or done == total_steps
                    or (save_every_steps is not None and done % save_every_steps == 0)
                )
                evaluate = evaluation is not None and done % evaluation.every_steps == 0
                if save_now or evaluate or done == start_step + 1 or done % log_every == 0:
                    agreement.wait()  # where a process is lost the device would be waited for in vain
                    result.last = window.close()
                    result.skipped += int(result.last.get("skipped", 0))
                    result.first = result.first or result.last
                    speed = {} if throughput is None else throughput.window()
                    with nullcontext() if throughput is None else throughput.paused():
                        found = evaluation(done) if evaluation is not None and evaluate else {}
                    if logger is not None:
                        logger.log(done, result.last | speed | dict(found))
                elif logger is not None:
                    logger.advance(done)
                if save_now:
                    with nullcontext() if throughput is None else throughput.paused():
                        save(done)
                    window.saved_step = done
                    saved_at, asked = time.monotonic(), False
                if number and done < total_steps:  # else it is done, and nothing was stopped
                    result.stopped_by = _name(int(number))
                    break
            agreement.settle()
    finally:
        if (close := getattr(batches, "close", None)) is not None:
            close()  # ends data-loading processes
    if result.stopped_by and logger is not None:
        logger.message(
            f"{result.stopped_by}: stopped after step {result.step} of {total_steps}; the state is saved, "
            "resume to go on"
        )
    return result


class _Window:
    """The metrics of the steps since the last log, on whatever device they are."""

    def __init__(
        self, finite: tuple[str, ...], skips: Skips | None, saved_step: int, processes: Processes
    ) -> None:
        self.finite, self.skips, self.saved_step, self.processes = finite, skips, saved_step, processes
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._in_a_row = 0

    def add(self, step: int, metrics: Metrics) -> None:
        self._pending.append(
            (step, {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()})
        )

    def close(self) -> dict[str, float]:
        """Mean of every metric over the window's steps, in one transfer a device, and over processes.

        Steps that were skipped count in ``skipped`` alone.
        """
        by_name: dict[str, list[float]] = {}
        error, skipped = None, 0
        for step, metrics in self._read():
            if self.skips is not None and not math.isfinite(metrics.get(self.skips.metric, 0.0)):
                skipped += 1
                self._in_a_row += 1
                if self._in_a_row >= self.skips.most_in_a_row:
                    raise TrainingError(
                        f"train: {self.skips.metric} was not finite in {self._in_a_row} steps in a row, the "
                        f"last one step {step}; {self._advice()}"
                    )
                for name in metrics:
                    by_name.setdefault(name, [])
                continue
            self._in_a_row = 0
            for name, value in metrics.items():
                by_name.setdefault(name, []).append(value)
                if name in self.finite and not math.isfinite(value) and error is None:
                    error = f"train: {name} is {value} at step {step}; {self._advice()}"
        means = [math.fsum(found) / len(found) if found else math.nan for found in by_name.values()]
        together = dict(zip(by_name, self.processes.mean(means), strict=True))
        if error is not None:
            raise TrainingError(error)
        for name in self.finite:
            if by_name.get(name) and not math.isfinite(together[name]):
                raise TrainingError(f"train: {name} of another process is not finite; {self._advice()}")
        return together | ({"skipped": float(skipped)} if self.skips is not None else {})

    def _read(self) -> list[tuple[int, dict[str, float]]]:
        values: dict[int, dict[str, float]] = {}
        tensors: dict[torch.device, list[tuple[int, str, Tensor]]] = {}
        for step, metrics in self._pending:
            values[step] = dict.fromkeys(metrics, math.nan)
            for name, value in metrics.items():
                if isinstance(value, Tensor):
                    tensors.setdefault(value.device, []).append((step, name, value.reshape(())))
                else:
                    values[step][name] = float(value)
        self._pending.clear()
        for entries in tensors.values():
            host = torch.stack([value for _, _, value in entries]).tolist()
            for (step, name, _), value in zip(entries, host, strict=True):
                values[step][name] = float(value)
        return list(values.items())

    def _advice(self) -> str:
        return (
            f"the last good state is that of step {self.saved_step}. "
            "A lower learning rate or a longer warm-up may help"
        )


class _StopSignals:
    """Notes the first SIGINT or SIGTERM instead of acting on it; a second SIGINT is a KeyboardInterrupt.

    Outside the main thread Python allows no handlers, so there signals act as usual.
    """

    #: Of the first signal; 0 for none.
    number = 0

    def __enter__(self) -> Self:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and dist.is_available() and dist.is_torchelastic_launched():
            # torchrun sends SIGTERM to all when one is lost: this process has yet to say which, and ends then
            self._previous.pop(signal.SIGTERM, None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
