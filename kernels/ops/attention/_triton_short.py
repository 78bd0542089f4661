"""Attention kernels for sequences of 129 or 257 tokens and shorter: a program owns all keys and values of
one head of one sequence, in two halves, and walks over the queries.

So every byte is read and written once, and the backward is one kernel that sums the gradients of keys and
values in registers, with no atomics. The class token's query and key are done as vectors beside the matrix
products: the other 128 or 256 fill whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mage_fast.kernels.ops.attention._triton_tiles import (
    LOG2_E,
    LOG_2,
    add,
    add_keys,
    add_product,
    class_gradients,
    keep_tile,
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
def _class_scores(q, k, key0, length, scale_log2, KEYS: tl.constexpr):
    """Scores of one query, ``[KEYS]``, in powers of two."""
    s = row_products(k, q) * scale_log2
    return tl.where(key0 + key_order(KEYS) < length, s, float("-inf"))


@triton.jit(do_not_specialize=["stream", "least_kept"])
def forward_short(
    qkv, out, lse, cu_seqlens, state, row_stride, part_stride, head_stride, heads, scale,
    stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program: one head of one sequence, or, where there are few of them, every n-th tile of queries."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if tl.program_id(1) * QUERIES + (tl.program_id(1) > 0) >= length:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride

    key = 1 + key_order(HALF)
    offset = key.to(tl.int64) * row_stride
    k_a = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
    v_a = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
    key += HALF
    offset = key.to(tl.int64) * row_stride
    k_b = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
    v_b = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)

    if tl.program_id(1) == 0:  # the class token's query
        class_q = load_row(first_q, FIRST, SECOND, FEATURES)
        row = start * heads + head + tl.arange(0, 1)
        highest, total, values = start_softmax(class_q, class_k, class_v, random, row, DROPOUT)
        s_a = _class_scores(class_q, k_a, 1, length, scale_log2, HALF)
        s_b = _class_scores(class_q, k_b, 1 + HALF, length, scale_log2, HALF)
        higher = tl.maximum(highest * scale_log2, tl.maximum(tl.max(s_a, 0), tl.max(s_b, 0)))
        p_a, p_b = tl.exp2(s_a - higher), tl.exp2(s_b - higher)
        shrink = tl.exp2(highest * scale_log2 - higher)
        total = shrink + tl.sum(p_a, 0) + tl.sum(p_b, 0)
        if DROPOUT:
            p_a = tl.where(tl.reshape(keep_tile(random, row, 1, HALF), [HALF]), p_a, 0.0)
            p_b = tl.where(tl.reshape(keep_tile(random, row, 1 + HALF, HALF), [HALF]), p_b, 0.0)
        values = add(scaled(values, shrink[:, None]), add(weighted_sum(p_a, v_a), weighted_sum(p_b, v_b)))
        first_row = out + (start * heads + head) * FEATURES
        store_row(first_row, values, (keep_scale / total)[:, None], FIRST, SECOND, FEATURES)
        tl.store(lse + row, (higher + tl.log2(total)) * LOG_2)

    for query0 in range(1 + tl.program_id(1) * QUERIES, length, tl.num_programs(1) * QUERIES):
        query = query0 + tl.arange(0, QUERIES)
        inside, row = query < length, (start + query) * heads + head
        q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
        softmax = start_softmax(q, class_k, class_v, random, row, DROPOUT)
        softmax = add_keys(softmax, q, k_a, v_a, 1, length, scale_log2, random, row, DROPOUT, HALF)
        if length > 1 + HALF:
            softmax = add_keys(softmax, q, k_b, v_b, 1 + HALF, length, scale_log2, random, row, DROPOUT, HALF)
        highest, total, values = softmax
        store(out + row * FEATURES, inside, values, (keep_scale / total)[:, None], FIRST, SECOND, FEATURES)
        tl.store(lse + row, highest * scale + tl.log2(total) * LOG_2, mask=inside)


@triton.jit
def _class_query_gradients(
    q, grad, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row,
    DROPOUT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What :func:`tile_gradients` gives, of one query: ``[KEYS]``, float32."""
    p = tl.exp2(_class_scores(q, k, key0, length, scale_log2, KEYS) - log2_total)
    grad_p = row_products(v, grad)
    kept = p
    if DROPOUT:
        keep = tl.reshape(keep_tile(random, row, key0, KEYS), [KEYS])
        kept = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p, 0.0) * keep_scale
    return p * (grad_p - expected), kept


@triton.jit(do_not_specialize=["stream", "least_kept"])
def backward_short(
    grad, qkv, out, lse, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program: all gradients of one head of one sequence."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if length == 0:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride
    first_target = grad_qkv + (start * 3 * heads + head) * FEATURES

    key_a = 1 + key_order(HALF)
    offset = key_a.to(tl.int64) * row_stride
    k_a = load(first_k + offset, key_a < length, FIRST, SECOND, FEATURES)
    v_a = load(first_v + offset, key_a < length, FIRST, SECOND, FEATURES)
    key_b = key_a + HALF
    offset = key_b.to(tl.int64) * row_stride
    k_b = load(first_k + offset, key_b < length, FIRST, SECOND, FEATURES)
    v_b = load(first_v + offset, key_b < length, FIRST, SECOND, FEATURES)
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)

    # the class token's query starts the gradients of keys and values
    class_row = start * heads + head
    class_q = load_row(first_q, FIRST, SECOND, FEATURES)
    class_g = load_row(grad + class_row * FEATURES, FIRST, SECOND, FEATURES)
    class_o = load_row(out + class_row * FEATURES, FIRST, SECOND, FEATURES)
    class_row += tl.arange(0, 1)
    class_expected, class_log2_total = row_products(class_g, class_o), tl.load(lse + class_row) * LOG2_E
    grad_s_0, kept_0 = class_gradients(
        class_q, class_g, class_expected, class_log2_total, class_k, class_v, scale_log2, keep_scale,
        random, class_row, DROPOUT,
    )  # fmt: skip
    grad_s_a, kept_a = _class_query_gradients(
        class_q, class_g, class_expected, class_log2_total, k_a, v_a, 1, length, scale_log2, keep_scale,
        random, class_row, DROPOUT, HALF,
    )  # fmt: skip
    grad_s_b, kept_b = _class_query_gradients(
        class_q, class_g, class_expected, class_log2_total, k_b, v_b, 1 + HALF, length, scale_log2, keep_scale,
        random, class_row, DROPOUT, HALF,
    )  # fmt: skip
    grad_class_k, grad_class_v = scaled(class_q, grad_s_0[:, None]), scaled(class_g, kept_0[:, None])
    grad_k_a, grad_v_a = scaled(class_q, grad_s_a[:, None]), scaled(class_g, kept_a[:, None])
    grad_k_b, grad_v_b = scaled(class_q, grad_s_b[:, None]), scaled(class_g, kept_b[:, None])
    grad_class_q = add(weighted_sum(grad_s_a, k_a), weighted_sum(grad_s_b, k_b))
    grad_class_q = add(grad_class_q, scaled(class_k, grad_s_0[:, None]))
    store_row(first_target, grad_class_q, scale, FIRST, SECOND, FEATURES)

    for query0 in range(1, length, QUERIES):
        query = query0 + tl.arange(0, QUERIES)
        inside, row = query < length, (start + query) * heads + head
        q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
        g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
        expected = row_products(g, load(out + row * FEATURES, inside, FIRST, SECOND, FEATURES))
        log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
        grad_s, kept = class_gradients(
            q, g, expected, log2_total, class_k, class_v, scale_log2, keep_scale, random, row, DROPOUT
        )
        grad_class_k = add(grad_class_k, weighted_sum(grad_s, q))
        grad_class_v = add(grad_class_v, weighted_sum(kept, g))
        grad_q = scaled(class_k, grad_s[:, None])
        grad_s, kept = tile_gradients(
            q, g, expected, log2_total, k_a, v_a, 1, length, scale_log2, keep_scale, random, row, DROPOUT, HALF
        )
        grad_v_a = add_product(grad_v_a, tl.trans(kept), g)
        grad_k_a = add_product(grad_k_a, tl.trans(grad_s), q)
        grad_q = add_product(grad_q, grad_s, k_a)
        if length > 1 + HALF:
            grad_s, kept = tile_gradients(
                q, g, expected, log2_total, k_b, v_b, 1 + HALF, length, scale_log2, keep_scale, random, row,
                DROPOUT, HALF,
            )  # fmt: skip
            grad_v_b = add_product(grad_v_b, tl.trans(kept), g)
            grad_k_b = add_product(grad_k_b, tl.trans(grad_s), q)
            grad_q = add_product(grad_q, grad_s, k_b)
        store(
            first_target + query.to(tl.int64) * (3 * heads * FEATURES), inside, grad_q, scale,
            FIRST, SECOND, FEATURES,
        )

    first_target += heads * FEATURES
    value = heads * FEATURES
    store_row(first_target, grad_class_k, scale, FIRST, SECOND, FEATURES)
    store_row(first_target + value, grad_class_v, keep_scale, FIRST, SECOND, FEATURES)
    target = first_target + key_a.to(tl.int64) * (3 * heads * FEATURES)
    store(target, key_a < length, grad_k_a, scale, FIRST, SECOND, FEATURES)
    store(target + value, key_a < length, grad_v_a, keep_scale, FIRST, SECOND, FEATURES)
    target = first_target + key_b.to(tl.int64) * (3 * heads * FEATURES)
    store(target, key_b < length, grad_k_b, scale, FIRST, SECOND, FEATURES)
    store(target + value, key_b < length, grad_v_b, keep_scale, FIRST, SECOND, FEATURES)
