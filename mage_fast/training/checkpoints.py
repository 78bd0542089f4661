"""Checkpoints of a training run: folders of safetensors and JSON, each whole or not there at all.

``<folder>/step-000001200/`` holds ``state.json`` and one safetensors file, or one a rank. A checkpoint is
written under a temporary name, flushed to the disk and renamed; all ranks fail alike, or none.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from mage_fast.errors import CheckpointError, InputError
from mage_fast.files import fsync, write_json
from mage_fast.training.checkpoint_files import read_index, read_into, write_shards, write_whole
from mage_fast.training.run_state import Parts, RunState, Saved, check, fit, flatten

FORMAT = "mage_fast.checkpoint"
VERSION = 1
JSON_NAME = "state.json"

log = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, by step. With a process group all its ranks call every method.

    The folder must be one that all ranks see. Collectives are of the CPU where the group has a backend for it
    (``"cpu:gloo,cuda:nccl"``).

    >>> checkpoints = Checkpoints("out/run/checkpoints", keep_last=2, keep_every=10_000)
    >>> checkpoints.save(1200, settings, {"model": model, "optimizer": optimizer})
    >>> checkpoints.load(checkpoints.latest(), {"model": model, "optimizer": optimizer}).step
    1200

    Args:
        folder: made by the first save.
        keep_last: how many of the newest stay.
        keep_every: checkpoints of steps that are multiples stay for ever; None: no others stay.
        sharded: every rank writes a file with its part; else the first rank writes one with whole tensors.
            Loading takes either, with any number of ranks.
        group: the ranks that save and load together; the default group where there is one, else this process.

    Raises:
        InputError: ``keep_last`` or ``keep_every`` below 1.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        sharded: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise InputError(f"Checkpoints: keep_last {keep_last}, keep_every {keep_every}: wanted 1 or more")
        self.folder = Path(folder)
        self.keep_last, self.keep_every, self.sharded, self.group = keep_last, keep_every, sharded, group

    def paths(self) -> list[Path]:
        """What bears a checkpoint's name, by step; whether it can be read is not known."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if step_of(path) >= 0), key=step_of)

    def save(
        self, step: int, settings: Mapping[str, Any], parts: Parts, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the state after ``step`` steps, in place of one of that step, and prune; its folder.

        Raises:
            CheckpointError: on all ranks, one could not write, for instance on a full disk. Earlier
                checkpoints stay, nothing of this one does.
        """
        path = self.folder / f"step-{step:09d}"
        temporary = _temporary(path)
        tensors, optimizers = flatten(parts)
        values = {
            **{"format": FORMAT, "version": VERSION, "step": step, "parts": sorted(parts)},
            **{"settings": dict(settings), "extra": dict(extra or {}), "optimizers": optimizers},
        }

        def begin() -> None:
            self._remove_leftovers()
            temporary.mkdir(parents=True)

        def end() -> None:
            files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            write_json(temporary / JSON_NAME, values | {"files": files})
            _, saved = _open(temporary)
            check(f"{path}, as {temporary} shows it to the first rank,", saved, tensors)
            for name in files:
                fsync(temporary / name)
            fsync(temporary)
            if path.exists():
                os.replace(path, _replaced(path))
            os.replace(temporary, path)
            fsync(self.folder)
            self._remove_leftovers()

        what = f"cannot write {path}"
        try:
            self._alike(what, begin, first_only=True)
            self._alike(what, lambda: self._write(temporary, tensors))
            self._alike(what, end, first_only=True)
        except CheckpointError:  # of all ranks
            self.remove_leftovers()
            raise
        self.prune()
        return path

    def load(self, path: Path | str, parts: Parts) -> RunState:
        """Write a checkpoint into the live parts, in place, after everything has been checked.

        Raises:
            CheckpointError: on all ranks, it is missing or damaged, or parts, names, shapes or dtypes differ.
        """
        path = Path(path)
        ready: list[Any] = []

        def prepare() -> None:
            values, saved = _open(path)
            if sorted(parts) != values["parts"]:
                raise CheckpointError(
                    f"{path} has the parts {', '.join(values['parts'])}, wanted {', '.join(sorted(parts))}"
                )
            ready.extend((values, *fit(str(path), parts, saved, values["optimizers"])))

        what = f"cannot read {path}"
        self._alike(what, prepare)
        values, tensors, finish = ready
        self._alike(what, lambda: read_into(path, tensors, self.group, alone=self._ranks == 1))
        finish()
        return _run_state(values)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, with a warning for newer ones that are not; None without any.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
        """

        def newest() -> Path | None:
            problems = []
            for path in reversed(self.paths()):
                try:
                    _open(path)
                except CheckpointError as error:
                    log.warning("%s; trying the checkpoint before it", error)
                    problems.append(str(error))
                else:
                    return path
            if problems:
                raise CheckpointError(f"{self.folder} has no checkpoint that is whole: {'; '.join(problems)}")
            return None

        return self._alike(f"cannot read {self.folder}", newest, first_only=True)

    def prune(self) -> None:
        """Delete all but the newest whole ones, as many as ``keep_last``, and those of ``keep_every``.

        One that cannot be deleted is told in a warning: no reason to end a run.
        """

        def delete() -> None:
            kept = 0
            for path in reversed(self.paths()):
                if kept < self.keep_last:
                    with suppress(CheckpointError):
                        _open(path)
                        kept += 1
                elif self.keep_every is None or step_of(path) % self.keep_every:
                    try:
                        os.replace(path, _temporary(path))
                        shutil.rmtree(_temporary(path), ignore_errors=True)
                    except OSError as error:
                        log.warning("cannot delete %s: %s", path, error.strerror)

        self._alike(f"cannot prune {self.folder}", delete, first_only=True)

    def remove_leftovers(self) -> None:
        """Delete what a crash has left under temporary names. Not while another process saves here."""
        self._alike(f"cannot clean {self.folder}", self._remove_leftovers, first_only=True)

    def _remove_leftovers(self) -> None:
        if not self.folder.is_dir():
            return
        for leftover in list(self.folder.glob(".step-*")):
            path = self.folder / leftover.stem.removeprefix(".")
            if leftover == _replaced(path) and not path.exists():  # a crash between two renames
                os.replace(leftover, path)
            elif leftover in (_temporary(path), _replaced(path)):
                shutil.rmtree(leftover, ignore_errors=True)

    def _write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if self.sharded and self._ranks > 1:
            write_shards(folder, tensors, self.group)
        else:
            write_whole(folder, tensors, leads=self._leads)

    @property
    def _ranks(self) -> int:
        grouped = torch.distributed.is_initialized()
        return torch.distributed.get_world_size(self.group) if grouped else 1

    @property
    def _leads(self) -> bool:
        return self._ranks == 1 or torch.distributed.get_rank(self.group) == 0

    def _alike(self, what: str, action: Callable[[], T], *, first_only: bool = False) -> T:
        """Run on all ranks (or the first), wait for all; the first rank's result, or one error, for all."""
        result: Any = None
        problem: Exception | None = None
        try:
            if self._leads or not first_only:
                result = action()
        except CheckpointError as error:
            problem = error
        except (OSError, safetensors.SafetensorError) as error:
            problem = CheckpointError(f"{what}: {getattr(error, 'strerror', None) or error}")
            problem.__cause__ = error
        if self._ranks > 1:
            mine = (result if self._leads else None, None if problem is None else str(problem))
            outcomes: list[Any] = [None] * self._ranks
            torch.distributed.all_gather_object(outcomes, mine, self.group)
            result = outcomes[0][0]
            told = [other for _, other in outcomes if other is not None]
            if told:
                raise CheckpointError(told[0]) from problem
        if problem is not None:
            raise problem
        return result


def read_state(path: Path | str) -> RunState:
    """What a checkpoint says beside its tensors.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, an unknown version.
    """
    return _run_state(_read_json(Path(path)))


def read_part(path: Path | str, part: str = "model") -> dict[str, Tensor]:
    """Whole tensors of one part of a checkpoint by their own keys, on the CPU, in this process alone.

    Raises:
        CheckpointError: as :func:`read_state`, or no such part.
    """
    path = Path(path)
    values, saved = _open(path)
    if part not in values["parts"]:
        raise CheckpointError(f"{path} has no part {part!r}, it has {', '.join(values['parts'])}")
    wanted = {key: meta for key, meta in saved.items() if key.startswith(f"{part}.")}
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in wanted.items()}
    read_into(path, tensors, None, alone=True)
    return {key.removeprefix(f"{part}."): value for key, value in tensors.items()}


def _open(path: Path) -> tuple[dict[str, Any], Saved]:
    """The JSON, and shape and dtype of the tensors; all files are there and none is truncated."""
    values = _read_json(path)
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != JSON_NAME}
    for name in sorted({*sizes, *values["files"]}):
        got, wanted = sizes.get(name), values["files"].get(name)
        if got != wanted:
            shown = ["no file" if size is None else f"{size} bytes" for size in (got, wanted)]
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is {shown[0]}, wanted {shown[1]}")
    try:
        return values, read_index(path)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    file = path / JSON_NAME
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is no checkpoint: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {JSON_NAME} is not JSON: {error}") from error
    got = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if got != (FORMAT, VERSION):
        raise CheckpointError(f"checkpoint {path} is {got}, wanted {(FORMAT, VERSION)}")
    if missing := sorted({"step", "parts", "settings", "extra", "optimizers", "files"} - values.keys()):
        raise CheckpointError(f"checkpoint {path} is damaged: {JSON_NAME} has no {', '.join(missing)}")
    return values


def _run_state(values: dict[str, Any]) -> RunState:
    return RunState(values["step"], values["settings"], values["extra"])


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells; -1 for another name."""
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found[1]) if found else -1


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
