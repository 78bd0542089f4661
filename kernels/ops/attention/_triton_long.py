"""Attention kernels for sequences of any length: a program owns a tile of queries and walks over the keys,
or, for the gradients of keys and values, the other way round.

The softmax starts from the class token: m = q . k0, l = 1, acc = v0, so the maximum is finite and the keys
after it start blocks of the dropout's random bytes. The class token's own query, and the gradients of its
key and value, are a program of their own without matrix products: the other 128 or 256 fill whole tiles.

Programs past a sequence's end return at once, so the work is the sum over the sequences of their own tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mage_fast.kernels.ops.attention._triton_tiles import (
    LOG2_E,
    LOG_2,
    add,
    add_keys,
    add_keys_to_one,
    add_product,
    class_gradients,
    gradients_of_one,
    key_order,
    load,
    load_row,
    row_products,
    scaled,
    start_softmax,
    store,
    store_row,
    tile_gradients,
    weighted_sum,
)


@triton.jit
def _forward_class(
    out, lse, first_q, first_k, first_v, start, length, heads, head, row_stride, class_k, class_v,
    scale, scale_log2, keep_scale, random, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = start * heads + head + tl.arange(0, 1)
    q = load_row(first_q, FIRST, SECOND, FEATURES)
    softmax = start_softmax(q, class_k, class_v, random, row, DROPOUT)
    for key0 in range(1, length, KEYS):
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        softmax = add_keys_to_one(softmax, q, k, v, key0, length, scale_log2, random, row, DROPOUT, KEYS)
    highest, total, values = softmax
    target = out + (start * heads + head) * FEATURES
    store_row(target, values, (keep_scale / total)[:, None], FIRST, SECOND, FEATURES)
    tl.store(lse + row, highest * scale + tl.log2(total) * LOG_2)


@triton.jit(do_not_specialize=["heads", "stream", "least_kept"])
def forward_long(
    qkv, out, lse, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries of one head; program 0: the class token's query."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    query0 = (tl.program_id(1) - 1) * QUERIES + 1
    if tl.maximum(query0, 0) >= length:  # an empty sequence has no class token either
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    if tl.program_id(1) == 0:
        _forward_class(
            out, lse, first_q, first_k, first_v, start, length, heads, head, row_stride, class_k, class_v,
            scale, scale_log2, keep_scale, random, DROPOUT, FEATURES, FIRST, SECOND, KEYS,
        )  # fmt: skip
    else:
        query = query0 + tl.arange(0, QUERIES)
        inside, row = query < length, (start + query) * heads + head
        q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
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


@triton.jit
def _backward_class_query(
    grad, out, lse, delta, grad_qkv, first_q, first_k, first_v, start, length, heads, head, row_stride,
    class_k, class_v, scale, scale_log2, keep_scale, random, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = start * heads + head + tl.arange(0, 1)
    q = load_row(first_q, FIRST, SECOND, FEATURES)
    g = load_row(grad + (start * heads + head) * FEATURES, FIRST, SECOND, FEATURES)
    o = load_row(out + (start * heads + head) * FEATURES, FIRST, SECOND, FEATURES)
    expected, log2_total = row_products(g, o), tl.load(lse + row) * LOG2_E
    tl.store(delta + row, expected)
    grad_s, _kept = class_gradients(
        q, g, expected, log2_total, class_k, class_v, scale_log2, keep_scale, random, row, DROPOUT
    )
    grad_q = scaled(class_k, grad_s[:, None])
    for key0 in range(1, length, KEYS):
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        key_grad_s, _key_kept = gradients_of_one(
            q, g, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row, DROPOUT, KEYS
        )
        grad_q = add(grad_q, weighted_sum(key_grad_s, k))
    store_row(grad_qkv + (start * 3 * heads + head) * FEATURES, grad_q, scale, FIRST, SECOND, FEATURES)


@triton.jit(do_not_specialize=["heads", "stream", "least_kept"])
def backward_queries_long(
    grad, qkv, out, lse, delta, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: the gradients of one tile of queries of one head, and ``delta``, grad . out of each;
    program 0: the class token's query.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    query0 = (tl.program_id(1) - 1) * QUERIES + 1
    if tl.maximum(query0, 0) >= length:  # an empty sequence has no class token either
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    if tl.program_id(1) == 0:
        _backward_class_query(
            grad, out, lse, delta, grad_qkv, first_q, first_k, first_v, start, length, heads, head,
            row_stride, class_k, class_v, scale, scale_log2, keep_scale, random, DROPOUT, FEATURES, FIRST,
            SECOND, KEYS,
        )  # fmt: skip
    else:
        query = query0 + tl.arange(0, QUERIES)
        inside, row = query < length, (start + query) * heads + head
        q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
        g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
        expected = row_products(g, load(out + row * FEATURES, inside, FIRST, SECOND, FEATURES))
        tl.store(delta + row, expected, mask=inside)
        log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
        grad_s, _kept = class_gradients(
            q, g, expected, log2_total, class_k, class_v, scale_log2, keep_scale, random, row, DROPOUT
        )
        grad_q = scaled(class_k, grad_s[:, None])
        for key0 in range(1, length, KEYS):
            key = key0 + key_order(KEYS)
            offset = key.to(tl.int64) * row_stride
            k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
            v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
            tile_grad_s, _tile_kept = tile_gradients(
                q,
                g,
                expected,
                log2_total,
                k,
                v,
                key0,
                length,
                scale_log2,
                keep_scale,
                random,
                row,
                DROPOUT,
                KEYS,
            )
            grad_q = add_product(grad_q, tile_grad_s, k)
        target = grad_qkv + ((start + query) * 3 * heads + head) * FEATURES
        store(target, inside, grad_q, scale, FIRST, SECOND, FEATURES)


@triton.jit
def _backward_class_key(
    grad, lse, delta, first_target, first_q, first_k, first_v, start, length, heads, head, row_stride,
    class_q, class_g, class_log2_total, class_expected, class_row, scale, scale_log2, keep_scale, random,
    DROPOUT: tl.constexpr, FEATURES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    grad_s_0, kept_0 = class_gradients(
        class_q, class_g, class_expected, class_log2_total, class_k, class_v, scale_log2, keep_scale,
        random, class_row, DROPOUT,
    )  # fmt: skip
    grad_class_k, grad_class_v = scaled(class_q, grad_s_0[:, None]), scaled(class_g, kept_0[:, None])
    for query0 in range(1, length, QUERIES):
        query = query0 + tl.arange(0, QUERIES)
        inside, row = query < length, (start + query) * heads + head
        q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
        g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
        # rows past the end have q = g = 0 and add nothing
        log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
        expected = tl.load(delta + row, mask=inside, other=0.0)
        grad_s, kept = class_gradients(
            q, g, expected, log2_total, class_k, class_v, scale_log2, keep_scale, random, row, DROPOUT
        )
        grad_class_k = add(grad_class_k, weighted_sum(grad_s, q))
        grad_class_v = add(grad_class_v, weighted_sum(kept, g))
    store_row(first_target, grad_class_k, scale, FIRST, SECOND, FEATURES)
    store_row(first_target + heads * FEATURES, grad_class_v, keep_scale, FIRST, SECOND, FEATURES)


@triton.jit(do_not_specialize=["heads", "stream", "least_kept"])
def backward_keys_long(
    grad, qkv, lse, delta, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: the gradients of one tile of keys and their values of one head; program 0: of the class
    token's.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    key0 = (tl.program_id(1) - 1) * KEYS + 1
    if tl.maximum(key0, 0) >= length:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride
    first_target = grad_qkv + (start * 3 * heads + heads + head) * FEATURES
    class_q = load_row(first_q, FIRST, SECOND, FEATURES)
    class_g = load_row(grad + (start * heads + head) * FEATURES, FIRST, SECOND, FEATURES)
    class_row = start * heads + head + tl.arange(0, 1)
    class_log2_total, class_expected = tl.load(lse + class_row) * LOG2_E, tl.load(delta + class_row)
    if tl.program_id(1) == 0:
        _backward_class_key(
            grad, lse, delta, first_target, first_q, first_k, first_v, start, length, heads, head,
            row_stride, class_q, class_g, class_log2_total, class_expected, class_row, scale, scale_log2,
            keep_scale, random, DROPOUT, FEATURES, FIRST, SECOND, QUERIES,
        )  # fmt: skip
    else:
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        grad_s_0, kept_0 = gradients_of_one(
            class_q, class_g, class_expected, class_log2_total, k, v, key0, length, scale_log2, keep_scale,
            random, class_row, DROPOUT, KEYS,
        )  # fmt: skip
        grad_k, grad_v = scaled(class_q, grad_s_0[:, None]), scaled(class_g, kept_0[:, None])
        for query0 in range(1, length, QUERIES):
            query = query0 + tl.arange(0, QUERIES)
            inside, row = query < length, (start + query) * heads + head
            q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
            g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
            log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
            expected = tl.load(delta + row, mask=inside, other=0.0)
            grad_s, kept = tile_gradients(
                q,
                g,
                expected,
                log2_total,
                k,
                v,
                key0,
                length,
                scale_log2,
                keep_scale,
                random,
                row,
                DROPOUT,
                KEYS,
            )
            grad_v = add_product(grad_v, tl.trans(kept), g)
            grad_k = add_product(grad_k, tl.trans(grad_s), q)
        target = first_target + key.to(tl.int64) * (3 * heads * FEATURES)
        store(target, key < length, grad_k, scale, FIRST, SECOND, FEATURES)
        store(target + heads * FEATURES, key < length, grad_v, keep_scale, FIRST, SECOND, FEATURES)
