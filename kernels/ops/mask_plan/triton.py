"""Random masking with exact counts as one Triton kernel: a program owns a sample, its words in registers.

The word of the ``num_masked``-th token in the random order is found bit by bit, by counting the words below
a candidate: 32 sums over the sample and no sort. Both thresholds, of the masked and of the dropped tokens,
are found at a time: a count has 16 bits of a sum. Every program adds up the counts of the samples before
its own, so no second launch and no wait is needed for the offsets.

All indices fit int32, as the results that hold them do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels import triton_support
from mage_fast.kernels.triton_random import interleave4, philox_blocks
from mage_fast.kernels.triton_support import DEVICES

__all__ = ["DEVICES", "mask_plan", "unsupported"]
#: Tokens that a program holds in registers; counts of fewer than 2**15 share a word.
MAX_LENGTH = 4096
#: Counts of samples that a program adds up at a time.
_SAMPLES = 256


def unsupported(function: str, *args: Any) -> str | None:
    length = args[3]
    if length > MAX_LENGTH:
        return f"a program holds up to {MAX_LENGTH} tokens of a sample, got {length}"
    return triton_support.unsupported(function, *args)


@triton.jit
def _count(counts, sample, batch, length):
    """Counts of samples, from 0 to the length; 0 past the batch."""
    count = tl.load(counts + sample, mask=sample < batch, other=0)
    return tl.minimum(tl.maximum(count, 0), length).to(tl.int32)


@triton.jit
def _plan(
    state, num_masked, num_dropped, positions, cu_seqlens, masked_index, source, is_masked, visible,
    visible_cu_seqlens, batch, length, total_masked, total_kept, total_visible, stream,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    inside = token < length

    # the random words: the sample is the row, a block holds those of four tokens
    block = tl.arange(0, TOKENS // 4)
    word = interleave4(*philox_blocks(state, stream, block, block * 0 + sample))

    # of the wanted words, the one that is last in the random order: the greatest with too few below it
    masked = _count(num_masked, sample, batch, length)
    dropped = _count(num_dropped, sample, batch, length)
    last_masked, last_dropped = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        below = _pair(word < (last_masked | bit), word < (last_dropped | bit), inside)
        counts = tl.sum(below, 0)
        last_masked = tl.where((counts & 0xFFFF) < masked, last_masked | bit, last_masked)
        last_dropped = tl.where((counts >> 16) < dropped, last_dropped | bit, last_dropped)
        bit = bit >> 1
    # of equal words the first ones are in, as many as are still wanted
    below = tl.sum(_pair(word < last_masked, word < last_dropped, inside), 0)
    ties = tl.cumsum(_pair(word == last_masked, word == last_dropped, inside), 0)
    masked_tie = (word == last_masked) & ((ties & 0xFFFF) <= masked - (below & 0xFFFF))
    dropped_tie = (word == last_dropped) & ((ties >> 16) <= dropped - (below >> 16))
    masked_L = inside & ((word < last_masked) | masked_tie)
    kept_L = inside & ((word > last_dropped) | ((word == last_dropped) & ~dropped_tie))

    # the counts of all samples: those before this one are its offsets, the rest is to fill up
    masked_S, dropped_S = tl.zeros([SAMPLES], tl.int32), tl.zeros([SAMPLES], tl.int32)
    all_masked_S, all_dropped_S = tl.zeros([SAMPLES], tl.int32), tl.zeros([SAMPLES], tl.int32)
    for first in range(0, batch, SAMPLES):
        other = first + tl.arange(0, SAMPLES)
        other_masked = _count(num_masked, other, batch, length)
        other_dropped = _count(num_dropped, other, batch, length)
        masked_S += tl.where(other < sample, other_masked, 0)
        dropped_S += tl.where(other < sample, other_dropped, 0)
        all_masked_S += other_masked
        all_dropped_S += other_dropped
    first_masked, all_masked = tl.sum(masked_S, 0), tl.sum(all_masked_S, 0)
    first_row = sample * (length + 1) - tl.sum(dropped_S, 0)
    all_kept = batch * (length + 1) - tl.sum(all_dropped_S, 0)

    # a sample's class token is its first row; a wrong total never writes outside
    before = tl.cumsum(_pair(masked_L, kept_L, inside), 0)
    position = sample * (length + 1) + 1 + token
    row = first_row + (before >> 16)
    # visible rows are numbered without the masked tokens before them
    first_visible = sample * (length + 1) - first_masked
    visible_row = first_visible + 1 + token - (before & 0xFFFF)
    tl.store(source + position - 1 - token, first_visible, mask=token == 0)
    tl.store(source + position, tl.where(masked_L, -1, visible_row), mask=inside)
    tl.store(visible + first_visible + token, first_row, mask=(token == 0) & (first_visible < total_visible))
    tl.store(visible + visible_row, row, mask=inside & ~masked_L & (visible_row < total_visible))
    tl.store(is_masked + sample * length + token, masked_L, mask=inside)
    tl.store(positions + first_row + token, position - 1, mask=(token == 0) & (first_row < total_kept))
    tl.store(positions + row, position, mask=kept_L & (row < total_kept))
    index = first_masked + (before & 0xFFFF) - 1
    tl.store(masked_index + index, sample * length + token, mask=masked_L & (index < total_masked))
    tl.store(cu_seqlens + sample + token, first_row, mask=token == 0)
    tl.store(visible_cu_seqlens + sample + token, first_visible, mask=token == 0)
    all_visible = batch * (length + 1) - all_masked
    if sample == batch - 1:
        tl.store(cu_seqlens + batch + token, all_kept + token, mask=token == 0)
        tl.store(visible_cu_seqlens + batch + token, all_visible + token, mask=token == 0)

    # what the totals leave over, every program some of it
    for first in range(all_masked + sample * TOKENS, total_masked, batch * TOKENS):
        tl.store(masked_index + first + token, token * 0 - 1, mask=first + token < total_masked)
    for first in range(all_kept + sample * TOKENS, total_kept, batch * TOKENS):
        tl.store(positions + first + token, token * 0 - 1, mask=first + token < total_kept)
    for first in range(all_visible + sample * TOKENS, total_visible, batch * TOKENS):
        tl.store(visible + first + token, token * 0, mask=first + token < total_visible)


@triton.jit
def _pair(low, high, inside):
    """Two truth values as counts in the halves of a word."""
    return tl.where(inside, low.to(tl.int32) | (high.to(tl.int32) << 16), 0)


def mask_plan(
    rng_state: Tensor,
    num_masked_B: Tensor,
    num_dropped_B: Tensor,
    length: int,
    total_masked: int,
    total_kept: int,
    total_visible: int,
    stream: int,
) -> tuple[Tensor, ...]:
    batch = num_masked_B.shape[0]
    positions_T = rng_state.new_empty(total_kept, dtype=torch.int32)
    cu_seqlens = rng_state.new_empty(batch + 1, dtype=torch.int32)
    masked_index_N = rng_state.new_empty(total_masked, dtype=torch.int32)
    source_BS = rng_state.new_empty((batch, length + 1), dtype=torch.int32)
    is_masked_BL = rng_state.new_empty((batch, length), dtype=torch.bool)
    visible_V = rng_state.new_empty(total_visible, dtype=torch.int32)
    visible_cu_seqlens = rng_state.new_empty(batch + 1, dtype=torch.int32)
    outputs = (
        positions_T, cu_seqlens, masked_index_N, source_BS, is_masked_BL, visible_V, visible_cu_seqlens
    )  # fmt: skip
    if batch:
        tokens = max(triton.next_power_of_2(length), 32)
        _plan[batch,](
            rng_state.contiguous(), num_masked_B.contiguous(), num_dropped_B.contiguous(),
            *outputs,
            batch, length, total_masked, total_kept, total_visible, stream, tokens, _SAMPLES,
            num_warps=min(max(tokens // 512, 1), 8),
        )  # fmt: skip
    else:
        cu_seqlens.zero_()
        visible_cu_seqlens.zero_()
        visible_V.zero_()
        positions_T.fill_(-1)
        masked_index_N.fill_(-1)
    return outputs
