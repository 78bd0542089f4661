"""GroupNorm and SiLU as equations.

y = (x - mean_group(x)) / sqrt(var_group(x) + eps) * weight + bias
out = y * sigmoid(y)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x_NCHW: Tensor) -> torch.memory_format:
    """The format that the op's results have: channels_last if x has it, else contiguous."""
    contiguous = x_NCHW.is_contiguous() or not x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if contiguous else torch.channels_last


def _norm_format(x_NCHW: Tensor) -> torch.memory_format:
    """What torch's group norm takes: both formats on the CPU, contiguous elsewhere."""
    return memory_format(x_NCHW) if x_NCHW.is_cpu else torch.contiguous_format


def group_norm_silu(
    x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x_NCHW.shape
    accumulate = torch.promote_types(x_NCHW.dtype, torch.float32)
    y_NCHW, mean_NG, rstd_NG = torch.native_group_norm(
        x_NCHW.to(accumulate).contiguous(memory_format=_norm_format(x_NCHW)),
        weight_C.to(accumulate), bias_C.to(accumulate), n, c, h * w, num_groups, eps,
    )  # fmt: skip
    out_NCHW = F.silu(y_NCHW, inplace=True).to(x_NCHW.dtype)
    return out_NCHW.contiguous(memory_format=memory_format(x_NCHW)), mean_NG, rstd_NG


def group_norm_silu_backward(
    grad_NCHW: Tensor,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x_NCHW.shape
    accumulate, format = mean_NG.dtype, _norm_format(x_NCHW)
    x_acc_NCHW = x_NCHW.to(accumulate).contiguous(memory_format=format)
    weight_acc_C = weight_C.to(accumulate)
    # the normalised y again, as one scale and one shift a channel: y = x * scale + shift
    scale_NC = rstd_NG.repeat_interleave(c // num_groups, 1) * weight_acc_C
    shift_NC = bias_C.to(accumulate) - mean_NG.repeat_interleave(c // num_groups, 1) * scale_NC
    y_NCHW = torch.addcmul(shift_NC[:, :, None, None], x_acc_NCHW, scale_NC[:, :, None, None])
    grad_y_NCHW = torch.ops.aten.silu_backward(grad_NCHW.to(accumulate), y_NCHW)
    grad_x_NCHW, grad_weight_C, grad_bias_C = torch.ops.aten.native_group_norm_backward(
        grad_y_NCHW.contiguous(memory_format=format), x_acc_NCHW, mean_NG, rstd_NG, weight_acc_C,
        n, c, h * w, num_groups, [True, True, True],
    )  # fmt: skip
    return (
        grad_x_NCHW.to(x_NCHW.dtype).contiguous(memory_format=memory_format(x_NCHW)),
        grad_weight_C.to(weight_C.dtype),
        grad_bias_C.to(bias_C.dtype),
    )
