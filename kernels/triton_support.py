"""What the launchers of the Triton kernels share. Imports triton: only ``triton.py`` modules import this."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from mage_fast.kernels import rng

#: In the interpreter kernels run on the CPU; it is chosen when triton is imported (``TRITON_INTERPRET``).
INTERPRETED: bool = knobs.runtime.interpret
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
#: Where there is no GPU to ask: in the interpreter and in the compile gate, which sets it.
ASSUMED_ARCHITECTURE = 90


def unsupported(function: str, *args: Any) -> str | None:
    """Why these arguments go to the reference."""
    dtypes = {x.dtype for x in args if isinstance(x, Tensor)}
    if torch.float64 in dtypes:
        return "the kernels compute in float32, got float64"
    if INTERPRETED and torch.bfloat16 in dtypes:
        return "the interpreter's bfloat16 is wrong"
    return None


def multiprocessors(x: Tensor) -> int:
    """How many programs run at a time, at least: what the grid of a kernel that loops is made of."""
    if x.device.type == "cuda":
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 4


def unit_stride(x: Tensor) -> Tensor:
    """x if its last dimension lies side by side in memory (a slice of wider rows, say), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def architecture(x: Tensor) -> int:
    """Compute capability of x's GPU, 90 for 9.0: registers hold other tiles on each."""
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    return ASSUMED_ARCHITECTURE


def row_columns(features: int) -> int:
    """Columns of the tile that holds a row of that many features."""
    return max(16, triton.next_power_of_2(features))


def row_dropout(x_TD: Tensor, dropout: float, rng_state: Tensor | None, stream: int) -> tuple:
    """Arguments of a kernel that holds rows of x and drops: state, features, stream, least_kept, scale,
    DROPOUT, ALIGNED, WIDTH, COLUMNS.
    """
    features, bits = x_TD.shape[1], rng.ACTIVATION_BITS
    return (
        x_TD if rng_state is None else rng_state.contiguous(), features, stream,
        rng.least_kept(dropout, bits), rng.keep_scale(dropout, bits), dropout > 0.0, features % 8 == 0,
        16 // max(2, x_TD.element_size()), row_columns(features),
    )  # fmt: skip
