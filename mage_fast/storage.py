"""Files of weights: safetensors beside a ``config.json``, written whole or not at all, read without code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mage_fast.errors import CheckpointError
from mage_fast.files import atomic_path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
#: What torch and its restricted unpickler raise on cut and overwritten files.
_BROKEN_TORCH_FILE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(OverflowError, MemoryError, struct.error),
)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def check_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], source: str | Path
) -> None:
    """Compare the names and shapes of a state dict with the wanted ones.

    Raises:
        CheckpointError: missing or unexpected names (the first few and their number), or another shape.
    """
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    wrong = [name for name in wanted if name in state and tuple(state[name].shape) != tuple(wanted[name])]
    problems = []
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more of another shape)" if len(wrong) > 1 else ""
        problems.append(f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(wanted[name])}{more}")
    if missing:
        problems.append(f"missing tensors: {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected tensors: {_listed(unexpected)}")
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path = "state dict",
    *,
    assign: bool = False,
) -> None:
    """Strict ``module.load_state_dict(state, assign=assign)``; nothing is loaded where anything is wrong.

    Raises:
        CheckpointError: names or shapes that differ.
    """
    check_state(state, {name: tuple(x.shape) for name, x in module.state_dict().items()}, source)
    module.load_state_dict(dict(state), strict=True, assign=assign)


def save_safetensors(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict; the file appears whole or not at all.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    with _writing(path), atomic_path(path) as temporary:
        _write_safetensors(temporary, state, metadata)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: no such file, or a truncated or corrupt one.
    """
    try:
        return safetensors.torch.load_file(_existing(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({_one_line(error)})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that :func:`save_safetensors` was given beside the tensors.

    Raises:
        CheckpointError: no such file, or a truncated or corrupt one.
    """
    try:
        with safetensors.safe_open(_existing(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({_one_line(error)})") from error


def save_torch(path: str | Path, contents: Any) -> None:
    """``torch.save``; the file appears whole or not at all.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    with _writing(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(contents, file)


def read_torch(path: str | Path) -> Any:
    """The contents of a ``torch.save`` file with plain types, tensors and ``argparse.Namespace`` only.

    Raises:
        CheckpointError: no such file, a truncated or corrupt one, or one that holds other pickled objects.
    """
    _existing(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # named from the middle of torch's text: its first line advises loading the file without the check
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path}: refused, it holds {refused[1]}, wanted tensors and plain types only"
            ) from error
        raise CheckpointError(f"{path}: not a whole torch file (corrupt pickle)") from error
    except _BROKEN_TORCH_FILE as error:
        raise CheckpointError(f"{path}: not a whole torch file ({_one_line(error)})") from error


def save_pretrained(model: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write ``config.json`` (from ``model.config.to_dict()``) and ``model.safetensors`` into a folder.

    Both are written in full under temporary names before either takes its place, so a failure leaves an
    earlier pair as it was.

    Args:
        model: whose configuration it is.
        folder: made if it is not there.
        state: what to write; the model's state dict by default.

    Raises:
        CheckpointError: the folder cannot be made or written.
    """
    folder = Path(folder)
    config: Any = model.config
    with _writing(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        config_path = stack.enter_context(atomic_path(folder / CONFIG_NAME))
        weights_path = stack.enter_context(atomic_path(folder / WEIGHTS_NAME))
        state = model.state_dict() if state is None else state
        _write_safetensors(weights_path, state, {"format": "pt"})
        config_path.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_pretrained(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(configuration as plain types, tensors)`` of a folder written by :func:`save_pretrained`.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    return read_config(folder), read_safetensors(Path(folder) / WEIGHTS_NAME)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(_existing(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a JSON file ({_one_line(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, wanted an object")
    return config


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    return Path(path)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 160 else lines[0][:157] + "..."


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_one_line(error)})") from error


def _write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    tensors = {name: x.detach().contiguous() for name, x in state.items()}
    safetensors.torch.save_file(tensors, path, metadata=dict(metadata) if metadata else None)
