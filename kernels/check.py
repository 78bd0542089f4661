"""Argument checks shared by the ops: each raises a ValueError that names op, argument, got and wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape(op: str, name: str, x: Tensor, wanted: tuple[int | None, ...]) -> None:
    """Wanted sizes; None stands for any."""
    if x.shape == wanted:  # the usual case, soon told
        return
    if x.dim() != len(wanted) or any(w is not None and s != w for s, w in zip(x.shape, wanted, strict=True)):
        text = ", ".join("*" if w is None else str(w) for w in wanted)
        text = f"({text},)" if len(wanted) == 1 else f"({text})"
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, wanted {text}")


def dtype(op: str, name: str, x: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in wanted:
        text = " or ".join(str(d).removeprefix("torch.") for d in wanted)
        raise ValueError(f"{op}: {name} is {str(x.dtype).removeprefix('torch.')}, wanted {text}")


def floating(op: str, name: str, x: Tensor) -> None:
    dtype(op, name, x, FLOATING)


def integer(op: str, name: str, x: Tensor) -> None:
    dtype(op, name, x, (torch.int64, torch.int32))


def features(op: str, name: str, x: Tensor) -> None:
    """At least one feature in a last dimension."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, wanted (..., features) with features >= 1"
        )


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device}, wanted {first.device} as the first argument")


def state(op: str, x: Tensor) -> None:
    dtype(op, "rng_state", x, (torch.int64,))
    shape(op, "rng_state", x, (2,))


def dropout(op: str, p: float, rng_state: Tensor | None) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout is {p}, wanted 0 <= dropout < 1")
    if p > 0.0:
        if rng_state is None:
            raise ValueError(
                f"{op}: dropout is {p} but rng_state is None, wanted an int64 (seed, step) tensor"
            )
        state(op, rng_state)


#: Devices whose values the host reads without a wait.
_FREE = ("cpu",)
_device_values = False


@contextmanager
def device_values() -> Iterator[None]:
    """Debug mode, process-wide: inside the block the ops check the values of tensors on a GPU too.

    Ids outside the vocabulary, targets beyond the classes, sequences and counts that do not fit: on the CPU
    they always raise, on a GPU they give wrong numbers, as a look at them would make the host wait at every
    call. Inside this block it does wait, and they raise there too. Calls under ``torch.compile`` or during
    the capture of a CUDA graph are never looked into.

    >>> with mage_fast.device_values():
    ...     model(images)
    """
    global _device_values
    before, _device_values = _device_values, True
    try:
        yield
    finally:
        _device_values = before


def readable(x: Tensor) -> bool:
    """Whether values may be looked at: an ordinary tensor, outside tracing, and either looking costs no
    synchronisation or :func:`device_values` asks for it.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    device = x.device.type
    if device in _FREE:
        return True
    capturing = device == "cuda" and torch.cuda.is_current_stream_capturing()
    return _device_values and device != "meta" and not capturing


def values(op: str, name: str, x: Tensor, low: int, high: int) -> None:
    """Integers in [low, high), where the values are :func:`readable`."""
    if readable(x) and x.numel():
        numbers(op, name, [int(v) for v in torch.aminmax(x)], low, high)


def numbers(op: str, name: str, x: list[int], low: int, high: int) -> None:
    """The same of numbers that the host has."""
    if x and (min(x) < low or max(x) >= high):
        got = min(x) if min(x) < low else max(x)
        raise ValueError(f"{op}: {name} holds {got}, wanted {low} <= {name} < {high}")
