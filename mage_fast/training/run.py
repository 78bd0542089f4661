"""The folder of a training run: where its state lies, when it resumes, when it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mage_fast.errors import InputError
from mage_fast.training.run_state import Part, RunState, load_run_state, read_run_state, save_run_state

STATE_NAME = "state.safetensors"


class Run:
    """A run's folder. The same settings resume it; other settings are refused, so nothing is overwritten.

    Args:
        folder: made when the first state is written.
        settings: plain values that must not change between start and resumption.
        parts: modules, optimisers and averages that make up the state.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], **parts: Part) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.parts = parts

    @property
    def state_path(self) -> Path:
        """The safetensors file of the whole state."""
        return self.folder / STATE_NAME

    def resume(self) -> int:
        """Load the state if there is one; the steps done before, 0 for a new run.

        Raises:
            InputError: the folder holds a run with other settings, or is a file.
            CheckpointError: the state is damaged or of another model.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file, wanted a folder for the run")
        if not self.state_path.exists():
            return 0
        check_settings(self.folder, read_run_state(self.state_path).config, self.settings)
        return load_run_state(self.state_path, **self.parts).step

    def save(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Write the state after ``step`` steps; the previous one stays until the new one is whole."""
        state = RunState(step, config=self.settings, extra=extra or {})
        save_run_state(self.state_path, state, **self.parts)


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
