"""What a run tells: a bar for people, ``metrics.jsonl`` for programs, TensorBoard or a tracker for curves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import atomic_path
from mage_fast.training.metrics import to_uint8
from mage_fast.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
ItemT = TypeVar("ItemT")


class RunLogger:
    """Logs of a run's folder, as a context manager.

    ``metrics.jsonl`` gets one JSON object a line (``step``, ``time`` in seconds since the epoch, the metrics,
    ``steps_per_second`` and, where known, ``samples_per_second``; a value that is not finite is null). A run
    resumed at ``start_step`` drops the lines after that step, so every step stands there once; TensorBoard
    hides what it was told after that step, pictures too, and a tracker keeps it (:class:`Tracker`).

    With several ranks the first one logs; the others pass None in place of a logger.

    Args:
        folder: made if missing.
        total_steps: end of the progress bar.
        description: text in front of it.
        start_step: steps done before; 0 starts the logs anew.
        samples_per_step: batch size over all devices, for the throughput.
        tensorboard: also write TensorBoard events (imported only then).
        console: where bar and messages go; standard error by default. Without a terminal there is no bar.
        tracker: is told metrics and pictures too; begun and finished with the context.
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
        tracker: Tracker | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.start_step, self.total_steps = start_step, total_steps
        self.samples_per_step = samples_per_step
        self.console = console or Console(stderr=True)
        self._tensorboard = tensorboard
        self._tracker = tracker
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
        lines = path.read_text().splitlines() if path.exists() else []
        if self._tracker is not None:  # it may refuse: nothing is dropped before
            steps = [step for line in lines if (step := _step(line)) < math.inf]
            self._tracker.start(self.folder, self.start_step, int(max(steps, default=0)))
        if lines:
            kept = [line for line in lines if _step(line) <= self.start_step]
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
        if "images_per_second" in metrics:
            shown = f"{metrics['images_per_second']:.4g} images/s"
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": time.time()} | finite) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, values)
        loss = f"loss {metrics['loss']:.4f} " if "loss" in metrics else ""
        self._progress.update(self._task, completed=step, metrics=loss + shown)

    def image(
        self, name: str, step: int, picture: Path | str | Float[Tensor, "C H W"] | UInt8[Tensor, "C H W"]
    ) -> None:
        """Show a picture at ``step`` steps done: a file, or a tensor, RGB or grey, in [0, 1] or of bytes.

        Raises:
            InputError: a tensor of another shape.
            OSError: a file that is missing or no picture.
        """
        if self._writer is None and self._tracker is None:
            return
        pixels_HWC = _pixels(picture)
        if self._writer is not None:
            self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")
        if self._tracker is not None:
            self._tracker.image(name, step, pixels_HWC)

    def resumed(self, note: str = "") -> None:
        """Tell where a resumed run goes on; nothing of a new one."""
        if self.start_step:
            self.message(f"{self.folder}: resumed after step {self.start_step} of {self.total_steps}{note}")

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
        if self._tracker is not None:
            self._tracker.finish(failed=kind is not None)


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


def _pixels(picture: Path | str | Tensor) -> UInt8[np.ndarray, "H W 3"]:
    """Three equal channels for a grey picture."""
    if isinstance(picture, (str, Path)):
        with Image.open(picture) as image:
            return np.asarray(image.convert("RGB"))
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise InputError(
            f"RunLogger: picture has shape {tuple(picture.shape)}, wanted (1 or 3, height, width)"
        )
    levels_CHW = picture.cpu() if picture.dtype == torch.uint8 else to_uint8(picture)
    return levels_CHW.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
