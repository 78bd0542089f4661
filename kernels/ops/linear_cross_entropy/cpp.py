"""Linear layer and cross-entropy in chunks: torch's products around ``csrc/linear_cross_entropy.cpp``.

A chunk's logits are turned into their gradients where they lie, used by the gradients' products, and
overwritten by the next chunk's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported

__all__ = ["DEVICES", "linear_cross_entropy", "linear_cross_entropy_backward", "unsupported"]
#: Bytes of logits at a time, which a cache shared by all cores holds, and the fewest rows of a product that
#: reads the weight once.
CHUNK_BYTES, LEAST_ROWS = 8 * 2**20, 512


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
    rows, classes = hidden_ND.shape[0], weight_CD.shape[0]
    with_gradient = with_hidden_gradient or with_weight_gradient or with_bias_gradient
    targets_N = targets_N.long().contiguous()
    losses_N = torch.empty(rows, dtype=torch.float32)
    loss, count = torch.empty((), dtype=torch.float32), torch.empty((), dtype=torch.float32)
    bias_C = None if bias_C is None else bias_C.to(hidden_ND.dtype)
    chunk = min(rows, max(LEAST_ROWS, CHUNK_BYTES // (classes * hidden_ND.element_size())))
    logits_KC = hidden_ND.new_empty(chunk, classes)
    grad_hidden = hidden_ND.new_empty(hidden_ND.shape if with_hidden_gradient else 0)
    grad_weight = losses_N.new_zeros(weight_CD.shape if with_weight_gradient else 0)
    grad_bias = losses_N.new_zeros(classes if with_bias_gradient else 0)
    for start in range(0, rows, max(1, chunk)):
        part = slice(start, start + chunk)
        x_KC = logits_KC[: min(chunk, rows - start)]
        if bias_C is None:
            torch.mm(hidden_ND[part], weight_CD.T, out=x_KC)
        else:
            torch.addmm(bias_C, hidden_ND[part], weight_CD.T, out=x_KC)
        torch.ops.mage_fast_cpu.linear_cross_entropy_rows.default(
            x_KC, targets_N[part], label_smoothing, with_gradient, losses_N[part],
            grad_bias if with_bias_gradient else None,
        )  # fmt: skip
        # from here on x holds d row loss / d logits
        if with_hidden_gradient:
            torch.mm(x_KC, weight_CD, out=grad_hidden[part])
        if with_weight_gradient and x_KC.dtype == torch.float32:
            grad_weight.addmm_(x_KC.T, hidden_ND[part])
        elif with_weight_gradient:
            grad_weight += x_KC.T @ hidden_ND[part]
    torch.ops.mage_fast_cpu.linear_cross_entropy_mean.default(losses_N, targets_N, loss, count)
    return loss, count, grad_hidden, grad_weight, grad_bias


def linear_cross_entropy_backward(
    grad: Tensor, count: Tensor, grad_of_sum: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.mul(grad_of_sum, grad.float() / count, out=torch.empty_like(grad_of_sum, dtype=dtype))
