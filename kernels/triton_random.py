"""The randomness contract of :mod:`mage_fast.kernels.rng` inside Triton kernels.

``state`` points at (seed, step); ``stream`` is the call's stream; ``least_kept`` is
:func:`mage_fast.kernels.rng.least_kept`, at most which an element's bits make it dropped. Bits are compared
where they lie in their word, shifted up to its top: what is below them never decides.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_blocks(state, stream, low, high):
    """The four words, uint32, of the blocks with counters ``(low, high, stream, step)``."""
    seed, step = tl.load(state), tl.load(state + 1)
    return tl.philox(seed, low.to(tl.uint32), high.to(tl.uint32), stream.to(tl.uint32), step.to(tl.uint32))


@triton.jit
def interleave4(a, b, c, d):
    """``[..., N]`` four times to ``[..., 4 N]``: a0 b0 c0 d0 a1 ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def words(state, stream, block, row, COUNT: tl.constexpr):
    """The ``COUNT`` words, uint32, of a row from the start of ``block`` on, in memory order."""
    w0, w1, w2, w3 = philox_blocks(state, stream, block + tl.arange(0, COUNT // 4), row)
    return interleave4(w0, w1, w2, w3)


@triton.jit
def word_of_elements(state, stream, element, row):
    """The word of each element, a block each: for rows that do not start blocks."""
    w0, w1, w2, w3 = philox_blocks(state, stream, element >> 2, row)
    which = (element & 3).to(tl.int32)
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def _halves_kept(word, least_kept):
    """Whether the low and the high half of each word are kept, in memory order."""
    word = word.to(tl.int32, bitcast=True)
    return ((word << 16) >= (least_kept << 16)).to(tl.int8), (word >= (least_kept << 16)).to(tl.int8)


@triton.jit
def keep_activations(state, stream, block, least_kept):
    """Dropout of activations, 16 bits each: of block numbers ``[..., N]`` (int64), ``[..., 8 N]`` kept?

    Element ``e`` of the flattened tensor belongs to block ``e // 8``.
    """
    w0, w1, w2, w3 = philox_blocks(state, stream, block, block >> 32)
    a0, a1 = _halves_kept(w0, least_kept)
    b0, b1 = _halves_kept(w1, least_kept)
    c0, c1 = _halves_kept(w2, least_kept)
    d0, d1 = _halves_kept(w3, least_kept)
    even, odd = interleave4(a0, b0, c0, d0), interleave4(a1, b1, c1, d1)
    return tl.interleave(even, odd) != 0


@triton.jit
def keep_elements(state, stream, element, least_kept):
    """The same for any elements (int64), a block each: for rows that do not start blocks."""
    block = element >> 3
    w0, w1, w2, w3 = philox_blocks(state, stream, block, block >> 32)
    which = (element & 7).to(tl.int32)
    word = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
    half = word.to(tl.int32, bitcast=True) << (16 - 16 * (which & 1))
    return half >= (least_kept << 16)


@triton.jit
def keep_rows(state, stream, start, least_kept, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """``[ROWS, COLUMNS]``: which of the elements ``start[r] + c`` are kept.

    ALIGNED: every start is a multiple of 8 (and COLUMNS too), which takes an eighth of the work.
    """
    if ALIGNED:
        block = (start >> 3)[:, None] + tl.arange(0, COLUMNS // 8)[None, :]
        keep = keep_activations(state, stream, block, least_kept)
    else:
        keep = keep_elements(state, stream, start[:, None] + tl.arange(0, COLUMNS)[None, :], least_kept)
    return keep


@triton.jit
def _bytes_kept(word, least_kept, BYTE: tl.constexpr):
    word = word.to(tl.int32, bitcast=True)
    return ((word << (24 - 8 * BYTE)) >= (least_kept << 24)).to(tl.int8)


@triton.jit
def keep_probabilities(state, stream, row, block, least_kept):
    """Dropout of attention probabilities, 8 bits each: ``[Q, 16 N]`` for rows ``[Q]`` and blocks ``[N]``.

    ``row`` is ``packed query * heads + head``; block ``j`` holds the keys ``16 j - 15 ... 16 j``.
    """
    w0, w1, w2, w3 = philox_blocks(state, stream, block[None, :], row[:, None])
    byte0 = interleave4(
        _bytes_kept(w0, least_kept, 0), _bytes_kept(w1, least_kept, 0),
        _bytes_kept(w2, least_kept, 0), _bytes_kept(w3, least_kept, 0),
    )  # fmt: skip
    byte1 = interleave4(
        _bytes_kept(w0, least_kept, 1), _bytes_kept(w1, least_kept, 1),
        _bytes_kept(w2, least_kept, 1), _bytes_kept(w3, least_kept, 1),
    )  # fmt: skip
    byte2 = interleave4(
        _bytes_kept(w0, least_kept, 2), _bytes_kept(w1, least_kept, 2),
        _bytes_kept(w2, least_kept, 2), _bytes_kept(w3, least_kept, 2),
    )  # fmt: skip
    byte3 = interleave4(
        _bytes_kept(w0, least_kept, 3), _bytes_kept(w1, least_kept, 3),
        _bytes_kept(w2, least_kept, 3), _bytes_kept(w3, least_kept, 3),
    )  # fmt: skip
    return interleave4(byte0, byte1, byte2, byte3) != 0


@triton.jit
def keep_class_probability(state, stream, row, least_kept):
    """``[Q]``: whether key 0, the last byte of block 0, is kept."""
    _, _, _, w3 = philox_blocks(state, stream, row * 0, row)
    return _bytes_kept(w3, least_kept, 3) != 0


@triton.jit
def uniform(word):
    """float32 in (0, 1): the top 23 bits plus a half."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gumbel(word):
    """float32 standard Gumbel noise."""
    return -tl.log(-tl.log(uniform(word)))
