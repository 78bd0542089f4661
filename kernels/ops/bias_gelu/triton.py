"""Bias, erf GELU and dropout as Triton kernels: one pass over the rows, forward and backward.

A program owns ``ROWS x COLUMNS`` elements. The dropout mask is drawn again in the backward; the bias
gradient is summed over a program's rows, then over programs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.triton_random import keep_rows
from mage_fast.kernels.triton_sums import sum_partials
from mage_fast.kernels.triton_support import DEVICES, unsupported

__all__ = ["DEVICES", "bias_gelu", "bias_gelu_backward", "unsupported"]
_ROWS, _COLUMNS = 2, 1024
#: Rows that one program of the backward walks over.
_ROWS_SUMMED = 64


@triton.jit
def _upper_tail(a):
    """1 - Phi(a) of a >= 0 as 2 ** (a q(a) - 1), q a polynomial; within 5e-8, a rounding of 1 - Phi(0).

    The coefficients are a weighted minimax fit on [0, 5.6], beyond which the tail falls to 0. A third of the
    instructions of tl.erf, which computes both of its branches and selects.
    """
    q = -2.834910674209823e-06
    q = q * a + 3.937766086892225e-05
    q = q * a - 0.0001861800701590255
    q = q * a - 0.00013693679647985846
    q = q * a + 0.0070634204894304276
    q = q * a - 0.052496179938316345
    q = q * a - 0.4592081904411316
    q = q * a - 1.1511051654815674
    return tl.exp2(q * a - 1.0)


@triton.jit
def _magnitude(s):
    """|s|, no more than where the tail has underflowed: so infinity times its tail is 0. NaN stays."""
    return tl.minimum(tl.abs(s), 16.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(s):
    # s Phi(s), from the tail of the normal distribution on the side of s
    a = _magnitude(s)
    return tl.maximum(s, 0.0) - a * _upper_tail(a)


@triton.jit
def _gelu_slope(s):
    # Phi(s) + s phi(s); of -s it is one less that of s
    a = _magnitude(s)
    density = tl.exp2(-0.7213475204444817 * a * a - 1.3257480647361595)
    below = _upper_tail(a) - a * density
    return tl.where(s > 0.0, 1.0 - below, below)


@triton.jit
def _forward(
    x, bias, out, state, rows, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    element = row[:, None] * features + column[None, :]
    shift = tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    s = tl.load(x + element, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    y = _gelu(s)
    if DROPOUT:
        keep = keep_rows(state, stream, row * features + first_column, least_kept, COLUMNS, ALIGNED, WIDTH)
        y = tl.where(keep, y * scale, 0.0)
    tl.store(out + element, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, bias, grad_x, partial_bias, state, rows, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS_SUMMED: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    shift = tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    first_row = tl.program_id(0).to(tl.int64) * ROWS_SUMMED
    for start in range(first_row, min(first_row + ROWS_SUMMED, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < features)[None, :]
        element = row.to(tl.int64)[:, None] * features + column[None, :]
        s = tl.load(x + element, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        grad_y = tl.load(grad + element, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            first = row.to(tl.int64) * features + first_column
            keep = keep_rows(state, stream, first, least_kept, COLUMNS, ALIGNED, WIDTH)
            grad_y = tl.where(keep, grad_y * scale, 0.0)
        grad_s = grad_y * _gelu_slope(s)
        tl.store(grad_x + element, grad_s.to(grad_x.dtype.element_ty), mask=inside)
        sum_bias += tl.sum(grad_s, 0)
    partial_bias += tl.program_id(0).to(tl.int64) * features
    tl.store(partial_bias + column, sum_bias, mask=column < features)


def bias_gelu(x_TF: Tensor, bias_F: Tensor, dropout: float, rng_state: Tensor | None, stream: int) -> Tensor:
    x_TF, bias_F = x_TF.contiguous(), bias_F.contiguous()
    rows, features = x_TF.shape
    out_TF = torch.empty_like(x_TF)
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(features, _COLUMNS))
        _forward[grid](x_TF, bias_F, out_TF, *_dropout_arguments(x_TF, dropout, rng_state, stream))
    return out_TF


def bias_gelu_backward(
    grad_TF: Tensor,
    x_TF: Tensor,
    bias_F: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    grad_TF, x_TF, bias_F = grad_TF.contiguous(), x_TF.contiguous(), bias_F.contiguous()
    rows, features = x_TF.shape
    grad_x_TF = torch.empty_like(x_TF)
    grid = (triton.cdiv(rows, _ROWS_SUMMED), triton.cdiv(features, _COLUMNS))
    partial_1PF = x_TF.new_empty((1, grid[0], features), dtype=torch.float32)
    if rows:
        _backward[grid](
            grad_TF, x_TF, bias_F, grad_x_TF, partial_1PF,
            *_dropout_arguments(x_TF, dropout, rng_state, stream), _ROWS_SUMMED,
        )  # fmt: skip
    grad_bias_F = torch.empty_like(bias_F)
    sum_partials(partial_1PF, grad_bias_F)
    return grad_x_TF, grad_bias_F


def _dropout_arguments(x_TF: Tensor, dropout: float, rng_state: Tensor | None, stream: int) -> tuple:
    rows, features = x_TF.shape
    bits = rng.ACTIVATION_BITS
    return (
        x_TF if rng_state is None else rng_state.contiguous(), rows, features, stream,
        rng.least_kept(dropout, bits), rng.keep_scale(dropout, bits),
        dropout > 0.0, features % 8 == 0, 16 // max(2, x_TF.element_size()), _ROWS, _COLUMNS,
    )  # fmt: skip
