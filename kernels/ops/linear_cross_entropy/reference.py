"""A linear layer onto classes and its label-smoothed cross-entropy, as equations.

logits = hidden @ weight.T + bias
loss   = masked_cross_entropy(logits, targets)
d      = d (sum of the row losses) / d logits, from the same
d sum / d hidden = d @ weight,  d sum / d weight = d.T @ hidden,  d sum / d bias = sum over rows of d

The gradients are those of the sum, not of the mean: a mean over many rows would lose the small ones to
float16 before the incoming gradient (a loss scale) is known.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels.ops.masked_cross_entropy.reference import (
    masked_cross_entropy,
    masked_cross_entropy_backward,
)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    targets_N: Tensor,
    label_smoothing: float,
    with_hidden_gradient: bool,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_NC = F.linear(hidden_ND, weight_CD, None if bias_C is None else bias_C.to(hidden_ND.dtype))
    loss, lse_N, count = masked_cross_entropy(logits_NC, targets_N, label_smoothing)
    grad_hidden, grad_weight, grad_bias = hidden_ND.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    if with_hidden_gradient or with_weight_gradient or with_bias_gradient:
        # the count as incoming gradient cancels the mean's division
        d_NC = masked_cross_entropy_backward(count, logits_NC, lse_N, count, targets_N, label_smoothing)
        if with_hidden_gradient:
            grad_hidden = (d_NC @ weight_CD).contiguous()
        if with_weight_gradient:
            grad_weight = (d_NC.to(accumulate).T @ hidden_ND.to(accumulate)).contiguous()
        if with_bias_gradient:
            grad_bias = d_NC.sum(0, dtype=accumulate)
    return loss, count, grad_hidden, grad_weight, grad_bias


def linear_cross_entropy_backward(
    grad: Tensor, count: Tensor, grad_of_sum: Tensor, dtype: torch.dtype
) -> Tensor:
    return (grad_of_sum.to(count.dtype) * (grad.to(count.dtype) / count)).to(dtype)
