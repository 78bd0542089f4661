"""Bias, GELU and dropout as equations.

s = x + bias
y = dropout(s * Phi(s)),  Phi the standard normal distribution function
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng


def bias_gelu(x_TF: Tensor, bias_F: Tensor, dropout: float, rng_state: Tensor | None, stream: int) -> Tensor:
    accumulate = torch.promote_types(x_TF.dtype, torch.float32)
    sum_TF = x_TF.to(accumulate) + bias_F.to(accumulate)
    return rng.dropout(F.gelu(sum_TF), rng_state, stream, dropout).to(x_TF.dtype).contiguous()


def bias_gelu_backward(
    grad_TF: Tensor,
    x_TF: Tensor,
    bias_F: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(x_TF.dtype, torch.float32)
    sum_TF = x_TF.to(accumulate) + bias_F.to(accumulate)
    # d (s Phi(s)) / d s = Phi(s) + s phi(s)
    grad_gelu_TF = rng.dropout(grad_TF.to(accumulate), rng_state, stream, dropout)
    grad_sum_TF = torch.ops.aten.gelu_backward(grad_gelu_TF, sum_TF)
    return grad_sum_TF.to(x_TF.dtype).contiguous(), grad_sum_TF.sum(0).to(bias_F.dtype)
