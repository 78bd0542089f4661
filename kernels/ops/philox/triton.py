"""Philox-4x32-10 as a Triton kernel: one lane a block of four words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels.triton_random import interleave4, philox_blocks
from mage_fast.kernels.triton_support import DEVICES

__all__ = ["DEVICES", "philox"]
_BLOCK = 512


@triton.jit
def _philox(
    state, out, low, count, first_high, stream, LONG_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # one division of 64 bits a program; a lane's place counts from the start of the program's first row
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start // low
    place = start - row * low + tl.arange(0, BLOCK)
    if LONG_ROWS:  # a program meets two rows at most
        rows_on = (place >= low).to(tl.int64)
    else:
        rows_on = (place.to(tl.uint32) // tl.full([], low, tl.uint32)).to(tl.int64)
    w0, w1, w2, w3 = philox_blocks(state, stream, place - rows_on * low, first_high + row + rows_on)
    words = interleave4(w0, w1, w2, w3).to(tl.int32, bitcast=True)
    element = 4 * start + tl.arange(0, 4 * BLOCK)
    tl.store(out + element, words, mask=element < 4 * count)


def philox(state: Tensor, stream: int, high: int, low: int, first_high: int) -> Tensor:
    out = torch.empty(high, low, 4, dtype=torch.int32, device=state.device)
    count = high * low
    if count:
        grid = (triton.cdiv(count, _BLOCK),)
        _philox[grid](
            state.contiguous(), out, low, count, first_high, stream, LONG_ROWS=low >= _BLOCK, BLOCK=_BLOCK
        )
    return out
