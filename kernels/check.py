"""Argument checks shared by the ops: each raises a ValueError that names op, argument, got and wanted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape(op: str, name: str, x: Tensor, wanted: tuple[int | None, ...]) -> None:
    """Wanted sizes; None stands for any."""
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


def readable(x: Tensor) -> bool:
    """Whether looking at values costs no synchronisation: an ordinary CPU tensor, outside tracing."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
    )


def values(op: str, name: str, x: Tensor, low: int, high: int) -> None:
    """Integers in [low, high), where that can be read without a synchronisation."""
    if readable(x) and x.numel():
        smallest, largest = (int(v) for v in torch.aminmax(x))
        if smallest < low or largest >= high:
            got = smallest if smallest < low else largest
            raise ValueError(f"{op}: {name} holds {got}, wanted {low} <= {name} < {high}")
