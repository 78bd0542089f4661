"""What the launchers of the C++ kernels share. Importing it loads the extension, or raises Unsupported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.library import load_extension

load_extension()
DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16)


def unsupported(function: str, *args: Any) -> str | None:
    """Why these arguments go to the reference."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in DTYPES:
            return f"the kernels take float32 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    return None


def wide(x: Tensor) -> Tensor:
    """A small tensor, a norm's weight say, as contiguous float32."""
    return x.float().contiguous()


def activation_dropout(dropout: float, rng_state: Tensor | None, stream: int) -> tuple:
    """Arguments of a kernel that drops activations: state, stream, least_kept, scale."""
    bits = rng.ACTIVATION_BITS
    # no probability at all (p so small that it rounds to 0) is no dropout
    state = None if rng_state is None or rng.threshold(dropout, bits) == 0 else rng_state.contiguous()
    return state, stream, rng.least_kept(dropout, bits), rng.keep_scale(dropout, bits)
