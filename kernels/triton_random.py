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
    # a stream of 1 is a constant to the compiler, without the methods of a tensor
    stream = tl.full([], stream, tl.uint32)
    return tl.philox(seed, low.to(tl.uint32), high.to(tl.uint32), stream, step.to(tl.uint32))


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
def keep_activations(state, stream, block, least_kept):
    """Dropout of activations, 16 bits each: of block numbers ``[..., N]`` (int64), ``[..., 8 N]`` kept?

    Element ``e`` of the flattened tensor belongs to block ``e // 8``.
    """
    w0, w1, w2, w3 = philox_blocks(state, stream, block, block >> 32)
    low = interleave4(w0 << 16, w1 << 16, w2 << 16, w3 << 16)
    bits = tl.interleave(low, interleave4(w0, w1, w2, w3))
    return bits.to(tl.int32, bitcast=True) >= (least_kept << 16)


@triton.jit
def keep_half_blocks(state, stream, half, least_kept):
    """The same of half blocks ``[..., N]``: ``[..., 4 N]``. Each draws its whole block.

    For float32, of which a thread reads four in one load: it then holds their bits too.
    """
    block = half >> 1
    w0, w1, w2, w3 = philox_blocks(state, stream, block, block >> 32)
    second = (half & 1) != 0
    low, high = tl.where(second, w2, w0), tl.where(second, w3, w1)
    bits = interleave4(low << 16, low, high << 16, high)
    return bits.to(tl.int32, bitcast=True) >= (least_kept << 16)


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
def keep_row(
    state, stream, start, least_kept, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr = 8
):
    """``[COLUMNS]``: which of the elements ``start + c`` are kept, ``start`` an int64.

    ALIGNED: the start is a multiple of 8 (and COLUMNS too), which takes an eighth of the work. WIDTH, 8
    or 4: how many elements a thread should hold side by side, 16 bytes of its other operands.
    """
    if ALIGNED:
        group = start // WIDTH + tl.arange(0, COLUMNS // WIDTH)
        if WIDTH == 8:
            keep = keep_activations(state, stream, group, least_kept)
        else:
            keep = keep_half_blocks(state, stream, group, least_kept)
    else:
        keep = keep_elements(state, stream, start + tl.arange(0, COLUMNS), least_kept)
    return keep


@triton.jit
def keep_rows(
    state, stream, start, least_kept, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr = 8
):
    """``[ROWS, COLUMNS]``: the same of several rows, ``start[r] + c``."""
    if ALIGNED:
        group = (start // WIDTH)[:, None] + tl.arange(0, COLUMNS // WIDTH)[None, :]
        if WIDTH == 8:
            keep = keep_activations(state, stream, group, least_kept)
        else:
            keep = keep_half_blocks(state, stream, group, least_kept)
    else:
        keep = keep_elements(state, stream, start[:, None] + tl.arange(0, COLUMNS)[None, :], least_kept)
    return keep


@triton.jit
def uniform(word):
    """float32 in (0, 1): the top 23 bits plus a half."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gumbel(word):
    """float32 standard Gumbel noise."""
    return -tl.log(-tl.log(uniform(word)))


@triton.jit
def _bytes_kept_in_place(word, least_kept):
    """Bit 7 of each byte of uint32 words says whether the byte is kept: four bytes compared at a time."""
    threshold = (least_kept + 128).to(tl.uint32)
    top = (threshold >> 7) * 0x80808080
    low_bits_reach = (word | 0x80808080) - (threshold & 0x7F) * 0x01010101
    # the byte + 128 has the top bit inverted: it is over the threshold's, or level and the rest reaches
    over = (word | top) ^ 0xFFFFFFFF
    return over | ((word ^ top) & low_bits_reach)


@triton.jit
def keep_probability_bits(seed, step, stream, row, block, least_kept):
    """Dropout of attention probabilities, 8 bits each: which of a block's 16 are kept, as bits of an int32.

    ``row`` is ``packed query * heads + head``; block ``j`` holds the keys ``16 j - 15 ... 16 j``; the two
    broadcast. ``seed`` and ``step`` are loaded. :func:`bit_of_key` says which bit tells of which key.
    """
    w0, w1, w2, w3 = tl.philox(
        seed, block.to(tl.uint32), row.to(tl.uint32), stream.to(tl.uint32), step.to(tl.uint32)
    )
    k0, k1 = _bytes_kept_in_place(w0, least_kept), _bytes_kept_in_place(w1, least_kept)
    k2, k3 = _bytes_kept_in_place(w2, least_kept), _bytes_kept_in_place(w3, least_kept)
    k01 = ((k0 & 0x80808080) >> 7) | ((k1 & 0x80808080) >> 6)
    k23 = ((k2 & 0x80808080) >> 5) | ((k3 & 0x80808080) >> 4)
    return (k01 | k23).to(tl.int32, bitcast=True)


@triton.jit
def bit_of_key():
    """``[16]``: of a block's int32, the bit of each key."""
    key = tl.arange(0, 16)
    return 1 << (8 * (key & 3) + (key >> 2))
