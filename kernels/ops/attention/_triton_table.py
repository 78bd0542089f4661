"""Tiles of the attention kernels: the largest that compile without a spill and on tensor cores.

By kernel, architecture and width of a head, at most: ``(QUERIES, KEYS, warps)``. Found by compiling, for
half precision and for float32, each of whose products is three in tf32 and takes the registers of more. No
entry: the kernel is not for heads so wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.triton_support import architecture

Tile = tuple[int, int, int]
Widths = dict[int, Tile]

_SQUARE, _SQUARE_8 = (64, 64, 4), (64, 64, 8)
HALF: dict[str, dict[int, Widths]] = {
    # a program owns all queries of a sequence
    "forward_short": {80: {64: (128, 64, 8)}, 90: {64: (128, 64, 8)}, 100: {64: (128, 64, 8)}},
    "backward_short": {80: {64: (128, 32, 8)}, 90: {64: (128, 64, 8)}, 100: {64: (128, 32, 8)}},
    "forward_long": {
        80: {64: _SQUARE, 80: _SQUARE_8, 96: (64, 32, 4), 128: _SQUARE_8},
        90: {96: _SQUARE, 128: _SQUARE_8},
        100: {64: _SQUARE, 96: _SQUARE_8, 128: _SQUARE},
    },
    "backward_queries_long": {
        80: {48: _SQUARE, 64: _SQUARE_8, 96: (64, 32, 4), 128: _SQUARE_8},
        90: {128: _SQUARE},
        100: {128: _SQUARE},
    },
    "backward_keys_long": {
        80: {64: _SQUARE, 96: (32, 32, 4), 128: _SQUARE_8},
        90: {64: _SQUARE, 128: _SQUARE_8},
        100: {128: _SQUARE},
    },
}
FLOAT32: dict[str, dict[int, Widths]] = {
    "forward_long": {
        80: {32: (64, 32, 4), 64: (64, 16, 4)},
        90: {64: (64, 32, 4)},
        100: {48: (64, 32, 4), 64: (64, 16, 8)},
    },
    "backward_queries_long": {
        80: {32: (64, 32, 4), 64: (64, 16, 4)},
        90: {64: (64, 32, 4)},
        100: {32: (64, 32, 4), 64: (64, 16, 8)},
    },
    "backward_keys_long": {
        80: {32: (16, 32, 4), 48: (16, 32, 8), 64: (16, 32, 4)},
        90: {64: (16, 64, 4)},
        100: {64: (16, 64, 4)},
    },
}


def tile(kernel: str, x: Tensor, width: int) -> Tile | None:
    """The kernel's tile on x's GPU, or None if heads are too wide for it."""
    table = FLOAT32 if x.dtype == torch.float32 else HALF
    # the rest multiplies as sm_80 does: consumer chips have neither wgmma nor tcgen05
    family = architecture(x) // 10 * 10
    widths = table.get(kernel, {}).get(family if family in (90, 100) else 80, {})
    return next((found for most, found in widths.items() if width <= most), None)
