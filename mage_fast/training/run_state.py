"""The state of a training run in one safetensors file, with no pickle: what a resumed run needs.

Tensors: ``<part>.<key>`` for every part given (``model``, ``optimizer``, ``ema``, ...). An optimiser's
tensors are ``optimizer.<parameter index>.<name>``. Everything else is JSON in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mage_fast.errors import CheckpointError
from mage_fast.files import atomic_path
from mage_fast.training.optim import Ema

FORMAT = "mage_fast.run_state"
VERSION = 1

Part = nn.Module | torch.optim.Optimizer | Ema


@dataclass(frozen=True)
class RunState:
    """What a run state says beside its tensors. ``step`` and ``epoch`` are the next ones to run."""

    step: int
    epoch: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    #: Any JSON values of the recipe's own.
    extra: dict[str, Any] = field(default_factory=dict)


def save_run_state(path: Path | str, state: RunState, /, **parts: Part) -> None:
    """Write a run state; ``path`` is the previous state or the whole new one at any time, also in a crash.

    The new file is written beside the old one, flushed to the disk and read back (header and size) before
    it takes the name. ``save_run_state(path, RunState(step, epoch, config), model=model, optimizer=adamw)``.

    Raises:
        CheckpointError: the file cannot be written, for instance on a full disk; the previous file stays.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {
        **{"format": FORMAT, "version": VERSION, "parts": sorted(parts), "optimizers": {}},
        **{"step": state.step, "epoch": state.epoch, "config": state.config, "extra": state.extra},
    }
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            found, header["optimizers"][name] = _optimizer_to_tensors(part)
        else:
            found = part.state_dict()
        tensors |= {f"{name}.{key}": value.detach() for key, value in found.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(_unshared(tensors), temporary, metadata={"mage_fast": json.dumps(header)})
            _read_header(temporary)
    except (OSError, safetensors.SafetensorError) as error:
        kept = "; the previous state is still there" if path.exists() else ""
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {reason}{kept}") from error


def read_run_state(path: Path | str) -> RunState:
    """The metadata alone, for instance to build the model from ``config``.

    Raises:
        CheckpointError: missing, truncated, not a run state, an unknown version.
    """
    header = _read_header(Path(path))
    return RunState(header["step"], header["epoch"], header["config"], header["extra"])


def read_part(path: Path | str, part: str = "model") -> dict[str, Tensor]:
    """The tensors of one part by their own keys, for instance to generate from a training run.

    Raises:
        CheckpointError: as :func:`read_run_state`, or no such part.
    """
    header = _read_header(Path(path))
    if part not in header["parts"]:
        raise CheckpointError(f"{path} has no part {part!r}, it has {', '.join(header['parts'])}")
    with safetensors.safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{part}.")]  # noqa: SIM118 (not a mapping)
        return {key.removeprefix(f"{part}."): file.get_tensor(key) for key in keys}


def load_run_state(path: Path | str, /, **parts: Part) -> RunState:
    """Load every part, strictly: all are checked before the first one changes.

    Raises:
        CheckpointError: as :func:`read_run_state`; parts, keys or shapes that differ, by name.
    """
    header = _read_header(Path(path))
    if sorted(parts) != header["parts"]:
        raise CheckpointError(
            f"{path} has the parts {', '.join(header['parts'])}, wanted {', '.join(sorted(parts))}"
        )
    loads: list[tuple[Part, dict[str, Any]]] = []
    for name in sorted(parts, key=lambda name: not isinstance(parts[name], nn.Module)):
        part, found = parts[name], read_part(path, name)
        if isinstance(part, torch.optim.Optimizer):
            saved = header["optimizers"][name]
            loads.append((part, _optimizer_from_tensors(f"{path}: {name}", part, found, saved)))
        else:
            _check(f"{path}: {name}", found, part.state_dict())
            loads.append((part, found))
    for part, values in loads:
        part.load_state_dict(values)
    return RunState(header["step"], header["epoch"], header["config"], header["extra"])


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state: tells one tokenizer from another."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or not safetensors: {error}") from error
    try:
        header = json.loads(metadata["mage_fast"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is not the state of a training run") from error
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        got = (header.get("format"), header.get("version"))
        raise CheckpointError(f"checkpoint {path} is {got}, wanted {(FORMAT, VERSION)}")
    return header


def _check(where: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for what, keys in (
        ("lacks", wanted.keys() - got.keys()),
        ("has the unknown", got.keys() - wanted.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(f"{where} {what} {shown}")
    for key, value in wanted.items():
        if got[key].shape != value.shape:
            raise CheckpointError(
                f"{where}.{key} has shape {tuple(got[key].shape)}, wanted {tuple(value.shape)}"
            )
        if got[key].dtype != value.dtype:
            raise CheckpointError(f"{where}.{key} is {got[key].dtype}, wanted {value.dtype}")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory (tied weights): safetensors refuses shared ones."""
    seen: set[tuple[torch.device, int]] = set()
    out = {}
    for key, value in tensors.items():
        value = value.contiguous()
        storage = (value.device, value.untyped_storage().data_ptr())
        out[key] = value.clone() if value.numel() and storage in seen else value
        seen.add(storage)
    return out


def _optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``<parameter index>.<name>``; the rest (group options, plain numbers) for JSON."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif value is not None:
                scalars[f"{index}.{name}"] = value
    groups = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in g.items()} for g in state["param_groups"]
    ]
    return tensors, {"groups": groups, "scalars": scalars}


@torch.no_grad()
def _optimizer_from_tensors(
    where: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer.load_state_dict argument, checked against the optimiser's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    got = [len(group["params"]) for group in saved["groups"]]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if got != wanted:
        raise CheckpointError(f"{where} has parameter groups of {got} tensors, wanted {wanted}")
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | saved["scalars"]).items():
        index, _, name = key.partition(".")
        if isinstance(value, Tensor) and value.ndim:
            parameter = parameters[int(index)]
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{where}.{key} has shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}"
                )
            # The parameter's own strides (channels_last): fused kernels walk all of them in memory order.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in saved["groups"]
    ]
    return {"state": state, "param_groups": groups}
