"""The folder of a training run: where its state lies, when it resumes, when it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mage_fast.errors import InputError
from mage_fast.files import require_folder
from mage_fast.storage import CONFIG_NAME, WEIGHTS_NAME
from mage_fast.training.checkpoints import Checkpoints, read_state
from mage_fast.training.run_state import Part

#: Folder of the checkpoints in a run's folder.
CHECKPOINTS = "checkpoints"
#: Where the state of a run lay before there were checkpoints.
OLD_STATE = "state.safetensors"


class Run:
    """A run's folder. The same settings resume it; other settings are refused, so nothing is overwritten.

    Args:
        folder: made when the first state is written.
        settings: plain values that must not change between start and resumption.
        checkpoints: where states lie and how many stay; by default the newest two, in the run's folder.
        parts: modules, optimisers and averages that make up the state.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        checkpoints: Checkpoints | None = None,
        /,
        **parts: Part,
    ) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.checkpoints = checkpoints or Checkpoints(folder / CHECKPOINTS)
        self.parts = parts
        #: The recipe's own values of the state that was resumed.
        self.extra: dict[str, Any] = {}

    def refuse_others(self) -> None:
        """Refuse a folder that cannot be made, or whose model this run would overwrite and has not written.

        Raises:
            InputError: so.
        """
        require_folder(self.folder, "the run")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if (self.folder / name).exists() and not self.checkpoints.paths():
                raise InputError(f"{self.folder} holds a {name} of something else: give another --out")

    def resume(self, source: Path | Literal["auto"] = "auto") -> int:
        """Load a state; the steps done before, 0 for a new run.

        Args:
            source: ``"auto"`` is the run's newest checkpoint that is whole, if it has one; or a checkpoint,
                also of another folder.

        Raises:
            InputError: the folder holds a run with other settings or later steps than ``source``, the state
                of an earlier version, or is a file.
            CheckpointError: the state is damaged or of another model.
        """
        path = self.refuse_other_settings(source)
        if path is None:
            return 0
        if source != "auto":
            self._check_later(path)
        state = self.checkpoints.load(path, self.parts)
        self.extra = state.extra
        return state.step

    def refuse_other_settings(self, source: Path | Literal["auto"] = "auto") -> Path | None:
        """What :meth:`resume` checks before it loads; the state it would load. For checks before long work.

        Raises:
            InputError: a file, the state of an earlier version, or one with other settings.
            CheckpointError: the state is damaged.
        """
        require_folder(self.folder, "the run")
        if (self.folder / OLD_STATE).exists():
            raise InputError(
                f"{self.folder} holds a {OLD_STATE}, the state of a version that kept no {CHECKPOINTS}/: "
                "give another --out, or finish the run with that version"
            )
        self.checkpoints.remove_leftovers()
        path = self.checkpoints.latest() if source == "auto" else Path(source)
        if path is not None:
            where = self.folder if source == "auto" else path
            check_settings(where, read_state(path).settings, self.settings)
        return path

    def save(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Write the state after ``step`` steps; earlier ones stay until the new one is whole."""
        self.checkpoints.save(step, self.settings, self.parts, extra)

    def _check_later(self, path: Path) -> None:
        """Refuse to leave checkpoints that the next "auto" would take for what comes after ``path``."""
        mine = self.checkpoints.paths()
        names = [other.name for other in mine]
        inside = path.resolve().parent == self.checkpoints.folder.resolve() and path.name in names
        later = names[names.index(path.name) + 1 :] if inside else names
        if later:
            raise InputError(
                f"{self.checkpoints.folder} holds {', '.join(later)}, which do not follow from {path}: "
                "give another --out, or move them away"
            )


def check_settings(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a run began with.

    Raises:
        InputError: naming the settings that differ.
    """
    keys = sorted({*saved, *wanted})
    differing = [
        f"{k} {saved.get(k)!r} and not {wanted.get(k)!r}" for k in keys if saved.get(k) != wanted.get(k)
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with {', '.join(differing)}: "
            "give another --out, or the settings it began with"
        )


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: an unknown name, or CUDA where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}, wanted auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but this torch sees no CUDA device")
    return device
