"""What the attention kernels share: tiles of rows in one or two parts of features, their products, their
dropout.

Heads of 48, 80 or 96 features are two parts, 32 + 16, 64 + 16 and 64 + 32, in place of padding to a power
of two: ``x1`` and ``x2`` are the parts of x. Where there is one part SECOND is 0 and x2 means nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mage_fast.kernels.triton_random import bit_of_key, keep_probability_bits


def parts(features: int) -> tuple[int, int]:
    """Sizes of the parts, powers of two from 16 on; two only where they are less than one padded part."""
    whole = max(triton.next_power_of_2(features), 16)
    first = whole // 2
    second = max(triton.next_power_of_2(features - first), 16) if features > first else 0
    return (first, second) if 16 <= first and 0 < first + second < whole else (whole, 0)


@triton.jit
def _load_part(
    rows, inside, START: tl.constexpr, SIZE: tl.constexpr, FEATURES: tl.constexpr
):
    column = START + tl.arange(0, SIZE)
    if START + SIZE > FEATURES:
        inside = inside[:, None] & (column < FEATURES)[None, :]
    else:
        inside = inside[:, None]
    return tl.load(rows[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def load(
    rows, inside, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr
):
    """The rows that the pointers ``rows`` start; zeros where not ``inside``."""
    x1 = _load_part(rows, inside, 0, FIRST, FEATURES)
    x2 = x1
    if SECOND:
        x2 = _load_part(rows, inside, FIRST, SECOND, FEATURES)
    return x1, x2


@triton.jit
def _store_part(rows, inside, x, START: tl.constexpr, SIZE: tl.constexpr, FEATURES: tl.constexpr):
    column = START + tl.arange(0, SIZE)
    if START + SIZE > FEATURES:
        inside = inside[:, None] & (column < FEATURES)[None, :]
    else:
        inside = inside[:, None]
    tl.store(rows[:, None] + column[None, :], x.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def store(
    rows, inside, x1, x2, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr
):
    _store_part(rows, inside, x1, 0, FIRST, FEATURES)
    if SECOND:
        _store_part(rows, inside, x2, FIRST, SECOND, FEATURES)


@triton.jit
def load_vector(row, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr):
    """One row in float32."""
    column = tl.arange(0, FIRST)
    x1 = tl.load(row + column, mask=column < FEATURES, other=0.0).to(tl.float32)
    x2 = x1
    if SECOND:
        column = FIRST + tl.arange(0, SECOND)
        x2 = tl.load(row + column, mask=column < FEATURES, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def store_vector(row, x1, x2, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr):
    column = tl.arange(0, FIRST)
    tl.store(row + column, x1.to(row.dtype.element_ty), mask=column < FEATURES)
    if SECOND:
        column = FIRST + tl.arange(0, SECOND)
        tl.store(row + column, x2.to(row.dtype.element_ty), mask=column < FEATURES)


@triton.jit
def products(x1, x2, y1, y2, SECOND: tl.constexpr):
    """x y^T over all features, float32."""
    p = tl.dot(x1, tl.trans(y1), input_precision="tf32x3")
    if SECOND:
        p = tl.dot(x2, tl.trans(y2), p, input_precision="tf32x3")
    return p


@triton.jit
def add_product(p, x1, x2, sum1, sum2, SECOND: tl.constexpr):
    """sum + p x."""
    sum1 = tl.dot(p, x1, sum1, input_precision="tf32x3")
    if SECOND:
        sum2 = tl.dot(p, x2, sum2, input_precision="tf32x3")
    return sum1, sum2


@triton.jit
def row_products(x1, x2, y1, y2, SECOND: tl.constexpr):
    """``[rows]``: the products of rows of x with y, rows as well or one of them as ``[1, features]``."""
    p = tl.sum(x1.to(tl.float32) * y1.to(tl.float32), 1)
    if SECOND:
        p += tl.sum(x2.to(tl.float32) * y2.to(tl.float32), 1)
    return p


@triton.jit
def weighted_rows(weight, x1, x2, SECOND: tl.constexpr):
    """``[features]``: the sum of weight times row."""
    sum1 = tl.sum(weight[:, None] * x1.to(tl.float32), 0)
    sum2 = sum1
    if SECOND:
        sum2 = tl.sum(weight[:, None] * x2.to(tl.float32), 0)
    return sum1, sum2


@triton.jit
def outer(weight, x1, x2, SECOND: tl.constexpr):
    """``[rows, features]``: weight times the vector x."""
    product1 = weight[:, None] * x1[None, :]
    product2 = product1
    if SECOND:
        product2 = weight[:, None] * x2[None, :]
    return product1, product2


@triton.jit
def keep_tile(seed, step, stream, row, first_block, least_kept, KEYS: tl.constexpr):
    """``[rows, KEYS]``: which probabilities of the queries ``row`` are kept, from a block's first key on."""
    block = first_block + tl.arange(0, KEYS // 16)
    bits = keep_probability_bits(seed, step, stream, row[:, None], block[None, :], least_kept)
    kept = (bits[:, :, None] & bit_of_key()[None, None, :]) != 0
    return tl.reshape(kept, [row.shape[0], KEYS])


@triton.jit
def keep_tile_transposed(seed, step, stream, row, first_block, least_kept, KEYS: tl.constexpr):
    """``[KEYS, rows]`` of :func:`keep_tile`."""
    block = first_block + tl.arange(0, KEYS // 16)
    bits = keep_probability_bits(seed, step, stream, row[None, :], block[:, None], least_kept)
    kept = (bits[:, None, :] & bit_of_key()[None, :, None]) != 0
    return tl.reshape(kept, [KEYS, row.shape[0]])


@triton.jit
def keep_class(seed, step, stream, row, least_kept):
    """``[rows]``: whether key 0, the last key of block 0, is kept."""
    bits = keep_probability_bits(seed, step, stream, row, row * 0, least_kept)
    return (bits & (1 << 27)) != 0
