"""Dropout, residual addition and LayerNorm in C++ (``csrc/add_norm.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, activation_dropout, unsupported, wide

__all__ = ["DEVICES", "add_norm", "add_norm_backward", "unsupported"]


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
    out_TD, normed_TD = torch.empty_like(residual_TD), torch.empty_like(branch_TD)
    mean_T1 = branch_TD.new_empty((branch_TD.shape[0], 1), dtype=torch.float32)
    rstd_T1 = torch.empty_like(mean_T1)
    drop = activation_dropout(dropout, rng_state, stream)
    torch.ops.mage_fast_cpu.add_norm.default(
        branch_TD, residual_TD, wide(weight_D), wide(bias_D), eps, *drop, out_TD, normed_TD, mean_T1, rstd_T1
    )
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
    grad_out_TD, grad_normed_TD = grad_out_TD.to(out_TD.dtype).contiguous(), grad_normed_TD.contiguous()
    out_TD = out_TD.contiguous()
    grad_branch_TD, grad_residual_TD = torch.empty_like(grad_normed_TD), torch.empty_like(out_TD)
    grad_weight_D = weight_D.new_empty(weight_D.shape, dtype=torch.float32)
    grad_bias_D = torch.empty_like(grad_weight_D)
    drop = activation_dropout(dropout, rng_state, stream)
    torch.ops.mage_fast_cpu.add_norm_backward.default(
        grad_out_TD, grad_normed_TD, out_TD, mean_T1.contiguous(), rstd_T1.contiguous(), wide(weight_D),
        *drop, grad_branch_TD, grad_residual_TD, grad_weight_D, grad_bias_D,
    )  # fmt: skip
    return grad_branch_TD, grad_residual_TD, grad_weight_D.to(weight_D.dtype), grad_bias_D.to(weight_D.dtype)
