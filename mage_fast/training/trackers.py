"""Trackers of experiments beside the run's own logs: Weights & Biases and Trackio, both optional packages."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import UInt8
from numpy import ndarray

from mage_fast.errors import InputError
from mage_fast.files import write_json

TrackerName = Literal["none", "wandb", "trackio"]
#: In the run's folder: which run of the tracker this is, and how far it was told.
TRACKER_FILE = "tracker.json"


class Tracker:
    """A run of Weights & Biases (``"wandb"``) or Trackio (``"trackio"``), which :class:`RunLogger` tells all.

    ``tracker.json`` in the run's folder keeps the id of the tracker's run, so a resumed training goes on in
    the same one. A training begun anew, one with another tracker or in another project gets a new run.
    Neither service takes back what it was told: the steps between the last saved state and an interruption,
    which a resumed training repeats, are not told again (TensorBoard and ``metrics.jsonl`` are rewound).

    Where data goes is the service's own affair: ``wandb login`` or ``WANDB_MODE=offline``; Trackio keeps it
    on this machine unless ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` says otherwise. An offline run of
    wandb that was resumed is uploaded with ``wandb sync --append``.

    Args:
        service: its name.
        project: the project of the service that the run belongs to.
        config: plain values that describe the run.

    Raises:
        InputError: an unknown service, or its package is not installed.
    """

    def __init__(
        self,
        service: Literal["wandb", "trackio"],
        *,
        project: str = "mage_fast",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if service not in get_args(TrackerName)[1:]:
            raise InputError(f"tracker is {service!r}, wanted one of {', '.join(get_args(TrackerName))}")
        try:
            self._module: Any = importlib.import_module(service)
        except ModuleNotFoundError as error:
            raise InputError(
                f"tracker {service!r} needs the package {error.name}: pip install mage-fast[{service}]"
            ) from error
        self.service, self.project, self.config = service, project, dict(config or {})
        self.run_id = ""
        self._run: Any = None
        self._last_step = 0

    def start(self, folder: Path, start_step: int = 0, last_step: int = 0) -> None:
        """Begin a run, or go on with the folder's if ``start_step`` steps were done before.

        Args:
            folder: the run's, which exists.
            start_step: 0 begins a new run of the tracker.
            last_step: the last step that was logged before, as far as the run's own logs know.

        Raises:
            InputError: a damaged ``tracker.json``, or the service refuses.
        """
        saved = self._read(folder / TRACKER_FILE) if start_step else None
        if saved is None:
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-") or "run"
            saved = {"run": f"{name}-{secrets.token_hex(4)}", "last_step": 0}
        else:
            saved["last_step"] = max(saved["last_step"], last_step)
        self.run_id, self._last_step = saved["run"], saved["last_step"]
        self._run = self._init(folder)
        write_json(
            folder / TRACKER_FILE,
            {"service": self.service, "project": self.project, "run": self.run_id}
            | {"last_step": self._last_step},
        )

    def _init(self, folder: Path) -> Any:
        options: dict[str, Any] = {"project": self.project, "config": self.config, "resume": "allow"}
        if self.service == "wandb":
            options |= {"id": self.run_id, "name": self.run_id, "dir": str(folder)}
        else:  # its runs go by name
            options |= {"name": self.run_id, "embed": False}
        refusals = (ValueError, OSError, getattr(self._module, "Error", ValueError))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
                return self._module.init(**options)
        except refusals as error:
            raise InputError(f"tracker {self.service!r}: {' '.join(str(error).split())}") from error

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            mine = (saved["service"], saved["project"]) == (self.service, self.project)
            return {"run": str(saved["run"]), "last_step": int(saved["last_step"])} if mine else None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged: remove it, and the tracker gets a new run, or repair it"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the metrics at ``step`` steps done, unless that was told before the training was resumed."""
        if step > self._last_step:
            self._run.log(dict(metrics), step=step)

    def image(self, name: str, step: int, pixels_HWC: UInt8[ndarray, "H W 3"]) -> None:
        """Show a picture, likewise."""
        if step > self._last_step:
            self._run.log({name: self._module.Image(pixels_HWC)}, step=step)

    def finish(self, *, failed: bool = False) -> None:
        """Send what is left; ``failed`` marks the run so, where the service knows that."""
        with contextlib.redirect_stdout(sys.stderr):
            if self.service == "wandb":
                self._run.finish(exit_code=int(failed))
            else:  # the run's own would be called again, and heard, when Python exits
                self._module.finish()


def open_tracker(
    name: TrackerName, *, project: str = "mage_fast", config: Mapping[str, Any] | None = None
) -> Tracker | None:
    """The :class:`Tracker` of that name; None for ``"none"``."""
    return None if name == "none" else Tracker(name, project=project, config=config)
