"""Attention kernels for sequences of any length: a program owns a tile of queries and walks over the keys,
or, for the gradients of keys and values, the other way round.

The softmax starts from the class token: m = q . k0, l = 1, acc = v0. The keys after it start blocks of the
dropout's random bytes, and the maximum is finite from the start on.

Programs past a sequence's end return at once, so the work is the sum over the sequences of their own tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mage_fast.kernels.ops.attention._triton_tiles import (
    add_product,
    keep_class,
    keep_tile,
    keep_tile_transposed,
    load,
    load_vector,
    outer,
    products,
    row_products,
    store,
)

_LOG_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["stream", "least_kept"])
def forward_long(
    qkv, out, lse, cu_seqlens, state, row_stride, part_stride, head_stride, heads, scale,
    stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries of one head."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    if tl.program_id(1) * QUERIES >= length:
        return
    seed, step = tl.load(state), tl.load(state + 1)
    first_row = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_key, first_value = first_row + part_stride, first_row + 2 * part_stride
    row = (start + query) * heads + head
    inside = query < length

    q1, q2 = load(first_row + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
    k1, k2 = load_vector(first_key, FIRST, SECOND, FEATURES)
    v1, v2 = load_vector(first_value, FIRST, SECOND, FEATURES)
    highest = row_products(q1, q2, k1[None, :], k2[None, :], SECOND)
    total = tl.full([QUERIES], 1.0, tl.float32)
    weight = total
    if DROPOUT:
        weight = keep_class(seed, step, stream, row, least_kept).to(tl.float32)
    sum1, sum2 = outer(weight, v1, v2, SECOND)

    scale_log2 = scale * LOG2_E
    for key0 in range(1, length, KEYS):
        key = key0 + tl.arange(0, KEYS)
        there = key < length
        offset = key.to(tl.int64) * row_stride
        k1, k2 = load(first_key + offset, there, FIRST, SECOND, FEATURES)
        v1, v2 = load(first_value + offset, there, FIRST, SECOND, FEATURES)
        s = products(q1, q2, k1, k2, SECOND)
        s = tl.where(there[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2((highest - higher) * scale_log2)
        p = tl.exp2(s * scale_log2 - (higher * scale_log2)[:, None])
        total = total * shrink + tl.sum(p, 1)
        highest = higher
        if DROPOUT:
            keep = keep_tile(seed, step, stream, row, (key0 + 15) // 16, least_kept, KEYS)
            p = tl.where(keep, p, 0.0)
        sum1 *= shrink[:, None]
        if SECOND:
            sum2 *= shrink[:, None]
        sum1, sum2 = add_product(p.to(k1.dtype), v1, v2, sum1, sum2, SECOND)

    norm = (keep_scale / total)[:, None]
    sum1 *= norm
    if SECOND:
        sum2 *= norm
    store(out + row * FEATURES, inside, sum1, sum2, FIRST, SECOND, FEATURES)
    tl.store(lse + row, highest * scale + tl.log2(total) * _LOG_2, mask=inside)


@triton.jit(do_not_specialize=["stream", "least_kept"])
def backward_queries_long(
    grad, qkv, out, lse, delta, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of one tile of queries of one head, and ``delta``, grad . out of each."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    if tl.program_id(1) * QUERIES >= length:
        return
    seed, step = tl.load(state), tl.load(state + 1)
    first_row = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_key, first_value = first_row + part_stride, first_row + 2 * part_stride
    row = (start + query) * heads + head
    inside = query < length

    q1, q2 = load(first_row + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
    g1, g2 = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
    o1, o2 = load(out + row * FEATURES, inside, FIRST, SECOND, FEATURES)
    expected = row_products(g1, g2, o1, o2, SECOND)
    tl.store(delta + row, expected, mask=inside)
    scale_log2 = scale * LOG2_E
    # no probability in rows past the end
    log2_total = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2_E

    k1, k2 = load_vector(first_key, FIRST, SECOND, FEATURES)
    v1, v2 = load_vector(first_value, FIRST, SECOND, FEATURES)
    p = tl.exp2(row_products(q1, q2, k1[None, :], k2[None, :], SECOND) * scale_log2 - log2_total)
    grad_p = row_products(g1, g2, v1[None, :], v2[None, :], SECOND)
    if DROPOUT:
        keep = keep_class(seed, step, stream, row, least_kept)
        grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
    sum1, sum2 = outer(p * (grad_p - expected), k1, k2, SECOND)

    for key0 in range(1, length, KEYS):
        key = key0 + tl.arange(0, KEYS)
        there = key < length
        offset = key.to(tl.int64) * row_stride
        k1, k2 = load(first_key + offset, there, FIRST, SECOND, FEATURES)
        v1, v2 = load(first_value + offset, there, FIRST, SECOND, FEATURES)
        s = products(q1, q2, k1, k2, SECOND)
        s = tl.where(there[None, :], s, float("-inf"))
        p = tl.exp2(s * scale_log2 - log2_total[:, None])
        grad_p = products(g1, g2, v1, v2, SECOND)
        if DROPOUT:
            keep = keep_tile(seed, step, stream, row, (key0 + 15) // 16, least_kept, KEYS)
            grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
        grad_s = (p * (grad_p - expected[:, None])).to(k1.dtype)
        sum1, sum2 = add_product(grad_s, k1, k2, sum1, sum2, SECOND)

    sum1 *= scale
    if SECOND:
        sum2 *= scale
    store(grad_qkv + ((start + query) * 3 * heads + head) * FEATURES, inside, sum1, sum2, FIRST, SECOND, FEATURES)


@triton.jit(do_not_specialize=["stream", "least_kept"])
def backward_keys_long(
    grad, qkv, lse, delta, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: the gradients of one tile of keys and their values of one head, probabilities as
    ``[keys, queries]``.

    Tile i ends at key KEYS i, so that tiles start blocks of random bytes: tile 0 is the class token's.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    key0 = (tl.program_id(1) - 1) * KEYS + 1
    if key0 >= length:
        return
    seed, step = tl.load(state), tl.load(state + 1)
    first_row = qkv + start * row_stride + head.to(tl.int64) * head_stride
    key = key0 + tl.arange(0, KEYS)
    there = (key >= 0) & (key < length)
    offset = key.to(tl.int64) * row_stride
    k1, k2 = load(first_row + part_stride + offset, there, FIRST, SECOND, FEATURES)
    v1, v2 = load(first_row + 2 * part_stride + offset, there, FIRST, SECOND, FEATURES)
    scale_log2 = scale * LOG2_E

    grad_k1, grad_v1 = tl.zeros([KEYS, FIRST], tl.float32), tl.zeros([KEYS, FIRST], tl.float32)
    grad_k2, grad_v2 = grad_k1, grad_v1
    if SECOND:
        grad_k2, grad_v2 = tl.zeros([KEYS, SECOND], tl.float32), tl.zeros([KEYS, SECOND], tl.float32)
    for query0 in range(0, length, QUERIES):
        query = query0 + tl.arange(0, QUERIES)
        inside = query < length
        row = (start + query) * heads + head
        q1, q2 = load(first_row + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
        g1, g2 = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
        log2_total = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2_E
        expected = tl.load(delta + row, mask=inside, other=0.0)
        s = products(k1, k2, q1, q2, SECOND)
        # keys that are not there are zeros: their sums are not stored, but must not become NaN elsewhere
        p = tl.exp2(s * scale_log2 - log2_total[None, :])
        grad_p = products(v1, v2, g1, g2, SECOND)
        kept = p
        if DROPOUT:
            keep = keep_tile_transposed(seed, step, stream, row, (key0 + 15) // 16, least_kept, KEYS)
            kept = tl.where(keep, p, 0.0)
            grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
        grad_v1, grad_v2 = add_product(kept.to(g1.dtype), g1, g2, grad_v1, grad_v2, SECOND)
        grad_s = (p * (grad_p - expected[None, :])).to(q1.dtype)
        grad_k1, grad_k2 = add_product(grad_s, q1, q2, grad_k1, grad_k2, SECOND)

    grad_k1, grad_v1 = grad_k1 * scale, grad_v1 * keep_scale
    if SECOND:
        grad_k2, grad_v2 = grad_k2 * scale, grad_v2 * keep_scale
    target = grad_qkv + ((start + key) * 3 * heads + heads + head) * FEATURES
    store(target, there, grad_k1, grad_k2, FIRST, SECOND, FEATURES)
    store(target + heads * FEATURES, there, grad_v1, grad_v2, FIRST, SECOND, FEATURES)
