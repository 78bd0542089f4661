"""Dropout, residual addition and LayerNorm as equations.

s = residual + dropout(branch)
y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels import rng


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
    accumulate = torch.promote_types(residual_TD.dtype, torch.float32)
    sum_TD = residual_TD.to(accumulate) + rng.dropout(branch_TD.to(accumulate), rng_state, stream, dropout)
    out_TD = sum_TD.to(residual_TD.dtype).contiguous()
    normed_TD, mean_T1, rstd_T1 = torch.native_layer_norm(
        out_TD.to(accumulate), weight_D.shape, weight_D.to(accumulate), bias_D.to(accumulate), eps
    )
    return out_TD, normed_TD.to(branch_TD.dtype), mean_T1, rstd_T1


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
    accumulate = mean_T1.dtype
    normalized_TD = (out_TD.to(accumulate) - mean_T1) * rstd_T1
    grad_TD = grad_normed_TD.to(accumulate)
    weighted_TD = grad_TD * weight_D.to(accumulate)
    # d y / d s through mean and variance: remove the parts along 1 and along the normalised row
    along_one_T1 = weighted_TD.mean(-1, keepdim=True)
    along_row_T1 = (weighted_TD * normalized_TD).mean(-1, keepdim=True)
    grad_sum_TD = (weighted_TD - along_one_T1 - normalized_TD * along_row_T1) * rstd_T1
    grad_sum_TD = (grad_sum_TD + grad_out_TD.to(accumulate)).contiguous()
    return (
        rng.dropout(grad_sum_TD, rng_state, stream, dropout).to(grad_normed_TD.dtype),
        # without dropout the two gradients are equal, but an op's outputs must not share memory
        grad_sum_TD.to(out_TD.dtype, copy=dropout == 0.0),
        (grad_TD * normalized_TD).sum(0).to(weight_D.dtype),
        grad_TD.sum(0).to(weight_D.dtype),
    )
