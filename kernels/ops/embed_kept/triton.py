"""Embedding of the kept tokens as Triton kernels: gather, LayerNorm and dropout in one pass over packed rows.

The backward writes each row's gradient before the LayerNorm once and then sums rows by table row, in an
order that does not depend on timing: rows are sorted by id and by position (one sort of both), the sorted
list is cut every ``_PIECE`` entries, and a table row adds its pieces in order. Cutting matters because [M]
alone owns a third of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels import triton_support
from mage_fast.kernels.triton_random import keep_row
from mage_fast.kernels.triton_sums import sum_partials
from mage_fast.kernels.triton_support import DEVICES, multiprocessors, row_columns, row_dropout

__all__ = ["DEVICES", "embed_kept", "embed_kept_backward", "unsupported"]
#: A row is held in registers. A quarter as many where loads are not aligned, which takes more.
_MOST_FEATURES = 8192
#: Warps of the backward on a multiprocessor, all of them resident: bytes in flight without many partial sums.
_WARPS = 20
#: Sorted rows that one program adds, and the tile in which it does.
_PIECE, _ROWS, _COLUMNS = 64, 16, 256


@triton.jit
def _forward(
    ids, class_ids, positions, is_masked, word, position_weight, weight, bias, x, ids_out, mean, rstd,
    mask_token_id, length, eps, state, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(positions + row).to(tl.int64)
    sample, position = place // (length + 1), place % (length + 1)
    if position == 0:
        token = tl.load(class_ids + sample).to(tl.int64)
    else:
        index = sample * length + position - 1
        token = tl.load(ids + index).to(tl.int64)
        token = tl.where(tl.load(is_masked + index), mask_token_id, token)
    column = tl.arange(0, COLUMNS)
    inside = column < features
    e = tl.load(word + token * features + column, mask=inside, other=0.0).to(tl.float32)
    e += tl.load(position_weight + position * features + column, mask=inside, other=0.0).to(tl.float32)
    center = tl.sum(e, 0) / features
    deviation = tl.where(inside, e - center, 0.0)
    inverse = tl.rsqrt(tl.sum(deviation * deviation, 0) / features + eps)
    scale_D = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift_D = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    n = deviation * inverse * scale_D + shift_D
    start = row * features
    if DROPOUT:
        n = tl.where(keep_row(state, stream, start, least_kept, COLUMNS, ALIGNED, WIDTH), n * scale, 0.0)
    tl.store(x + start + column, n.to(x.dtype.element_ty), mask=inside)
    tl.store(ids_out + row, token.to(tl.int32))
    tl.store(mean + row, center)
    tl.store(rstd + row, inverse)


@triton.jit
def _backward(
    grad, ids, positions, mean, rstd, word, position_weight, weight, grad_embedded, partial, rows,
    sequence, state, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    inside = column < features
    scale_D = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([COLUMNS], tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        start = row * features
        g = tl.load(grad + start + column, mask=inside, other=0.0).to(tl.float32)
        token = tl.load(ids + row).to(tl.int64)
        position = tl.load(positions + row).to(tl.int64) % sequence
        e = tl.load(word + token * features + column, mask=inside, other=0.0).to(tl.float32)
        e += tl.load(position_weight + position * features + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        n = tl.where(inside, (e - tl.load(mean + row)) * inverse, 0.0)
        if DROPOUT:
            g = tl.where(keep_row(state, stream, start, least_kept, COLUMNS, ALIGNED, WIDTH), g * scale, 0.0)
        sum_weight += g * n
        sum_bias += g
        g *= scale_D
        # through mean and variance, the gradient loses its parts along 1 and along the normalised row
        sum_g, sum_gn = tl.split(tl.sum(tl.join(g, g * n), 0))
        grad_e = inverse * (g - sum_g / features - n * (sum_gn / features))
        tl.store(grad_embedded + start + column, grad_e, mask=inside)
    partial += program * features
    tl.store(partial + column, sum_weight, mask=inside)
    tl.store(partial + tl.num_programs(0) * features + column, sum_bias, mask=inside)


@triton.jit
def _store_table_row(value, row, grad_word, grad_position, vocabulary, features, column):
    inside = column < features
    if row < vocabulary:
        tl.store(grad_word + row * features + column, value.to(grad_word.dtype.element_ty), mask=inside)
    else:
        address = grad_position + (row - vocabulary) * features + column
        tl.store(address, value.to(grad_position.dtype.element_ty), mask=inside)


@triton.jit
def _sum_pieces(
    grad_embedded, order, starts, row_of_slot, partial, grad_word, grad_position, rows, vocabulary, features,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Slot ``cut + table row`` is that table row's piece in the ``cut``-th stretch of the sorted list."""
    slot = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(row_of_slot + slot)
    cut = slot - row
    start, end = tl.load(starts + row), tl.load(starts + row + 1)
    first = tl.maximum(start, cut * PIECE)
    last = tl.minimum(end, (cut + 1) * PIECE)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(first, last, ROWS):
        entry = begin + tl.arange(0, ROWS)
        source = tl.load(order + entry, mask=entry < last, other=0) % rows
        address = grad_embedded + source[:, None] * features + column[None, :]
        inside = (entry < last)[:, None] & (column < features)[None, :]
        total += tl.sum(tl.load(address, mask=inside, other=0.0), 0)
    if end <= (start // PIECE + 1) * PIECE:
        if cut == start // PIECE:
            _store_table_row(total, row, grad_word, grad_position, vocabulary, features, column)
    elif first < last:
        tl.store(partial + slot.to(tl.int64) * features + column, total, mask=column < features)


@triton.jit
def _add_pieces(
    starts, partial, grad_word, grad_position, vocabulary, features,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + row), tl.load(starts + row + 1)
    if end > (start // PIECE + 1) * PIECE:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        last = (end - 1) // PIECE + row + 1
        total = tl.zeros([COLUMNS], tl.float32)
        for begin in range(start // PIECE + row, last, ROWS):
            slot = begin + tl.arange(0, ROWS)
            inside = (slot < last)[:, None] & (column < features)[None, :]
            address = partial + slot[:, None] * features + column[None, :]
            total += tl.sum(tl.load(address, mask=inside, other=0.0), 0)
        _store_table_row(total, row, grad_word, grad_position, vocabulary, features, column)


def unsupported(function: str, *args: Any) -> str | None:
    features = args[4 if function == "embed_kept" else 5].shape[1]
    most = _MOST_FEATURES if features % 8 == 0 else _MOST_FEATURES // 4
    if features > most:
        return f"a row of {features} features does not fit in registers, at most {most}"
    return triton_support.unsupported(function, *args)


def embed_kept(
    ids_BL: Tensor,
    class_ids_B: Tensor,
    positions_T: Tensor,
    is_masked_BL: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    mask_token_id: int,
    eps: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = positions_T.shape[0], word_weight_VD.shape[1]
    x_TD = word_weight_VD.new_empty((rows, features))
    ids_T = positions_T.new_empty(rows, dtype=torch.int32)
    mean_T1 = word_weight_VD.new_empty((rows, 1), dtype=torch.float32)
    rstd_T1 = torch.empty_like(mean_T1)
    if rows and features:
        columns = row_columns(features)
        _forward[(rows,)](
            ids_BL.contiguous(), class_ids_B.contiguous(), positions_T.contiguous(),
            is_masked_BL.contiguous(), word_weight_VD.contiguous(), position_weight_SD.contiguous(),
            norm_weight_D.contiguous(), norm_bias_D.contiguous(), x_TD, ids_T, mean_T1, rstd_T1,
            mask_token_id, ids_BL.shape[1], eps,
            *row_dropout(x_TD, dropout, rng_state, stream),
            num_warps=min(32, max(1, columns * x_TD.element_size() // 2048)),
        )  # fmt: skip
    return x_TD, ids_T, mean_T1, rstd_T1


def embed_kept_backward(
    grad_TD: Tensor,
    ids_T: Tensor,
    positions_T: Tensor,
    mean_T1: Tensor,
    rstd_T1: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_TD = grad_TD.contiguous()
    (rows, features), sequence = grad_TD.shape, position_weight_SD.shape[0]
    grad_embedded_TD = grad_TD.new_empty((rows, features), dtype=torch.float32)
    warps = min(16, max(1, row_columns(features) // 256))
    programs = min(rows, max(1, _WARPS // warps) * multiprocessors(grad_TD))
    partial_2PD = grad_TD.new_empty((2, programs, features), dtype=torch.float32)
    if rows:
        _backward[(programs,)](
            grad_TD, ids_T.contiguous(), positions_T.contiguous(), mean_T1.contiguous(), rstd_T1.contiguous(),
            word_weight_VD.contiguous(), position_weight_SD.contiguous(), norm_weight_D.contiguous(),
            grad_embedded_TD, partial_2PD, rows, sequence,
            *row_dropout(grad_TD, dropout, rng_state, stream), num_warps=warps,
        )  # fmt: skip
    grad_weight_D, grad_bias_D = norm_weight_D.new_empty(features), norm_weight_D.new_empty(features)
    sum_partials(partial_2PD, grad_weight_D, grad_bias_D)
    keys = torch.cat([ids_T, (positions_T % sequence).int() + word_weight_VD.shape[0]])
    grad_word_VD, grad_position_SD = _sum_by_key(grad_embedded_TD, keys, word_weight_VD, position_weight_SD)
    return grad_word_VD, grad_position_SD, grad_weight_D, grad_bias_D


def _sum_by_key(
    grad_embedded_TD: Tensor, keys: Tensor, word_weight_VD: Tensor, position_weight_SD: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both tables; ``keys`` are each row's id, then each row's V + position."""
    grad_word_VD = word_weight_VD.new_empty(word_weight_VD.shape)
    grad_position_SD = position_weight_SD.new_empty(position_weight_SD.shape)
    (rows, features), vocabulary = grad_embedded_TD.shape, word_weight_VD.shape[0]
    table_rows = vocabulary + position_weight_SD.shape[0]
    if not rows:
        return grad_word_VD.zero_(), grad_position_SD.zero_()
    sorted_keys, order = keys.sort(stable=True)
    row = torch.arange(table_rows + 1, device=keys.device, dtype=keys.dtype)
    starts = torch.searchsorted(sorted_keys, row)
    # a table row with entries in n stretches of the list has the slots from here on; so no two rows share one
    first_slot = torch.div(starts, _PIECE, rounding_mode="floor") + row
    slot = torch.arange(triton.cdiv(2 * rows, _PIECE) + table_rows, device=keys.device)
    row_of_slot = torch.searchsorted(first_slot[:-1], slot, right=True) - 1
    partial = grad_embedded_TD.new_empty((slot.shape[0], features))
    blocks = triton.cdiv(features, _COLUMNS)
    _sum_pieces[(slot.shape[0], blocks)](
        grad_embedded_TD, order, starts, row_of_slot, partial, grad_word_VD, grad_position_SD, rows,
        vocabulary, features, _PIECE, _ROWS, _COLUMNS, num_warps=2,
    )  # fmt: skip
    _add_pieces[(table_rows, blocks)](
        starts, partial, grad_word_VD, grad_position_SD, vocabulary, features, _PIECE, _ROWS, _COLUMNS,
        num_warps=2,
    )  # fmt: skip
    return grad_word_VD, grad_position_SD
