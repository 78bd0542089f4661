"""The nearest codebook entry as Triton kernels: a matrix product whose tiles end in a running argmin.

A program owns a block of features and walks over the codebook, so the distances live in registers only.
The squared norms of the entries come from a small kernel of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels.triton_support import DEVICES, unsupported

__all__ = ["DEVICES", "nearest_code", "unsupported"]


class _Tile(NamedTuple):
    rows: int
    codes: int
    channels: int
    stages: int


#: Features that stay in shared memory leave room for two blocks of codes; in float32 the products of the
#: mantissas' halves take the registers of a greater tile.
_TILES = {
    "resident": _Tile(128, 128, 256, 2),
    "half": _Tile(128, 128, 64, 4),
    "exact": _Tile(128, 64, 32, 3),
}
#: Entries of which a program of the norms takes the squares, and channels at a time.
_NORM_CODES, _NORM_CHANNELS = 16, 128


@triton.jit
def _squares(codebook, squares, codes, channels, CODES: tl.constexpr, CHANNELS: tl.constexpr):
    code = tl.program_id(0) * CODES + tl.arange(0, CODES)
    total = tl.zeros([CODES, CHANNELS], tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (code < codes)[:, None] & (channel < channels)[None, :]
        address = code.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(codebook + address, mask=inside, other=0.0).to(tl.float32)
        total += value * value
    tl.store(squares + code, tl.sum(total, 1), mask=code < codes)


@triton.jit
def _nearest(
    x, codebook, squares, index, rows, codes, channels,
    ROWS: tl.constexpr, CODES: tl.constexpr, CHANNELS: tl.constexpr, RESIDENT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """RESIDENT: CHANNELS are all of them, and the features stay where they are. EXACT: in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHANNELS)
    least = tl.full([ROWS], float("inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int32)
    x_address = x + row[:, None] * channels + column[None, :]
    x_tile = tl.load(x_address, mask=(row < rows)[:, None] & (column < channels)[None, :], other=0.0)
    if EXACT:
        x_tile = x_tile.to(tl.float32)
    for first in range(0, codes, CODES):
        code = first + tl.arange(0, CODES)
        address = codebook + code.to(tl.int64)[:, None] * channels + column[None, :]
        product = tl.zeros([ROWS, CODES], tl.float32)
        if RESIDENT:
            inside = (code < codes)[:, None] & (column < channels)[None, :]
            product = _add_product(x_tile, tl.load(address, mask=inside, other=0.0), product, EXACT)
        else:
            for channel in range(0, channels, CHANNELS):
                inside = (channel + column < channels)[None, :]
                x_part = tl.load(x_address + channel, mask=(row < rows)[:, None] & inside, other=0.0)
                part = tl.load(address + channel, mask=(code < codes)[:, None] & inside, other=0.0)
                product = _add_product(x_part, part, product, EXACT)
        # |x - c|^2 less |x|^2, which is the same for every code
        square = tl.load(squares + code, mask=code < codes, other=float("inf"))
        distance, place = tl.min(square[None, :] - 2.0 * product, 1, return_indices=True)
        nearer = distance < least  # of equal ones the first stays
        least = tl.where(nearer, distance, least)
        nearest = tl.where(nearer, first + place, nearest)
    tl.store(index + row, nearest.to(tl.int64), mask=row < rows)


@triton.jit
def _add_product(x, codebook, product, EXACT: tl.constexpr):
    """``product + x @ codebook.T``; float32 in three tensor-core products of the halves of its mantissa."""
    if EXACT:
        product = tl.dot(
            x.to(tl.float32), tl.trans(codebook.to(tl.float32)), product, input_precision="tf32x3"
        )
    else:
        product = tl.dot(x, tl.trans(codebook), product)
    return product


def nearest_code(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    if x_ND.shape[1] % 16:  # rows that start at multiples of 16 bytes; channels of zeros change nothing
        x_ND, codebook_KD = (F.pad(tensor, (0, -tensor.shape[1] % 16)) for tensor in (x_ND, codebook_KD))
    x_ND, codebook_KD = x_ND.contiguous(), codebook_KD.contiguous()
    rows, channels = x_ND.shape
    codes = codebook_KD.shape[0]
    square_K = codebook_KD.new_empty(codes, dtype=torch.float32)
    index_N = x_ND.new_empty(rows, dtype=torch.int64)
    if rows:
        _squares[triton.cdiv(codes, _NORM_CODES),](
            codebook_KD, square_K, codes, channels, _NORM_CODES, _NORM_CHANNELS
        )
        exact = x_ND.dtype != codebook_KD.dtype or x_ND.dtype == torch.float32
        tile = _TILES["exact" if exact else "resident" if channels <= 256 else "half"]
        padded = max(triton.next_power_of_2(channels), 32)
        _nearest[triton.cdiv(rows, tile.rows),](
            x_ND, codebook_KD, square_K, index_N, rows, codes, channels,
            tile.rows, tile.codes, min(padded, tile.channels), padded <= tile.channels, exact,
            num_warps=8, num_stages=tile.stages,
        )  # fmt: skip
    return index_N
