"""Dropout, residual addition and LayerNorm as Triton kernels: one pass over the rows each way.

Forward: a program owns a row and holds it in registers, so the variance takes its second pass there.
Backward: a program walks every n-th row and sums the gradients of scale and shift as it goes; the programs'
sums are added in their order. The dropout mask is drawn again.
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

__all__ = ["DEVICES", "add_norm", "add_norm_backward", "unsupported"]
#: A row is held in registers. Fewer where loads are of two widths or not aligned, which takes more of them.
_MOST_FEATURES = 8192
#: Warps of the backward on a multiprocessor, all of them resident: bytes in flight without many partial sums.
_WARPS = 20


@triton.jit
def _forward(
    branch, residual, weight, bias, out, normed, mean, rstd, eps, state, features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * features
    column = tl.arange(0, COLUMNS)
    inside = column < features
    y = tl.load(branch + start + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        y = tl.where(keep_row(state, stream, start, least_kept, COLUMNS, ALIGNED, WIDTH), y * scale, 0.0)
    rounded = (s + y).to(out.dtype.element_ty)
    tl.store(out + start + column, rounded, mask=inside)
    # the statistics are those of the rows that the backward reads
    s = rounded.to(tl.float32)
    center = tl.sum(s, 0) / features
    deviation = tl.where(inside, s - center, 0.0)
    inverse = tl.rsqrt(tl.sum(deviation * deviation, 0) / features + eps)
    scale_D = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift_D = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    n = deviation * inverse * scale_D + shift_D
    tl.store(normed + start + column, n.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean + row, center)
    tl.store(rstd + row, inverse)


@triton.jit
def _backward(
    grad_out, grad_normed, out, mean, rstd, weight, grad_branch, grad_residual, partial, rows, state,
    features, stream, least_kept, scale,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    inside = column < features
    sum_weight = tl.zeros([COLUMNS], tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        start = row * features
        g = tl.load(grad_normed + start + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(out + start + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad_out + start + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        x = tl.where(inside, (s - tl.load(mean + row)) * inverse, 0.0)
        sum_weight += g * x
        sum_bias += g
        # read again for each row, from the cache: held, it costs more registers than it saves
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        # through mean and variance, the gradient loses its parts along 1 and along the normalised row
        sum_g, sum_gx = tl.split(tl.sum(tl.join(g, g * x), 0))
        d += inverse * (g - sum_g / features - x * (sum_gx / features))
        tl.store(grad_residual + start + column, d.to(grad_residual.dtype.element_ty), mask=inside)
        if DROPOUT:
            d = tl.where(keep_row(state, stream, start, least_kept, COLUMNS, ALIGNED, WIDTH), d * scale, 0.0)
        tl.store(grad_branch + start + column, d.to(grad_branch.dtype.element_ty), mask=inside)
    partial += program * features
    tl.store(partial + column, sum_weight, mask=inside)
    tl.store(partial + tl.num_programs(0) * features + column, sum_bias, mask=inside)


def unsupported(function: str, *args: Any) -> str | None:
    features = args[0].shape[-1]
    narrow = 2 if args[0].dtype != args[1].dtype else 1
    most = _MOST_FEATURES // (narrow if features % 8 == 0 else 4)
    if features > most:
        return f"a row of {features} features does not fit in registers, at most {most}"
    return triton_support.unsupported(function, *args)


def add_norm(
    branch_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch_TD, residual_TD = branch_TD.contiguous(), residual_TD.contiguous()
    rows, features = branch_TD.shape
    out_TD, normed_TD = torch.empty_like(residual_TD), torch.empty_like(branch_TD)
    mean_T1 = branch_TD.new_empty((rows, 1), dtype=torch.float32)
    rstd_T1 = torch.empty_like(mean_T1)
    if rows:
        columns = triton.next_power_of_2(features)
        _forward[(rows,)](
            branch_TD, residual_TD, weight_D.contiguous(), bias_D.contiguous(), out_TD, normed_TD, mean_T1,
            rstd_T1, eps, *row_dropout(branch_TD, dropout, rng_state, stream),
            num_warps=_warps(columns, 32),
        )  # fmt: skip
    return out_TD, normed_TD, mean_T1, rstd_T1


def add_norm_backward(
    grad_out_TD: Tensor,
    grad_normed_TD: Tensor,
    out_TD: Tensor,
    mean_T1: Tensor,
    rstd_T1: Tensor,
    weight_D: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out_TD, grad_normed_TD = grad_out_TD.contiguous(), grad_normed_TD.contiguous()
    out_TD = out_TD.contiguous()
    rows, features = out_TD.shape
    grad_branch_TD, grad_residual_TD = torch.empty_like(grad_normed_TD), torch.empty_like(out_TD)
    grad_weight_D = weight_D.new_empty(features)
    grad_bias_D = weight_D.new_empty(features)
    columns = row_columns(features)
    warps = _warps(columns, 8)
    programs = min(rows, max(1, _WARPS // warps) * multiprocessors(out_TD))
    partial_2PD = out_TD.new_empty((2, programs, features), dtype=torch.float32)
    if rows:
        _backward[(programs,)](
            grad_out_TD, grad_normed_TD, out_TD, mean_T1.contiguous(), rstd_T1.contiguous(),
            weight_D.contiguous(), grad_branch_TD, grad_residual_TD, partial_2PD, rows,
            *row_dropout(grad_normed_TD, dropout, rng_state, stream), num_warps=warps,
        )  # fmt: skip
    sum_partials(partial_2PD, grad_weight_D, grad_bias_D)
    return grad_branch_TD, grad_residual_TD, grad_weight_D, grad_bias_D


def _warps(columns: int, elements: int) -> int:
    """Of a program whose threads hold about that many elements of a row each."""
    return min(16, max(1, columns // (32 * elements)))
