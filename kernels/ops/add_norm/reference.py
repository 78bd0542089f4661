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
    weight = weight_D.to(accumulate)
    # through mean and variance, the gradient loses its parts along 1 and along the normalised row
    through_norm_TD, grad_weight_D, grad_bias_D = torch.ops.aten.native_layer_norm_backward(
        grad_normed_TD.to(accumulate).contiguous(), out_TD.to(accumulate), weight.shape, mean_T1, rstd_T1,
        weight, weight, [True] * 3,
    )  # fmt: skip
    grad_sum_TD = (through_norm_TD + grad_out_TD.to(accumulate)).contiguous()
    return (
        rng.dropout(grad_sum_TD, rng_state, stream, dropout).to(grad_normed_TD.dtype),
        # without dropout the two gradients are equal, but an op's outputs must not share memory
        grad_sum_TD.to(out_TD.dtype, copy=dropout == 0.0),
        grad_weight_D.to(weight_D.dtype),
        grad_bias_D.to(weight_D.dtype),
    )
