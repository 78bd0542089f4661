"""The training loop of every recipe: fetch, step, log, save, and stop cleanly."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from mage_fast.errors import InputError, TrainingError
from mage_fast.training.logs import RunLogger

BatchT = TypeVar("BatchT")
Metrics = Mapping[str, float | Tensor]


@dataclass
class TrainResult:
    """How training ended: steps done in all, the signal that stopped it if one did, logged metrics."""

    step: int
    stopped_by: str | None = None
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


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
) -> TrainResult:
    """Run ``step_fn`` from ``start_step`` to ``total_steps``.

    The first Ctrl-C or SIGTERM lets the current step end, saves and returns (``stopped_by`` says so); a
    second Ctrl-C stops at once. Metrics may be device tensors: they are read, and checked, only every
    ``log_every`` steps and before every save, so nothing else waits for the device.

    Args:
        step_fn: ``(batch, step) -> metrics``: forward, backward and optimiser step; ``step`` counts from 0.
        total_steps: steps of the whole run, the ones before ``start_step`` included.
        batches_from: batches from a step on, as :func:`mage_fast.training.data.training_batches`.
        save: writes the state after so many steps; called at the end, on a stop, and as below.
        logger: gets the mean of every metric over the steps since the last log; the first step is logged.
        start_step: steps done before.
        log_every: steps between logs.
        save_every_steps: steps between saves; None: by time alone.
        save_every_seconds: seconds between saves.
        finite: metrics that stop the training when they are NaN or infinite. Add the gradient norm where no
            gradient scaler skips such steps.

    Raises:
        TrainingError: a metric of ``finite`` is not finite. Nothing is saved over the last good state.
        InputError: the batches end before ``total_steps``, ``log_every`` below 1.
    """
    if log_every < 1 or (save_every_steps is not None and save_every_steps < 1):
        raise InputError(
            f"train: log_every {log_every}, save_every_steps {save_every_steps}: wanted 1 or more"
        )
    result = TrainResult(step=start_step)
    if start_step >= total_steps:
        return result
    pending: list[tuple[int, dict[str, Any]]] = []
    saved_step, saved_at = start_step, time.monotonic()
    batches = batches_from(start_step)
    try:
        with _StopSignals() as stop:
            for step in range(start_step, total_steps):
                try:
                    batch = next(batches)
                except StopIteration:
                    raise InputError(f"train: the batches end at step {step}, wanted {total_steps}") from None
                metrics = step_fn(batch, step)
                pending.append(
                    (step, {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()})
                )
                done = result.step = step + 1
                save_now = (
                    stop.received is not None
                    or done == total_steps
                    or (save_every_steps is not None and done % save_every_steps == 0)
                    or time.monotonic() - saved_at >= save_every_seconds
                )
                if save_now or done == start_step + 1 or done % log_every == 0:
                    result.last = _means(pending, finite, saved_step)
                    result.first = result.first or result.last
                    pending.clear()
                    if logger is not None:
                        logger.log(done, result.last)
                elif logger is not None:
                    logger.advance(done)
                if save_now:
                    save(done)
                    saved_step, saved_at = done, time.monotonic()
                if stop.received is not None and saved_step == done:
                    result.stopped_by = stop.received
                    break
    finally:
        if (close := getattr(batches, "close", None)) is not None:
            close()  # ends data-loading processes
    if result.stopped_by and logger is not None:
        logger.message(
            f"{result.stopped_by}: stopped after step {result.step} of {total_steps}; the state is saved, "
            "resume to go on"
        )
    return result


def _means(
    pending: list[tuple[int, dict[str, Any]]], finite: tuple[str, ...], saved_step: int
) -> dict[str, float]:
    """Mean of every metric over the pending steps, in one transfer a device."""
    values: dict[tuple[int, str], float] = {}
    tensors: dict[torch.device, list[tuple[tuple[int, str], Tensor]]] = {}
    for step, metrics in pending:
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                tensors.setdefault(value.device, []).append(((step, name), value.reshape(())))
            else:
                values[step, name] = float(value)
    for entries in tensors.values():
        host = torch.stack([value for _, value in entries]).tolist()
        values |= {key: float(value) for (key, _), value in zip(entries, host, strict=True)}
    for (step, name), value in sorted(values.items()):
        if name in finite and not math.isfinite(value):
            raise TrainingError(
                f"train: {name} is {value} at step {step}; the last good state is that of step {saved_step}. "
                "A lower learning rate or a longer warm-up may help"
            )
    names = dict.fromkeys(name for _, metrics in pending for name in metrics)
    by_name = {name: [value for (_, other), value in values.items() if other == name] for name in names}
    return {name: math.fsum(found) / len(found) for name, found in by_name.items()}


class _StopSignals:
    """Notes the first SIGINT or SIGTERM instead of acting on it; a second SIGINT is a KeyboardInterrupt.

    Outside the main thread Python allows no handlers, so there signals act as usual.
    """

    received: str | None = None

    def __enter__(self) -> Self:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
