"""THE selector: which implementation of an op runs.

An implementation of op ``O`` is the module ``mage_fast.kernels.ops.O.<name>``: ``reference`` (plain
PyTorch), ``cpp`` (the compiled CPU extension), ``triton`` (CUDA), or a third-party package's name. It
defines one function per registered schema (``O`` and, where there is a gradient, ``O_backward``) and may
define ``DEVICES``, the device types it runs on, and ``unsupported(name, *args) -> str | None``, the
reason why it declines these arguments. Adding a file to an op's folder is all it takes to add an
implementation.

``"auto"`` walks :data:`PREFERENCE` for the device and falls through on :class:`Unsupported` only. A
forced implementation runs or raises with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

OPS = (
    "philox",
    "mask_plan",
    "embed_kept",
    "add_norm",
    "attention",
    "linear",
    "bias_gelu",
    "pad_decoder",
    "masked_cross_entropy",
    "linear_cross_entropy",
    "sample_confident",
    "group_norm_silu",
    "nearest_code",
)
#: Order in which "auto" tries implementations, by device type. Any other device: the reference.
PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("cpp", "reference")}

_forced: dict[str, str] = {}


class Unsupported(RuntimeError):
    """An implementation cannot run here; the message says why."""


@cache
def _find(op: str, name: str) -> ModuleType | str:
    """The implementation's module, or the reason why there is none."""
    path = f"{__package__}.ops.{op}.{name}"
    if importlib.util.find_spec(path) is None:
        return "there is none for this op"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mage_fast"):
            raise
        return f"the package {error.name} is not installed"
    except Unsupported as error:
        return str(error)


def _on(op: str, name: str, device: str) -> ModuleType | str:
    """The implementation's module, or the reason why it does not run on the device."""
    module = _find(op, name)
    devices = getattr(module, "DEVICES", None)
    if devices is not None and device not in devices:
        return f"it runs on {' and '.join(devices)}, the tensors are on {device}"
    return module


def _reject(op: str, name: str, device: str, function: str, args: tuple) -> ModuleType | str:
    module = _on(op, name, device)
    unsupported = getattr(module, "unsupported", None)
    return (unsupported(function, *args) if unsupported else None) or module


def select(op: str, implementation: str, device: str, function: str = "", args: tuple = ()) -> ModuleType:
    """The module that runs ``function`` of ``op`` for these arguments.

    Raises:
        Unsupported: the forced implementation cannot run here.
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"no op named {op!r}; the ops are {', '.join(OPS)}")
    if implementation != "auto":
        found = _reject(op, implementation, device, function, args)
        if isinstance(found, str):
            raise Unsupported(f"{op}: implementation {implementation!r} cannot run here: {found}")
        return found
    for name in PREFERENCE.get(device, ("reference",)):
        found = _reject(op, name, device, function, args)
        if not isinstance(found, str):
            return found
    raise AssertionError(f"{op} has no reference implementation")


def requested(op: str, implementation: str) -> str:
    """What an API call asks for: its own argument, else what :func:`use_implementation` set, else "auto"."""
    return implementation if implementation != "auto" else _forced.get(op, "auto")


def forced() -> tuple[tuple[str, str], ...]:
    """What :func:`use_implementation` has set here, ``(op, implementation)`` each."""
    return tuple(sorted(_forced.items()))


@contextmanager
def use_implementation(implementation: str | None = None, **by_op: str) -> Iterator[None]:
    """Force an implementation inside a ``with`` block, for every op or by op name, process-wide.

    >>> with use_implementation("reference"):            # every op
    ...     model(images)
    >>> with use_implementation(attention="triton"):     # one op
    ...     model(images)

    Raises:
        ValueError: an op name that does not exist.
    """
    unknown = set(by_op) - set(OPS)
    if unknown:
        raise ValueError(f"use_implementation: no op named {sorted(unknown)}; the ops are {', '.join(OPS)}")
    before = dict(_forced)
    if implementation is not None:
        _forced.update(dict.fromkeys(OPS, implementation))
    _forced.update(by_op)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def implementations(op: str) -> list[str]:
    """The names of the op's implementations: the modules in its folder."""
    folder = Path(__file__).parent / "ops" / op
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in names if name not in ("api", "specs") and not name.startswith("_"))


def table(device: str) -> list[tuple[str, str, str]]:
    """``(op, what "auto" runs, why not each of the others)``; ``mage-fast env`` prints it."""
    rows = []
    for op in OPS:
        reasons = {name: _on(op, name, device) for name in implementations(op)}
        usable = [name for name, reason in reasons.items() if not isinstance(reason, str)]
        chosen = next(name for name in (*PREFERENCE.get(device, ()), "reference") if name in usable)
        others = [f"{name}: {reason}" for name, reason in reasons.items() if isinstance(reason, str)]
        by_name = [name for name in usable if name not in (chosen, "reference")]
        rows.append((op, chosen, "; ".join(others + [f"{name}: by name" for name in by_name])))
    return rows
