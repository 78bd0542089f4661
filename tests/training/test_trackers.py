"""Trackers: told the same as the run's own logs, one run over interruptions, refused before any work."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mage_fast.errors import InputError
from mage_fast.training.logs import RunLogger
from mage_fast.training.trackers import TRACKER_FILE, open_tracker

SERVICES = ("wandb", "trackio")
ROOT = Path(__file__).parents[2]


class StandIn(ModuleType):
    """A service that remembers, and refuses arguments that the real one does not have."""

    class Error(Exception):
        """As ``wandb.Error``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[dict[str, int]] = []
        self.refuse = False

    def init(self, **options: Any) -> Any:
        if self.refuse:
            raise self.Error("no API key\nconfigured")
        own = {"id", "dir"} if self.__name__ == "wandb" else {"embed"}
        assert set(options) == {"project", "name", "config", "resume"} | own
        print("hello")  # to standard output, as Trackio does
        self.begun.append(options)
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.told.append((step, metrics))

    @staticmethod
    def Image(pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8
        return pixels

    def finish(self, **options: int) -> None:
        self.finished.append(options)

    @property
    def losses(self) -> list[tuple[int, float]]:
        return [(step, metrics["loss"]) for step, metrics in self.told if "loss" in metrics]


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(request.param)
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    return stand_in


def train(service: StandIn, folder: Path, first: int, last: int, **options: Any) -> None:
    """Log the steps after ``first`` up to ``last``."""
    tracker = open_tracker(service.__name__, config={"seed": 3}, **options)  # type: ignore[arg-type]
    with RunLogger(folder, 20, "x", start_step=first, tensorboard=False, tracker=tracker) as logger:
        for step in range(first + 1, last + 1):
            logger.log(step, {"loss": float(step)})


def test_it_is_told_what_the_run_s_own_log_is(service: StandIn, tmp_path: Path) -> None:
    tracker = open_tracker(service.__name__, project="p", config={"seed": 3})  # type: ignore[arg-type]
    with RunLogger(tmp_path, 2, "x", tensorboard=False, samples_per_step=4, tracker=tracker) as logger:
        logger.log(1, {"loss": 2.5, "lr": 0.1})
        logger.log(2, {"loss": 1.5, "knn_top1": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [metrics | {"step": step} for step, metrics in service.told] == [
        {name: value for name, value in line.items() if name != "time"} for line in lines
    ]
    (options,) = service.begun
    assert (options["project"], options["config"], options["resume"]) == ("p", {"seed": 3}, "allow")
    assert service.finished == [{"exit_code": 0} if service.__name__ == "wandb" else {}]


def test_a_resumed_training_goes_on_in_the_same_run_and_repeats_nothing(
    service: StandIn, tmp_path: Path
) -> None:
    train(service, tmp_path, 0, 7)
    train(service, tmp_path, 4, 6)  # a state was saved after step 4; interrupted again before step 7
    train(service, tmp_path, 4, 10)
    assert service.losses == [(step, float(step)) for step in range(1, 11)]
    assert len({options["name"] for options in service.begun}) == 1
    assert json.loads((tmp_path / TRACKER_FILE).read_text())["last_step"] == 7
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10
    train(service, tmp_path, 0, 1)
    train(service, tmp_path, 1, 2, project="another")
    assert len({options["name"] for options in service.begun}) == 3
    assert service.losses[10:] == [(1, 1.0), (2, 2.0)]


def test_a_failed_training_is_marked(service: StandIn, tmp_path: Path) -> None:
    tracker = open_tracker(service.__name__)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), RunLogger(tmp_path, 2, "x", tensorboard=False, tracker=tracker):
        _ = 1 / 0
    assert service.finished == [{"exit_code": 1} if service.__name__ == "wandb" else {}]


def test_nothing_goes_to_standard_output(
    service: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(service, tmp_path, 0, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


def test_a_name_that_services_take(service: StandIn, tmp_path: Path) -> None:
    folder = tmp_path / "a run: 1/2 of #3?" / "é % ü"
    train(service, folder, 0, 1)
    train(service, tmp_path / "ViT-B_0.5", 0, 1)
    names = [options["name"] for options in service.begun]
    assert names[0].startswith("run-")
    assert names[1].startswith("ViT-B_0.5-")
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in names)


# Refusals


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_named_with_its_remedy(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail
    with pytest.raises(InputError, match=rf"needs the package {name}: pip install mage-fast\[{name}\]"):
        open_tracker(name)


def test_an_unknown_tracker_and_none() -> None:
    assert open_tracker("none") is None
    with pytest.raises(InputError, match="tracker is 'mlflow', wanted one of none, wandb, trackio"):
        open_tracker("mlflow")  # type: ignore[arg-type]


def test_what_the_service_refuses_is_one_line_and_loses_no_log(service: StandIn, tmp_path: Path) -> None:
    train(service, tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_text()
    service.refuse = True
    with pytest.raises(InputError, match=f"tracker '{service.__name__}': no API key configured"):
        train(service, tmp_path, 3, 4)
    service.refuse = False
    (tmp_path / TRACKER_FILE).write_text('{"service": "wandb"')
    with pytest.raises(InputError, match=r"tracker\.json is damaged: remove it"):
        train(service, tmp_path, 3, 4)
    assert (tmp_path / "metrics.jsonl").read_text() == before


# Pictures


def test_pictures_reach_tensorboard_and_the_tracker(service: StandIn, tmp_path: Path) -> None:
    grey, colour = torch.linspace(0, 1, 6).view(1, 2, 3), torch.rand(3, 4, 5)
    levels = (colour * 255).to(torch.uint8)
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    tracker = open_tracker(service.__name__)  # type: ignore[arg-type]
    with RunLogger(tmp_path / "run", 2, "x", tracker=tracker) as logger:
        for step, picture in enumerate((grey, colour, levels, tmp_path / "a.png"), 1):
            logger.image("samples", step, picture)
        logger.log(5, {"loss": math.nan})
        with pytest.raises(InputError, match=r"shape \(2, 4, 5\), wanted \(1 or 3, height, width\)"):
            logger.image("samples", 6, torch.rand(2, 4, 5))
    wanted = levels.permute(1, 2, 0).numpy()
    pictures = [metrics["samples"] for _, metrics in service.told[:4]]
    assert [x.shape for x in pictures] == [(2, 3, 3), *[(4, 5, 3)] * 3]
    assert [x[1, 2].tolist() for x in pictures[:1]] == [[255] * 3]
    assert all((x == wanted).all() for x in pictures[1:])
    assert [step for step, _ in service.told] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Images("samples")] == [1, 2, 3, 4]


def test_without_anywhere_to_show_a_picture_nothing_happens(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 2, "x", tensorboard=False) as logger:
        logger.image("samples", 1, tmp_path / "missing.png")


# The real packages

REAL = """
import json, sys
from pathlib import Path
import torch
from mage_fast.training.logs import RunLogger
from mage_fast.training.trackers import open_tracker
service, folder = sys.argv[1], Path(sys.argv[2])
for first, last in ((0, 3), (2, 5)):
    tracker = open_tracker(service, project="mage_fast_test", config={"model": {"width": 32}, "lr": 1e-3})
    with RunLogger(folder, 5, "x", start_step=first, tensorboard=False, tracker=tracker) as logger:
        for step in range(first + 1, last + 1):
            logger.image("samples", step, torch.rand(3, 8, 8))
            logger.log(step, {"loss": float("nan") if step == 4 else step / 2})
found = None
if service == "trackio":
    from trackio.sqlite_storage import SQLiteStorage
    logs = SQLiteStorage.get_logs("mage_fast_test", tracker.run_id)
    runs = SQLiteStorage.get_runs("mage_fast_test")
    found = [len(runs), sorted([x["step"], x["loss"]] for x in logs if "loss" in x),
             sorted(x["step"] for x in logs if "samples" in x)]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVICES)
def test_the_real_package_runs(name: str, tmp_path: Path) -> None:
    module = pytest.importorskip(name)
    own = {"id": "x", "dir": "y"} if name == "wandb" else {"embed": False}
    inspect.signature(module.init).bind(project="p", name="n", config={}, resume="allow", **own)
    settings = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    settings["PYTHONPATH"] += os.pathsep + os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", REAL, name, str(tmp_path / "run")],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    if name == "wandb":
        assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) >= 1
        assert len(list((tmp_path / "run" / "wandb").rglob("media/images/samples_*.png"))) == 5
    else:
        steps = [1, 2, 3, 4, 5]
        losses = "[[1, 0.5], [2, 1.0], [3, 1.5], [4, NaN], [5, 2.5]]"
        assert done.stdout == f"[1, {losses}, {steps}]\n"
