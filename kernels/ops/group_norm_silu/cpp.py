"""GroupNorm and SiLU in C++ (``csrc/group_norm_silu.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported, wide
from mage_fast.kernels.ops.group_norm_silu.reference import memory_format

__all__ = ["DEVICES", "group_norm_silu", "group_norm_silu_backward", "unsupported"]


def _in_memory_order(x_NCHW: Tensor, channels_last: bool) -> Tensor:
    return x_NCHW.permute(0, 2, 3, 1) if channels_last else x_NCHW


def group_norm_silu(
    x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    format = memory_format(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=format)
    out_NCHW = torch.empty_like(x_NCHW, memory_format=format)
    mean_NG = x_NCHW.new_empty((x_NCHW.shape[0], num_groups), dtype=torch.float32)
    rstd_NG = torch.empty_like(mean_NG)
    last = format is torch.channels_last
    torch.ops.mage_fast_cpu.group_norm_silu(
        _in_memory_order(x_NCHW, last), wide(weight_C), wide(bias_C), last, num_groups, eps,
        _in_memory_order(out_NCHW, last), mean_NG, rstd_NG,
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
    grad_weight_NC = mean_NG.new_empty(x_NCHW.shape[:2])
    grad_bias_NC = torch.empty_like(grad_weight_NC)
    last = format is torch.channels_last
    torch.ops.mage_fast_cpu.group_norm_silu_backward(
        _in_memory_order(grad_NCHW, last), _in_memory_order(x_NCHW, last), wide(weight_C), wide(bias_C),
        mean_NG.contiguous(), rstd_NG.contiguous(), last, num_groups,
        _in_memory_order(grad_x_NCHW, last), grad_weight_NC, grad_bias_NC,
    )  # fmt: skip
    return grad_x_NCHW, grad_weight_NC.sum(0).to(weight_C.dtype), grad_bias_NC.sum(0).to(bias_C.dtype)
