"""A step of iterative decoding as two Triton kernels, neither of which waits for the host.

``_draw``: a program owns a token. A known one keeps its id and its logits are not read; an unknown one's
row is read once and stays in registers while it is mixed, filtered, perturbed and drawn from.
``_remask``: a program owns a sample and puts [M] back at its least confident tokens.

Selections need no sort: the float that the k-th largest, or the largest of a given mass, has is found bit
by bit, in 32 sums over the row. Multiplications and additions are not fused (``enable_fp_fusion``), so that
rounding, and with it the ids, is the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels import rng, triton_support
from mage_fast.kernels.rng import Stream
from mage_fast.kernels.triton_random import gumbel, word_of_elements, words
from mage_fast.kernels.triton_support import DEVICES, unit_stride

__all__ = ["DEVICES", "sample_confident", "unsupported"]
#: A row of codes, and a sample's tokens, are one tile.
_MOST_CODES, _MOST_TOKENS = 16384, 4096
#: Codes that a warp holds, 32 a lane.
_A_WARP = 1024


def unsupported(function: str, logits: Tensor, *args: Any) -> str | None:
    length, codes = args[0].shape[1], logits.shape[-1]
    if codes > _MOST_CODES:
        return f"a row of codes stays in registers: at most {_MOST_CODES}, got {codes}"
    if length > _MOST_TOKENS:
        return f"a sample's tokens are one tile: at most {_MOST_TOKENS}, got {length}"
    return triton_support.unsupported(function, logits, *args)


@triton.jit
def _flip(bits):
    """Of a float's bits, an int32 of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _reaching(x, weight, wanted):
    """The largest value of ``x`` such that the weights of all values not below it reach ``wanted``."""
    key = _flip(x.to(tl.int32, bitcast=True))
    found = tl.full((), -2147483648, tl.int32)
    for i in range(32):
        candidate = found ^ (tl.full((), 1, tl.int32) << (31 - i))
        found = tl.where(tl.sum(tl.where(key >= candidate, weight, 0), 0) >= wanted, candidate, found)
    return _flip(found).to(tl.float32, bitcast=True)


@triton.jit
def _ties_before(tie):
    """How many of the tied stand before each position."""
    tie = tie.to(tl.int32)
    return tl.cumsum(tie, 0) - tie


@triton.jit
def _draw(
    logits, guidance, rows, ids, sampled, log_p, samples, state, length, batch_stride, token_stride,
    guidance_batch_stride, guidance_token_stride, guidance_scale, inverse_temperature, top_k, top_p,
    mask_token_id, stream,
    ROWS: tl.constexpr, GUIDED: tl.constexpr, TEMPERED: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, CODES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    known = tl.load(ids + token)
    if known != mask_token_id:
        tl.store(sampled + token, known)
    else:
        position = token % length
        number = tl.load(samples + token // length)
        if ROWS:  # the batch strides are 0 then
            sample, row = 0, tl.load(rows + token).to(tl.int64)
        else:
            sample, row = token // length, position
        code = tl.arange(0, TILE)
        inside = code < CODES
        at = logits + sample * batch_stride + row * token_stride + code
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            at = guidance + sample * guidance_batch_stride + row * guidance_token_stride + code
            x += guidance_scale * (x - tl.load(at, mask=inside, other=0.0).to(tl.float32))
        if TEMPERED:
            x *= inverse_temperature
        x = tl.where(inside, x, float("-inf"))
        if TOP_K:
            x = tl.where(x >= _reaching(x, 1, top_k), x, float("-inf"))
        highest = tl.max(x, 0)
        e = tl.exp(x - highest)
        total = tl.sum(e, 0)
        if TOP_P:
            mass = top_p * total
            least = _reaching(x, e, mass)
            # of equal codes at the edge of the nucleus the first ones are in, until it is full
            above = tl.sum(tl.where(x > least, e, 0.0), 0)
            tie, weight = x == least, tl.exp(least - highest)
            room = tl.ceil(tl.minimum(tl.div_rn(mass - above, weight), TILE)).to(tl.int32)
            x = tl.where((x > least) | (tie & (_ties_before(tie) < room)), x, float("-inf"))
            total = above + weight * tl.minimum(room, tl.sum(tie.to(tl.int32), 0)).to(tl.float32)
        log_sum = tl.log(total)
        first_word = position * CODES
        if CODES % 4 == 0:
            word = words(state, stream, first_word // 4, number, TILE)
        else:
            word = word_of_elements(state, stream, first_word + code, number)
        # a row of NaN draws some code, never one outside the codebook
        drawn = tl.minimum(tl.argmax(x + gumbel(word), 0), CODES - 1)
        score = tl.sum(tl.where(code == drawn, x, 0.0), 0)
        tl.store(log_p + token, score - highest - log_sum)
        tl.store(sampled + token, drawn.to(sampled.dtype.element_ty))


@triton.jit
def _remask(
    ids, sampled, log_p, num_masked, following, samples, state, length, choice_temperature, mask_token_id,
    stream, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, TILE)
    inside = position < length
    token = sample * length + position
    unknown = inside & (tl.load(ids + token, mask=inside) == mask_token_id)
    noise = gumbel(words(state, stream, 0, tl.load(samples + sample), TILE))
    confidence = tl.load(log_p + token, mask=unknown, other=0.0) + choice_temperature * noise
    # + 0.0: no -0.0, whose bits are below those of 0.0
    doubt = tl.where(unknown, 0.0 - confidence, float("-inf"))
    count = tl.minimum(tl.load(num_masked + sample).to(tl.int32), tl.sum(unknown.to(tl.int32), 0) - 1)
    count = tl.maximum(count, 1)
    least = _reaching(doubt, 1, count)
    above = doubt > least
    room = count - tl.sum(above.to(tl.int32), 0)
    masked = unknown & (above | ((doubt == least) & (_ties_before(doubt == least) < room)))
    decided = tl.load(sampled + token, mask=inside)
    tl.store(following + token, tl.where(masked, mask_token_id, decided), mask=inside)


def _strides(logits_NC: Tensor) -> tuple[int, int]:
    """From sample to sample and from row to row; packed rows belong to no sample."""
    return (0 if logits_NC.dim() == 2 else logits_NC.stride(0)), logits_NC.stride(-2)


def sample_confident(
    logits_NC: Tensor,
    ids_BL: Tensor,
    num_masked_B: Tensor,
    rows_BL: Tensor | None,
    guidance_logits_NC: Tensor | None,
    guidance_scale: float,
    mask_token_id: int,
    choice_temperature: float,
    temperature: float,
    top_k: int,
    top_p: float,
    samples_B: Tensor,
    rng_state: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:
    batch, length = ids_BL.shape
    codes = logits_NC.shape[-1]
    logits_NC, ids_BL, rng_state = unit_stride(logits_NC), ids_BL.contiguous(), rng_state.contiguous()
    samples_B = samples_B.contiguous()
    guidance_NC = logits_NC if guidance_logits_NC is None else unit_stride(guidance_logits_NC)
    sampled_BL, following_BL = torch.empty_like(ids_BL), torch.empty_like(ids_BL)
    log_p_BL = torch.empty_like(ids_BL, dtype=torch.float32)
    if batch * length:
        tile = max(4, triton.next_power_of_2(codes))
        _draw[(batch * length,)](
            logits_NC, guidance_NC, ids_BL if rows_BL is None else rows_BL.contiguous(), ids_BL, sampled_BL,
            log_p_BL, samples_B, rng_state, length, *_strides(logits_NC), *_strides(guidance_NC),
            guidance_scale, 1.0 / temperature, top_k, top_p, mask_token_id,
            rng.stream(Stream.SAMPLE_ID, stream),
            ROWS=rows_BL is not None, GUIDED=guidance_logits_NC is not None, TEMPERED=temperature != 1.0,
            TOP_K=0 < top_k < codes, TOP_P=top_p < 1.0, CODES=codes, TILE=tile,
            num_warps=max(1, tile // _A_WARP), enable_fp_fusion=False,
        )  # fmt: skip
        tile = max(4, triton.next_power_of_2(length))
        _remask[(batch,)](
            ids_BL, sampled_BL, log_p_BL, num_masked_B.contiguous(), following_BL, samples_B, rng_state,
            length, choice_temperature, mask_token_id, rng.stream(Stream.SAMPLE_CONFIDENCE, stream),
            TILE=tile, num_warps=max(1, min(8, tile // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return sampled_BL, following_BL
