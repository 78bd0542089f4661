"""Bias, GELU and dropout in C++ (``csrc/bias_gelu.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, activation_dropout, unsupported, wide

__all__ = ["DEVICES", "bias_gelu", "bias_gelu_backward", "unsupported"]


def bias_gelu(x_TF: Tensor, bias_F: Tensor, dropout: float, rng_state: Tensor | None, stream: int) -> Tensor:
    x_TF = x_TF.contiguous()
    out_TF = torch.empty_like(x_TF)
    drop = activation_dropout(dropout, rng_state, stream)
    torch.ops.mage_fast_cpu.bias_gelu.default(x_TF, wide(bias_F), *drop, out_TF)
    return out_TF


def bias_gelu_backward(
    grad_TF: Tensor,
    x_TF: Tensor,
    bias_F: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    x_TF, grad_TF = x_TF.contiguous(), grad_TF.to(x_TF.dtype).contiguous()
    grad_x_TF, grad_bias_F = torch.empty_like(x_TF), bias_F.new_empty(bias_F.shape, dtype=torch.float32)
    drop = activation_dropout(dropout, rng_state, stream)
    torch.ops.mage_fast_cpu.bias_gelu_backward.default(
        grad_TF, x_TF, wide(bias_F), *drop, grad_x_TF, grad_bias_F
    )
    return grad_x_TF, grad_bias_F.to(bias_F.dtype)
