"""GroupNorm and SiLU in C++ (``csrc/group_norm_silu.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported, wide
from mage_fast.kernels.ops.group_norm_silu.reference import memory_format

__all__ = ["DEVICES", "group_norm_silu", "group_norm_silu_backward", "unsupported"]


def group_norm_silu(
    x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    format = memory_format(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=format)
    out_NCHW = torch.empty_like(x_NCHW, memory_format=format)
    mean_NG = x_NCHW.new_empty((x_NCHW.shape[0], num_groups), dtype=torch.float32)
    rstd_NG = torch.empty_like(mean_NG)
    torch.ops.mage_fast_cpu.group_norm_silu.default(
        x_NCHW, wide(weight_C), wide(bias_C), format is torch.channels_last, num_groups, eps,
        out_NCHW, mean_NG, rstd_NG,
    )  # fmt: skip
    return out_NCHW, mean_NG, rstd_NG


def group_norm_silu_backward(
    grad_NCHW: Tensor,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    format = memory_format(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=format)
    grad_NCHW = grad_NCHW.to(x_NCHW.dtype).contiguous(memory_format=format)
    grad_x_NCHW = torch.empty_like(x_NCHW, memory_format=format)
    weight_wide_C, bias_wide_C = wide(weight_C), wide(bias_C)
    grad_weight_C, grad_bias_C = torch.empty_like(weight_wide_C), torch.empty_like(bias_wide_C)
    torch.ops.mage_fast_cpu.group_norm_silu_backward.default(
        grad_NCHW, x_NCHW, weight_wide_C, bias_wide_C, mean_NG.contiguous(), rstd_NG.contiguous(),
        format is torch.channels_last, num_groups, grad_x_NCHW, grad_weight_C, grad_bias_C,
    )  # fmt: skip
    return grad_x_NCHW, grad_weight_C.to(weight_C.dtype), grad_bias_C.to(bias_C.dtype)
