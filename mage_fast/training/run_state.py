"""The state of a training run as one flat dict of tensors, and the plain values that belong to it.

``<part>.<key>`` for modules and averages, ``<optimizer>.<parameter name>.<exp_avg, step, ...>`` for
optimizers: names of the model and not numbers, so that one process, DDP and FSDP2 have the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mage_fast.errors import CheckpointError
from mage_fast.training.optim import Ema

#: What a state is made of. Modules themselves, not their DDP wrappers, which would change the names.
Part = nn.Module | torch.optim.Optimizer | Ema
Parts = Mapping[str, Part]
#: What is known of saved tensors before they are read.
Saved = Mapping[str, tuple[torch.Size, torch.dtype]]

#: Options that say how an optimizer computes here, not what: they stay those of the live one.
_MEANS = ("params", "fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class RunState:
    """What a state says beside its tensors: steps done, the run's settings, the recipe's own values."""

    step: int
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def flatten(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The live tensors by name, not copied (FSDP2's are DTensors), and the optimizers' options as JSON.

    Raises:
        CheckpointError: an optimizer's parameter belongs to no module among the parts.
    """
    tensors: dict[str, Tensor] = {}
    optimizers: dict[str, Any] = {}
    for part, value in parts.items():
        # first of all modules, as state_dict() shards again what FSDP2 holds whole after a forward
        if not isinstance(value, torch.optim.Optimizer):
            tensors |= {f"{part}.{key}": tensor.detach() for key, tensor in value.state_dict().items()}
    for part, value in parts.items():
        if isinstance(value, torch.optim.Optimizer):
            names = _parameter_names(part, value, parts)
            optimizers[part] = [
                {
                    **{k: _plain(v) for k, v in group.items() if k not in _MEANS},
                    **{"params": [names[parameter] for parameter in group["params"]]},
                }
                for group in value.param_groups
            ]
            for parameter, name in names.items():
                for key, tensor in value.state.get(parameter, {}).items():
                    if tensor is not None:
                        tensors[f"{part}.{name}.{key}"] = tensor.detach()
    return tensors, optimizers


def fit(
    where: str, parts: Parts, saved: Saved, optimizers: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Where to write a saved state: the live tensors by name, and what to call when they are written.

    States that an optimizer makes at its first step are made here. Nothing changes before that call, which
    gives them and the options to the optimizers.

    Args:
        where: begins messages.
        parts: as :func:`flatten`.
        saved: shape and dtype of every saved tensor.
        optimizers: as :func:`flatten` gave them.

    Raises:
        CheckpointError: names, shapes, dtypes or parameter groups that differ.
    """
    tensors, live = flatten(parts)
    prefixes = tuple(f"{part}." for part in live)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(prefixes)}
    check(where, {key: value for key, value in saved.items() if not key.startswith(prefixes)}, tensors)
    states: dict[str, dict[Tensor, dict[str, Tensor]]] = {}
    for part, groups in live.items():
        optimizer = parts[part]
        assert isinstance(optimizer, torch.optim.Optimizer)
        _check_groups(f"{where}: {part}", optimizers[part], groups)
        states[part] = _optimizer_states(where, part, optimizer, groups, saved)
        names = _parameter_names(part, optimizer, parts)
        for parameter, values in states[part].items():
            tensors |= {f"{part}.{names[parameter]}.{key}": value for key, value in values.items()}
    check(where, saved, tensors)

    def finish() -> None:
        for part, state in states.items():
            optimizer = parts[part]
            assert isinstance(optimizer, torch.optim.Optimizer)
            for parameter in _parameter_names(part, optimizer, parts):
                optimizer.state.pop(parameter, None)
                if parameter in state:
                    optimizer.state[parameter] = state[parameter]
            for group, options in zip(optimizer.param_groups, optimizers[part], strict=True):
                _set_options(group, options)

    return {key: value.detach() for key, value in tensors.items()}, finish


def check(where: str, got: Saved, wanted: Mapping[str, Tensor]) -> None:
    """Compare saved tensors with live ones.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    for what, keys in (
        ("lacks", wanted.keys() - got.keys()),
        ("has the unknown", got.keys() - wanted.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(f"{where} {what} {shown}")
    for key, value in wanted.items():
        shape, dtype = got[key]
        if shape != value.shape:
            raise CheckpointError(f"{where}: {key} has shape {tuple(shape)}, wanted {tuple(value.shape)}")
        if dtype != value.dtype:
            raise CheckpointError(f"{where}: {key} is {dtype}, wanted {value.dtype}")


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state: tells one tokenizer from another."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parameter_names(part: str, optimizer: torch.optim.Optimizer, parts: Parts) -> dict[Tensor, str]:
    """The optimizer's parameters in its order, each with the name it has in its module."""
    modules = [module for module in parts.values() if isinstance(module, nn.Module)]
    known: dict[Tensor, str] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            known.setdefault(parameter, name)
    wanted = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {parameter: known[parameter] for parameter in wanted if parameter in known}
    if len(set(names.values())) < len(wanted):
        raise CheckpointError(
            f"{part} has {len(wanted)} parameters, {len(set(names.values()))} of which have a name of their "
            "own: wanted an optimizer of one module that is a part of the state"
        )
    return names


def _optimizer_states(
    where: str, part: str, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], saved: Saved
) -> dict[Tensor, dict[str, Tensor]]:
    """For each parameter the states that were saved: the live tensors, or new ones."""
    named = {
        name: (parameter, group)
        for group, names in zip(optimizer.param_groups, groups, strict=True)
        for parameter, name in zip(group["params"], names["params"], strict=True)
    }
    states: dict[Tensor, dict[str, Tensor]] = {}
    for full, (shape, dtype) in saved.items():
        name, _, key = full.removeprefix(f"{part}.").rpartition(".")
        if not full.startswith(f"{part}.") or name not in named:
            continue
        parameter, group = named[name]
        value = optimizer.state.get(parameter, {}).get(key)
        if value is None:
            if key == "step":
                on_device = group.get("capturable") or group.get("fused")
                value = torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
            elif shape == parameter.shape:
                # The parameter's own strides (channels_last): fused kernels walk all of them in memory order.
                value = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            else:
                raise CheckpointError(
                    f"{where}: {full} has shape {tuple(shape)}, wanted {tuple(parameter.shape)}"
                )
        states.setdefault(parameter, {})[key] = value
    return states


def _check_groups(where: str, got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    sizes = [[len(group["params"]) for group in groups] for groups in (got, wanted)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"{where} has parameter groups of {sizes[0]} tensors, wanted {sizes[1]}")
    for number, groups in enumerate(zip(got, wanted, strict=True)):
        ours, theirs = (group["params"] for group in groups)
        if sorted(ours) != sorted(theirs):
            differing = sorted(set(ours) - set(theirs))[0], sorted(set(theirs) - set(ours))[0]
            raise CheckpointError(f"{where} has {differing[0]} in group {number}, wanted {differing[1]}")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _set_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if key == "params":
            continue
        if isinstance(group.get(key), Tensor):  # the lr of an optimizer in a CUDA graph
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value
