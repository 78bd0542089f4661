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
from mage_fast.kernels.triton_support import DEVICES, unsupported

__all__ = ["DEVICES", "bias_gelu", "bias_gelu_backward", "unsupported"]
_ROWS, _COLUMNS = 4, 512
#: Rows that one program of the backward walks over.
_ROWS_SUMMED = 64


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _forward(
    x, bias, out, state, rows, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    element = row[:, None] * features + column[None, :]
    shift = tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    s = tl.load(x + element, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    y = s * _normal_cdf(s)
    if DROPOUT:
        keep = keep_rows(state, stream, row * features + first_column, least_kept, COLUMNS, ALIGNED)
        y = tl.where(keep, y * scale, 0.0)
    tl.store(out + element, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, bias, grad_x, partial_bias, state, rows, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_SUMMED: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    shift = tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    for offset in range(0, ROWS_SUMMED, ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS_SUMMED + offset + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < features)[None, :]
        element = row[:, None] * features + column[None, :]
        s = tl.load(x + element, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        grad_y = tl.load(grad + element, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = keep_rows(state, stream, row * features + first_column, least_kept, COLUMNS, ALIGNED)
            grad_y = tl.where(keep, grad_y * scale, 0.0)
        # d (s Phi(s)) / d s = Phi(s) + s phi(s)
        density = 0.3989422804014327 * tl.exp(-0.5 * s * s)
        grad_s = grad_y * (_normal_cdf(s) + s * density)
        tl.store(grad_x + element, grad_s.to(grad_x.dtype.element_ty), mask=inside)
        sum_bias += tl.sum(grad_s, 0)
    tl.store(partial_bias + tl.program_id(0) * features + column, sum_bias, mask=column < features)


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
    partial_PF = x_TF.new_empty((grid[0], features), dtype=torch.float32)
    if rows:
        _backward[grid](
            grad_TF, x_TF, bias_F, grad_x_TF, partial_PF,
            *_dropout_arguments(x_TF, dropout, rng_state, stream), _ROWS_SUMMED,
        )  # fmt: skip
    return grad_x_TF, partial_PF.sum(0).to(bias_F.dtype)


def _dropout_arguments(x_TF: Tensor, dropout: float, rng_state: Tensor | None, stream: int) -> tuple:
    rows, features = x_TF.shape
    bits = rng.ACTIVATION_BITS
    return (
        x_TF if rng_state is None else rng_state.contiguous(), rows, features, stream,
        rng.least_kept(dropout, bits), rng.keep_scale(dropout, bits),
        dropout > 0.0, features % 8 == 0, _ROWS, _COLUMNS,
    )  # fmt: skip
