"""A linear layer as equations.

y = x W^T + bias
grad x = grad W,  grad W = grad^T x,  grad bias = sum of grad's rows
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    bias_F = None if bias_F is None else bias_F.to(x_TD.dtype)
    return F.linear(x_TD, weight_FD.to(x_TD.dtype), bias_F).contiguous()


def linear_backward(
    grad_TF: Tensor,
    x_TD: Tensor,
    weight_FD: Tensor,
    with_input_gradient: bool,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_TF = grad_TF.to(x_TD.dtype)
    empty = weight_FD.new_empty(0)
    return (
        (grad_TF @ weight_FD.to(x_TD.dtype)).contiguous() if with_input_gradient else x_TD.new_empty(0),
        (grad_TF.T @ x_TD).to(weight_FD.dtype).contiguous() if with_weight_gradient else empty,
        grad_TF.sum(0).to(weight_FD.dtype) if with_bias_gradient else empty.clone(),
    )
