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
    LOG2_E,
    LOG_2,
    add_keys,
    add_product,
    class_gradients,
    key_order,
    load,
    load_row,
    row_products,
    scaled,
    start_softmax,
    store,
    tile_gradients,
    zeros,
)


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
    if tl.program_id(1) * QUERIES >= length:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride

    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    inside, row = query < length, (start + query) * heads + head
    q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    softmax = start_softmax(q, class_k, class_v, random, row, DROPOUT)
    for key0 in range(1, length, KEYS):
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        softmax = add_keys(softmax, q, k, v, key0, length, scale_log2, random, row, DROPOUT, KEYS)
    highest, total, values = softmax
    store(out + row * FEATURES, inside, values, (keep_scale / total)[:, None], FIRST, SECOND, FEATURES)
    tl.store(lse + row, highest * scale + tl.log2(total) * LOG_2, mask=inside)


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
    if tl.program_id(1) * QUERIES >= length:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride

    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    inside, row = query < length, (start + query) * heads + head
    q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
    g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
    expected = row_products(g, load(out + row * FEATURES, inside, FIRST, SECOND, FEATURES))
    tl.store(delta + row, expected, mask=inside)
    log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E

    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    class_grad_s, _ = class_gradients(
        q, g, expected, log2_total, class_k, class_v, scale_log2, keep_scale, random, row, DROPOUT
    )
    grad_q = scaled(class_k, class_grad_s[:, None])
    for key0 in range(1, length, KEYS):
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        grad_s, _ = tile_gradients(
            q, g, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row, DROPOUT, KEYS
        )
        grad_q = add_product(grad_q, grad_s, k)
    target = grad_qkv + ((start + query) * 3 * heads + head) * FEATURES
    store(target, inside, grad_q, scale, FIRST, SECOND, FEATURES)


@triton.jit(do_not_specialize=["stream", "least_kept"])
def backward_keys_long(
    grad, qkv, lse, delta, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: the gradients of one tile of keys and their values of one head.

    Tile i ends at key KEYS i, so that tiles start blocks of random bytes: tile 0 is the class token's.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    key0 = (tl.program_id(1) - 1) * KEYS + 1
    if key0 >= length:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride

    key = key0 + key_order(KEYS)
    there = (key >= 0) & (key < length)
    offset = key.to(tl.int64) * row_stride
    k = load(first_k + offset, there, FIRST, SECOND, FEATURES)
    v = load(first_v + offset, there, FIRST, SECOND, FEATURES)
    grad_k, grad_v = zeros(KEYS, FIRST, SECOND), zeros(KEYS, FIRST, SECOND)
    for query0 in range(0, length, QUERIES):
        query = query0 + tl.arange(0, QUERIES)
        inside, row = query < length, (start + query) * heads + head
        q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
        g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
        # rows past the end have q = g = 0 and add nothing
        log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
        expected = tl.load(delta + row, mask=inside, other=0.0)
        grad_s, kept = tile_gradients(
            q, g, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row, DROPOUT, KEYS
        )
        grad_v = add_product(grad_v, tl.trans(kept), g)
        grad_k = add_product(grad_k, tl.trans(grad_s), q)
    target = grad_qkv + ((start + key) * 3 * heads + heads + head) * FEATURES
    store(target, there, grad_k, scale, FIRST, SECOND, FEATURES)
    store(target + heads * FEATURES, there, grad_v, keep_scale, FIRST, SECOND, FEATURES)
