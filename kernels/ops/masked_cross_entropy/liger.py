"""Liger-Kernel's cross-entropy under our arguments.

Its forward writes the gradient over the logits that it is given. An op must leave its arguments alone, so
here the forward asks for the loss only, and the backward runs Liger's forward again on a copy: one read and
one write of the logits more than Liger pays inside its own autograd function. It counts the targets on the
host, so it waits for the device and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from torch import Tensor

from mage_fast.kernels import triton_support

__all__ = ["DEVICES", "masked_cross_entropy", "masked_cross_entropy_backward", "unsupported"]
DEVICES = triton_support.DEVICES


def unsupported(function: str, *args: Any) -> str | None:
    logits = args[0] if function == "masked_cross_entropy" else args[1]
    if logits.shape[0] == 0:
        return "it launches no empty grid, got 0 rows"
    return triton_support.unsupported(function, *args)


def _forward(logits_NC: Tensor, targets_N: Tensor, label_smoothing: float) -> tuple:
    # logits, targets, class weights, ignore_index, weight of the z loss, label_smoothing, reduction, softcap,
    # whether the z loss is returned; the loss comes first, the logits, perhaps their gradient now, last
    arguments = (logits_NC, targets_N.long(), None, -1, 0.0, label_smoothing, "mean", None, False)
    return cross_entropy_forward(*arguments)


def masked_cross_entropy(
    logits_NC: Tensor, targets_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _forward(logits_NC.detach(), targets_N, label_smoothing)[0].float()
    # the log-sum-exp and the count stay inside Liger; nothing reads these
    return loss, loss.new_zeros(targets_N.shape), torch.ones_like(loss)


def masked_cross_entropy_backward(
    grad: Tensor, logits_NC: Tensor, lse_N: Tensor, count: Tensor, targets_N: Tensor, label_smoothing: float
) -> Tensor:
    # that a gradient is wanted it sees by requires_grad
    copy_NC = logits_NC.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    grad_NC = _forward(copy_NC, targets_N, label_smoothing)[-1]
    return cross_entropy_backward(grad_NC.detach(), grad).detach()
