"""What a run tells: a progress bar for people, ``metrics.jsonl`` for programs, TensorBoard for curves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from mage_fast.files import atomic_path

METRICS_FILE = "metrics.jsonl"
ItemT = TypeVar("ItemT")


class RunLogger:
    """Logs of a run's folder, as a context manager.

    ``metrics.jsonl`` gets one JSON object a line (``step``, ``time`` in seconds since the epoch, the metrics,
    ``steps_per_second`` and, where known, ``samples_per_second``; a value that is not finite is null). A run
    resumed at ``start_step`` drops the lines after that step, so every step stands there once.

    Args:
        folder: made if missing.
        total_steps: end of the progress bar.
        description: text in front of it.
        start_step: steps done before; 0 starts the logs anew.
        samples_per_step: batch size over all devices, for the throughput.
        tensorboard: also write TensorBoard events (imported only then).
        console: where bar and messages go; standard error by default. Without a terminal there is no bar.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        description: str,
        *,
        start_step: int = 0,
        samples_per_step: int | None = None,
        tensorboard: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.start_step = start_step
        self.samples_per_step = samples_per_step
        self.console = console or Console(stderr=True)
        self._tensorboard = tensorboard
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(description, total=total_steps, completed=start_step, metrics="")

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS_FILE
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= self.start_step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._writer: Any = None
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self.start_step + 1)
        self._last = (self.start_step, time.monotonic())
        self._progress.start()
        return self

    def advance(self, step: int) -> None:
        """Move the bar to ``step`` steps done."""
        self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics at ``step`` steps done."""
        now = time.monotonic()
        steps_per_second = (step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = (step, now)
        values = dict(metrics) | {"steps_per_second": steps_per_second}
        shown = f"{steps_per_second:.3g} steps/s"
        if self.samples_per_step is not None:
            values["samples_per_second"] = steps_per_second * self.samples_per_step
            shown = f"{values['samples_per_second']:.4g} samples/s"
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": time.time()} | finite) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        loss = f"loss {metrics['loss']:.4f} " if "loss" in metrics else ""
        self._progress.update(self._task, completed=step, metrics=loss + shown)

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def progress(items: Iterable[ItemT], description: str, total: int | None = None) -> Iterable[ItemT]:
    """The items, with a progress bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, disable=not console.is_terminal)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar as :func:`progress` has it, as a function that takes how much is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


def _step(line: str) -> float:
    """The step of a metrics line; infinite for a line that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
