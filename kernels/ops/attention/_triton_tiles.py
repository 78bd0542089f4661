"""What the attention kernels share: tiles of rows, their products, the softmax over a tile of keys and its
gradient, dropout.

A tile is a tuple of one or two parts along the features: heads of 48, 80 or 96 are 32 + 16, 64 + 16 and
64 + 32 in place of being padded to a power of two. SECOND is 0 where there is one part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mage_fast.kernels.triton_random import bit_of_key, keep_probability_bits

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)


def parts(features: int) -> tuple[int, int]:
    """Sizes of the parts, powers of two from 16 on; two only where they are less than one padded part."""
    whole = max(triton.next_power_of_2(features), 16)
    first = whole // 2
    second = max(triton.next_power_of_2(features - first), 16) if features > first else 0
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


@triton.jit
def _columns(inside, START: tl.constexpr, SIZE: tl.constexpr, FEATURES: tl.constexpr):
    """Features from START on, and where rows ``inside`` have them."""
    column = START + tl.arange(0, SIZE)
    there = inside[:, None]
    if START + SIZE > FEATURES:
        there = there & (column < FEATURES)[None, :]
    return column[None, :], there


@triton.jit
def load(rows, inside, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr):
    """The tile of the rows that the pointers ``rows`` start; zeros where not ``inside``."""
    column, there = _columns(inside, 0, FIRST, FEATURES)
    first = tl.load(rows[:, None] + column, mask=there, other=0.0)
    if SECOND:
        column, there = _columns(inside, FIRST, SECOND, FEATURES)
        return (first, tl.load(rows[:, None] + column, mask=there, other=0.0))
    else:
        return (first,)


@triton.jit
def store(rows, inside, x, factor, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr):
    """Write ``factor x``."""
    column, there = _columns(inside, 0, FIRST, FEATURES)
    tl.store(rows[:, None] + column, (x[0] * factor).to(rows.dtype.element_ty), mask=there)
    if SECOND:
        column, there = _columns(inside, FIRST, SECOND, FEATURES)
        tl.store(rows[:, None] + column, (x[1] * factor).to(rows.dtype.element_ty), mask=there)


@triton.jit
def load_row(row, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr):
    """One row as a ``[1, features]`` tile, float32."""
    there = tl.full([1], 1, tl.int1)
    column, mask = _columns(there, 0, FIRST, FEATURES)
    first = tl.load(row + column, mask=mask, other=0.0).to(tl.float32)
    if SECOND:
        column, mask = _columns(there, FIRST, SECOND, FEATURES)
        return (first, tl.load(row + column, mask=mask, other=0.0).to(tl.float32))
    else:
        return (first,)


@triton.jit
def store_row(row, x, factor, FIRST: tl.constexpr, SECOND: tl.constexpr, FEATURES: tl.constexpr):
    there = tl.full([1], 1, tl.int1)
    column, mask = _columns(there, 0, FIRST, FEATURES)
    tl.store(row + column, (x[0] * factor).to(row.dtype.element_ty), mask=mask)
    if SECOND:
        column, mask = _columns(there, FIRST, SECOND, FEATURES)
        tl.store(row + column, (x[1] * factor).to(row.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if SECOND:
        return (tl.zeros([ROWS, FIRST], tl.float32), tl.zeros([ROWS, SECOND], tl.float32))
    else:
        return (tl.zeros([ROWS, FIRST], tl.float32),)


@triton.jit
def add(x, y):
    if len(x) == 2:
        return (x[0] + y[0], x[1] + y[1])
    else:
        return (x[0] + y[0],)


@triton.jit
def scaled(x, factor):
    if len(x) == 2:
        return (x[0] * factor, x[1] * factor)
    else:
        return (x[0] * factor,)


@triton.jit
def products(x, y):
    """x y^T, float32."""
    p = tl.dot(x[0], tl.trans(y[0]), input_precision="tf32x3")
    if len(x) == 2:
        p = tl.dot(x[1], tl.trans(y[1]), p, input_precision="tf32x3")
    return p


@triton.jit
def add_product(total, p, x):
    """total + p x."""
    first = tl.dot(p, x[0], total[0], input_precision="tf32x3")
    if len(x) == 2:
        return (first, tl.dot(p, x[1], total[1], input_precision="tf32x3"))
    else:
        return (first,)


@triton.jit
def row_products(x, y):
    """``[rows]``: each row of x times that of y, or times y's only row."""
    p = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if len(x) == 2:
        p += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
    return p


@triton.jit
def weighted_sum(weight, x):
    """``[1, features]``: the sum over rows of weight times row."""
    first = tl.sum(weight[:, None] * x[0].to(tl.float32), 0)[None, :]
    if len(x) == 2:
        return (first, tl.sum(weight[:, None] * x[1].to(tl.float32), 0)[None, :])
    else:
        return (first,)


@triton.jit
def key_order(KEYS: tl.constexpr):
    """``[KEYS]``: which of its keys a tile holds in each column; KEYS of 16 or 32 are in their order.

    A softmax does not mind the order of its keys. In this one the 16 columns that a thread holds of a row
    of a matrix product, 8 g + 2 c + e with c its place among four threads, are the 16 keys of one block of
    random bytes: each thread draws the blocks of its own columns and no other.
    """
    column = tl.arange(0, KEYS)
    if KEYS < 64:
        return column
    return (column & -64) + 16 * ((column >> 1) & 3) + 2 * ((column >> 3) & 7) + (column & 1)


@triton.jit
def keep_tile(random, row, key0, KEYS: tl.constexpr):
    """``[rows, KEYS]``: which probabilities of the queries ``row`` are kept, keys in :func:`key_order` from
    ``key0`` on, the first one of a block.
    """
    seed, step, stream, least_kept = random
    QUERIES: tl.constexpr = row.shape[0]
    block = (key0 + 15) // 16 + tl.arange(0, KEYS // 16)
    bits = keep_probability_bits(seed, step, stream, row[:, None], block[None, :], least_kept)
    if KEYS < 64:
        kept = (bits[:, :, None] & bit_of_key()[None, None, :]) != 0
    else:
        bits = tl.reshape(bits, [QUERIES, KEYS // 64, 1, 4, 1])
        kept = (bits & tl.reshape(bit_of_key(), [1, 1, 8, 1, 2])) != 0
    return tl.reshape(kept, [QUERIES, KEYS])


@triton.jit
def keep_class(random, row):
    """``[rows]``: whether the class token's key, the last one of block 0, is kept."""
    seed, step, stream, least_kept = random
    bits = keep_probability_bits(seed, step, stream, row, row * 0, least_kept)
    return (bits & (1 << 27)) != 0


@triton.jit
def start_softmax(q, class_k, class_v, random, row, DROPOUT: tl.constexpr):
    """Maximum, total and weighted values over the class token's key alone."""
    highest = row_products(q, class_k)
    total = tl.full([row.shape[0]], 1.0, tl.float32)
    weight = total
    if DROPOUT:
        weight = keep_class(random, row).to(tl.float32)
    return highest, total, scaled(class_v, weight[:, None])


@triton.jit
def add_keys(
    softmax, q, k, v, key0, length, scale_log2, random, row, DROPOUT: tl.constexpr, KEYS: tl.constexpr
):
    """The same with a tile of keys more."""
    highest, total, values = softmax
    s = products(q, k)
    if key0 + KEYS > length:
        s = tl.where((key0 + key_order(KEYS) < length)[None, :], s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1))
    shrink = tl.exp2((highest - higher) * scale_log2)
    p = tl.exp2(s * scale_log2 - (higher * scale_log2)[:, None])
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep_tile(random, row, key0, KEYS), p, 0.0)
    values = add_product(scaled(values, shrink[:, None]), p.to(v[0].dtype), v)
    return higher, total, values


@triton.jit
def add_keys_to_one(
    softmax, q, k, v, key0, length, scale_log2, random, row, DROPOUT: tl.constexpr, KEYS: tl.constexpr
):
    """:func:`add_keys` of one query, without a matrix product."""
    highest, total, values = softmax
    s = tl.where(key0 + key_order(KEYS) < length, row_products(k, q), float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 0))
    shrink = tl.exp2((highest - higher) * scale_log2)
    p = tl.exp2((s - higher) * scale_log2)
    total = total * shrink + tl.sum(p, 0)
    if DROPOUT:
        p = tl.where(tl.reshape(keep_tile(random, row, key0, KEYS), [KEYS]), p, 0.0)
    return higher, total, add(scaled(values, shrink[:, None]), weighted_sum(p, v))


@triton.jit
def class_gradients(
    q,
    grad,
    expected,
    log2_total,
    class_k,
    class_v,
    scale_log2,
    keep_scale,
    random,
    row,
    DROPOUT: tl.constexpr,
):
    """``[rows]``: gradients of the scores of the class token's key, and its probabilities, dropped."""
    p = tl.exp2(row_products(q, class_k) * scale_log2 - log2_total)
    grad_p = row_products(grad, class_v)
    kept = p
    if DROPOUT:
        keep = keep_class(random, row)
        kept = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
    return p * (grad_p - expected), kept


@triton.jit
def tile_gradients(
    q, grad, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row,
    DROPOUT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``[rows, KEYS]``: gradients of the scores of a tile of keys, and the probabilities, dropped; both in
    the inputs' dtype.
    """
    s = products(q, k)
    if key0 + KEYS > length:  # no probability where there is no key
        s = tl.where((key0 + key_order(KEYS) < length)[None, :], s, float("-inf"))
    p = tl.exp2(s * scale_log2 - log2_total[:, None])
    grad_p = products(grad, v)
    kept = p
    if DROPOUT:
        keep = keep_tile(random, row, key0, KEYS)
        kept = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
    grad_s = p * (grad_p - expected[:, None])
    return grad_s.to(q[0].dtype), kept.to(q[0].dtype)


@triton.jit
def gradients_of_one(
    q, grad, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row,
    DROPOUT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """:func:`tile_gradients` of one query, ``[KEYS]`` in float32, without a matrix product."""
    s = tl.where(key0 + key_order(KEYS) < length, row_products(k, q), float("-inf"))
    p = tl.exp2(s * scale_log2 - log2_total)
    grad_p = row_products(v, grad)
    kept = p
    if DROPOUT:
        keep = tl.reshape(keep_tile(random, row, key0, KEYS), [KEYS])
        kept = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
    return p * (grad_p - expected), kept
