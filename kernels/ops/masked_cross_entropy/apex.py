"""Apex's fused cross-entropy (``apex.contrib.xentropy``) under our arguments.

Its kernels know no row without a target: such a row gets target 0 and its loss and gradient are masked
here, in passes of their own, as Apex's own autograd function does with the losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels.dispatch import Unsupported

try:
    from apex.contrib.xentropy import softmax_xentropy
except ModuleNotFoundError:
    raise
except ImportError as error:
    raise Unsupported("apex was built without its xentropy extension") from error

__all__ = ["DEVICES", "masked_cross_entropy", "masked_cross_entropy_backward", "unsupported"]
DEVICES = ("cuda",)
_kernels = softmax_xentropy.xentropy_cuda


def unsupported(function: str, *args: Any) -> str | None:
    logits = args[0] if function == "masked_cross_entropy" else args[1]
    if logits.dtype == torch.float64:
        return "the kernels compute in float32, got float64"
    if logits.numel() == 0:
        return "it wants at least one row"
    if logits.numel() >= 2**31:
        return f"its addresses are 32 bits, got {logits.numel()} logits"
    return None


def masked_cross_entropy(
    logits_NC: Tensor, targets_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    narrow = logits_NC.dtype != torch.float32  # then the log-sum-exp is float32 all the same
    targets = targets_N.clamp(min=0).long().contiguous()
    losses_N, lse_N = _kernels.forward(logits_NC.contiguous(), targets, label_smoothing, narrow)
    count = (targets_N >= 0).sum().clamp(min=1).float()
    return losses_N.float().masked_fill(targets_N < 0, 0.0).sum() / count, lse_N, count


def masked_cross_entropy_backward(
    grad: Tensor, logits_NC: Tensor, lse_N: Tensor, count: Tensor, targets_N: Tensor, label_smoothing: float
) -> Tensor:
    targets = targets_N.clamp(min=0).long().contiguous()
    grads_N = (grad.float() / count).expand(lse_N.shape).contiguous()
    grad_NC = _kernels.backward(grads_N, logits_NC.contiguous(), lse_N, targets, label_smoothing)
    return grad_NC.masked_fill_(targets_N[:, None] < 0, 0.0)
