"""Label-smoothed cross-entropy in C++ (``csrc/masked_cross_entropy.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported

__all__ = ["DEVICES", "masked_cross_entropy", "masked_cross_entropy_backward", "unsupported"]


def masked_cross_entropy(
    logits_NC: Tensor, targets_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NC, targets_N = logits_NC.contiguous(), targets_N.long().contiguous()
    loss = logits_NC.new_empty((), dtype=torch.float32)
    lse_N, count = loss.new_empty(targets_N.shape), torch.empty_like(loss)
    torch.ops.mage_fast_cpu.masked_cross_entropy.default(
        logits_NC, targets_N, label_smoothing, loss, lse_N, count
    )
    return loss, lse_N, count


def masked_cross_entropy_backward(
    grad: Tensor, logits_NC: Tensor, lse_N: Tensor, count: Tensor, targets_N: Tensor, label_smoothing: float
) -> Tensor:
    logits_NC, targets_N = logits_NC.contiguous(), targets_N.long().contiguous()
    grad_NC = torch.empty_like(logits_NC)
    torch.ops.mage_fast_cpu.masked_cross_entropy_backward.default(
        grad.float(), logits_NC, lse_N.contiguous(), count, targets_N, label_smoothing, grad_NC
    )
    return grad_NC
