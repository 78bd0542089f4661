"""The loop and its logs: signals, saving, non-finite losses, resuming."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from mage_fast.errors import InputError, TrainingError
from mage_fast.training.logs import RunLogger
from mage_fast.training.loop import train


def counting(step: int) -> Iterator[int]:
    return itertools.count(step)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_runs_once_in_order_and_metrics_are_means(tmp_path: Path) -> None:
    seen, saves = [], []

    def step_fn(batch: int, step: int) -> dict[str, float | Tensor]:
        seen.append((batch, step))
        return {"loss": torch.tensor(float(step), requires_grad=True) * 1, "lr": 0.5}

    with RunLogger(tmp_path, 10, "test", samples_per_step=8) as logger:
        result = train(
            step_fn,
            total_steps=10,
            batches_from=counting,
            save=saves.append,
            logger=logger,
            log_every=4,
            save_every_steps=6,
        )
    assert seen == [(step, step) for step in range(10)]
    assert saves == [6, 10]
    assert (result.step, result.stopped_by) == (10, None)
    logged = lines(tmp_path)
    assert [(line["step"], line["loss"]) for line in logged] == [
        (1, 0),
        (4, 2),
        (6, 4.5),
        (8, 6.5),
        (10, 8.5),
    ]
    assert all(line["lr"] == 0.5 and line["samples_per_second"] > 0 for line in logged)
    assert (result.first["loss"], result.last["loss"]) == (0, 8.5)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_tensors_are_read_only_when_logged() -> None:
    class Watched(torch.Tensor):
        reads = 0

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__):
                cls.reads += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    reads = []

    def step_fn(_: int, step: int) -> dict[str, float | Tensor]:
        reads.append(Watched.reads)
        return {"loss": torch.tensor(1.0).as_subclass(Watched), "other": torch.tensor(2).as_subclass(Watched)}

    train(step_fn, total_steps=9, batches_from=counting, save=lambda _: None, log_every=4)
    assert reads == [0, 1, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_loss_that_is_not_finite_stops_without_saving(bad: float, as_tensor: bool) -> None:
    saves: list[int] = []

    def step_fn(_: int, step: int) -> dict[str, float | Tensor]:
        loss = bad if step == 7 else 1.0
        return {"loss": torch.tensor(loss) if as_tensor else loss, "harmless": math.nan}

    with pytest.raises(TrainingError, match=rf"loss is {bad} at step 7; .* state is that of step 6"):
        train(
            step_fn,
            total_steps=20,
            batches_from=counting,
            save=saves.append,
            log_every=100,
            save_every_steps=3,
        )
    assert saves == [3, 6]
    with pytest.raises(TrainingError, match="harmless is nan at step 0"):
        train(step_fn, total_steps=20, batches_from=counting, save=saves.append, finite=("loss", "harmless"))
    assert saves == [3, 6]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_finishes_the_step_saves_and_returns(
    tmp_path: Path, number: signal.Signals, name: str
) -> None:
    finished, saves, closed = [], [], []
    before = signal.getsignal(number)

    def step_fn(_: int, step: int) -> dict[str, float]:
        if step == 4:
            os.kill(os.getpid(), number)
        finished.append(step)
        return {"loss": 1.0}

    def batches_from(step: int) -> Iterator[int]:
        try:
            yield from itertools.count(step)
        finally:
            closed.append(True)

    text = io.StringIO()
    with RunLogger(tmp_path, 100, "test", tensorboard=False, console=Console(file=text, width=200)) as logger:
        result = train(step_fn, total_steps=100, batches_from=batches_from, save=saves.append, logger=logger)
    assert finished == [0, 1, 2, 3, 4]
    assert saves == [5]
    assert (result.step, result.stopped_by, closed) == (5, name, [True])
    assert text.getvalue() == (f"{name}: stopped after step 5 of 100; the state is saved, resume to go on\n")
    assert signal.getsignal(number) is before
    result = train(step_fn, total_steps=7, batches_from=batches_from, save=saves.append, start_step=5)
    assert finished == [0, 1, 2, 3, 4, 5, 6]
    assert saves == [5, 7]
    finished.clear()  # in the last of all steps a signal has nothing to stop
    result = train(step_fn, total_steps=5, batches_from=batches_from, save=saves.append)
    assert (finished, result.step, result.stopped_by) == ([0, 1, 2, 3, 4], 5, None)


def test_a_second_interrupt_stops_at_once(request: pytest.FixtureRequest) -> None:
    # Python's own handler, which is not there where a shell runs the suite in its background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    saves: list[int] = []

    def step_fn(_: int, step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        train(step_fn, total_steps=5, batches_from=counting, save=saves.append)
    assert not saves
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_works_outside_the_main_thread() -> None:
    saves: list[int] = []
    thread = threading.Thread(
        target=train,
        args=(lambda batch, step: {"loss": 1.0},),
        kwargs={"total_steps": 3, "batches_from": counting, "save": saves.append},
    )
    thread.start()
    thread.join()
    assert saves == [3]


def test_saving_by_time_and_an_early_end_of_the_batches() -> None:
    saves: list[int] = []
    options: dict[str, Any] = {"save": saves.append, "save_every_seconds": 0.0}
    train(lambda batch, step: {"loss": 1.0}, total_steps=3, batches_from=counting, **options)
    assert saves == [1, 2, 3]
    with pytest.raises(InputError, match="the batches end at step 2, wanted 3"):
        train(
            lambda batch, step: {"loss": 1.0}, total_steps=3, batches_from=lambda _: iter([1, 2]), **options
        )
    saves.clear()
    result = train(
        lambda batch, step: {"loss": 1.0}, total_steps=3, start_step=3, batches_from=counting, **options
    )
    assert (result.step, saves) == (3, [])
    with pytest.raises(InputError, match="log_every 0"):
        train(lambda batch, step: {}, total_steps=3, batches_from=counting, log_every=0, **options)


def test_resumed_logs_hold_every_step_once(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 10, "test", tensorboard=False) as logger:
        for step in range(1, 8):
            logger.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')  # cut short by a crash
    with RunLogger(tmp_path, 10, "test", start_step=4, tensorboard=False) as logger:
        logger.log(5, {"loss": math.nan})
        assert len(lines(tmp_path)) == 5  # on the disk at once
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, None),
    ]
    with RunLogger(tmp_path, 10, "test", tensorboard=False):
        pass
    assert lines(tmp_path) == []


def test_the_bar_shows_only_on_a_terminal(tmp_path: Path) -> None:
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120)
        with RunLogger(tmp_path, 4, "pretrain", tensorboard=False, console=console) as logger:
            logger.log(2, {"loss": 1.25})
        assert ("pretrain" in text.getvalue() and "loss 1.2500" in text.getvalue()) is terminal
        assert terminal or not text.getvalue()


SCRIPT = """
import sys
from mage_fast.training.data import open_source, training_batches
from mage_fast.training.logs import RunLogger
from mage_fast.training.loop import train

def step_fn(batch, step):
    if step == 3:  # of two workers: the next batch is not ready yet
        print("running", flush=True)
    return {"loss": 1.0}

source = open_source("digits", image_size=8)
with RunLogger(sys.argv[1], 10000, "x", tensorboard=False) as logger:
    result = train(
        step_fn, total_steps=10000, logger=logger, save=lambda step: print("saved", step, flush=True),
        batches_from=lambda step: training_batches(source, 1400, step=step, workers=2),
    )
sys.exit(0 if result.stopped_by else 1)
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_to_the_group_spares_the_workers(tmp_path: Path, number: signal.Signals, name: str) -> None:
    """Terminals and schedulers signal the whole group, most likely while the loop waits for a batch."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.startswith("saved ")
    assert f"{name}: stopped after step" in error
    assert "Traceback" not in error
