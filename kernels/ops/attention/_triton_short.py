"""Attention kernels for sequences of 129 tokens and shorter: a program owns one head of one sequence, the
class token and a tile of QUERIES others, and walks over the keys.

So every byte is read and written once, and the backward is one kernel, without atomics: the gradients of a
tile of keys are complete after it, those of the queries stay in registers. The class token's query and key
are done as vectors beside the matrix products: the other 128 fill whole tiles.
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


@triton.jit(do_not_specialize=["heads", "stream", "least_kept"])
def forward_short(
    qkv, out, lse, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if length == 0:
        return
    random = (tl.load(state), tl.load(state + 1), stream, least_kept)
    scale_log2 = scale * LOG2_E
    first_q = qkv + start * row_stride + head.to(tl.int64) * head_stride
    first_k, first_v = first_q + part_stride, first_q + 2 * part_stride
    query = 1 + tl.arange(0, QUERIES)
    inside, row = query < length, (start + query) * heads + head
    q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
    class_row = start * heads + head + tl.arange(0, 1)
    class_q = load_row(first_q, FIRST, SECOND, FEATURES)
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    softmax = start_softmax(q, class_k, class_v, random, row, DROPOUT)
    class_softmax = start_softmax(class_q, class_k, class_v, random, class_row, DROPOUT)
    for key0 in range(1, length, KEYS):
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        class_softmax = add_keys_to_one(
            class_softmax, class_q, k, v, key0, length, scale_log2, random, class_row, DROPOUT, KEYS
        )
        softmax = add_keys(softmax, q, k, v, key0, length, scale_log2, random, row, DROPOUT, KEYS)
    highest, total, values = softmax
    store(out + row * FEATURES, inside, values, (keep_scale / total)[:, None], FIRST, SECOND, FEATURES)
    tl.store(lse + row, highest * scale + tl.log2(total) * LOG_2, mask=inside)
    highest, total, values = class_softmax
    target = out + (start * heads + head) * FEATURES
    store_row(target, values, (keep_scale / total)[:, None], FIRST, SECOND, FEATURES)
    tl.store(lse + class_row, highest * scale + tl.log2(total) * LOG_2)


@triton.jit(do_not_specialize=["heads", "stream", "least_kept"])
def backward_short(
    grad, qkv, out, lse, grad_qkv, cu_seqlens, state, row_stride, part_stride, head_stride,
    heads, scale, stream, least_kept, keep_scale, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
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
    part = heads * FEATURES  # from the gradients of queries to those of keys, and on to those of values

    class_row = start * heads + head
    class_k = load_row(first_k, FIRST, SECOND, FEATURES)
    class_v = load_row(first_v, FIRST, SECOND, FEATURES)
    class_q = load_row(first_q, FIRST, SECOND, FEATURES)
    class_g = load_row(grad + class_row * FEATURES, FIRST, SECOND, FEATURES)
    class_expected = row_products(class_g, load_row(out + class_row * FEATURES, FIRST, SECOND, FEATURES))
    class_row += tl.arange(0, 1)
    class_log2_total = tl.load(lse + class_row) * LOG2_E
    class_grad_s, class_kept = class_gradients(
        class_q, class_g, class_expected, class_log2_total, class_k, class_v, scale_log2, keep_scale,
        random, class_row, DROPOUT,
    )  # fmt: skip

    query = 1 + tl.arange(0, QUERIES)
    inside, row = query < length, (start + query) * heads + head
    q = load(first_q + query.to(tl.int64) * row_stride, inside, FIRST, SECOND, FEATURES)
    g = load(grad + row * FEATURES, inside, FIRST, SECOND, FEATURES)
    expected = row_products(g, load(out + row * FEATURES, inside, FIRST, SECOND, FEATURES))
    # rows past the end have q = g = 0 and add nothing
    log2_total = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
    grad_s, kept = class_gradients(
        q, g, expected, log2_total, class_k, class_v, scale_log2, keep_scale, random, row, DROPOUT
    )
    grad_class_k = add(scaled(class_q, class_grad_s[:, None]), weighted_sum(grad_s, q))
    grad_class_v = add(scaled(class_g, class_kept[:, None]), weighted_sum(kept, g))
    store_row(first_target + part, grad_class_k, scale, FIRST, SECOND, FEATURES)
    store_row(first_target + 2 * part, grad_class_v, keep_scale, FIRST, SECOND, FEATURES)

    grad_class_q, grad_q = scaled(class_k, class_grad_s[:, None]), scaled(class_k, grad_s[:, None])
    for key0 in range(1, length, KEYS):
        key = key0 + key_order(KEYS)
        offset = key.to(tl.int64) * row_stride
        k = load(first_k + offset, key < length, FIRST, SECOND, FEATURES)
        v = load(first_v + offset, key < length, FIRST, SECOND, FEATURES)
        # read again in each pass: kept in registers they would spill
        one_q = load_row(first_q, FIRST, SECOND, FEATURES)
        one_g = load_row(grad + (start * heads + head) * FEATURES, FIRST, SECOND, FEATURES)
        one_grad_s, one_kept = gradients_of_one(
            one_q, one_g, class_expected, class_log2_total, k, v, key0, length, scale_log2, keep_scale,
            random, class_row, DROPOUT, KEYS,
        )  # fmt: skip
        grad_class_q = add(grad_class_q, weighted_sum(one_grad_s, k))
        tile_grad_s, tile_kept = tile_gradients(
            q, g, expected, log2_total, k, v, key0, length, scale_log2, keep_scale, random, row, DROPOUT, KEYS
        )
        grad_v = add_product(scaled(one_g, one_kept[:, None]), tl.trans(tile_kept), g)
        target = first_target + key.to(tl.int64) * (3 * part)
        store(target + 2 * part, key < length, grad_v, keep_scale, FIRST, SECOND, FEATURES)
        grad_k = add_product(scaled(one_q, one_grad_s[:, None]), tl.trans(tile_grad_s), q)
        store(target + part, key < length, grad_k, scale, FIRST, SECOND, FEATURES)
        grad_q = add_product(grad_q, tile_grad_s, k)
    store_row(first_target, grad_class_q, scale, FIRST, SECOND, FEATURES)
    target = first_target + query.to(tl.int64) * (3 * part)
    store(target, inside, grad_q, scale, FIRST, SECOND, FEATURES)
