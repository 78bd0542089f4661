"""Linear layer and cross-entropy in chunks of rows: cuBLAS products around one kernel over the logits.

A chunk's logits are made by a GEMM, turned into their gradients where they lie by the kernel of
:mod:`~mage_fast.kernels.ops.masked_cross_entropy.triton`, used by the gradients' GEMMs, and overwritten by
the next chunk's. A chunk is small enough to stay in the L2 cache from one to the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels.ops.masked_cross_entropy.triton import mean, row_losses
from mage_fast.kernels.triton_support import DEVICES, unsupported

__all__ = ["DEVICES", "linear_cross_entropy", "linear_cross_entropy_backward", "unsupported"]
#: Most bytes of logits at a time: they fit the L2 cache (40 MB on an A100, 50 MB on an H100).
CHUNK_BYTES = 32 * 2**20
_BLOCK = 1024


def chunk_rows(rows: int, classes: int, features: int, itemsize: int, with_weight_gradient: bool) -> int:
    """Rows a chunk, chunks of nearly the same size.

    Where the weight's gradient is wanted each chunk reads and writes its float32 sums, so a chunk may hold
    as many bytes as they do: they are held anyway.
    """
    most = max(CHUNK_BYTES, 4 * classes * features if with_weight_gradient else 0)
    most_rows = max(1, most // (classes * itemsize))
    chunks = max(1, triton.cdiv(rows, most_rows))
    # tiles of a GEMM are of 128 rows; at the most 127 rows more than an equal share, still within the bound
    return min(most_rows, triton.cdiv(triton.cdiv(rows, chunks), 128) * 128)


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
    (rows, features), classes = hidden_ND.shape, weight_CD.shape[0]
    targets_N = targets_N.contiguous()
    losses_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
    lse_N = (
        None
        if with_hidden_gradient or with_weight_gradient or with_bias_gradient
        else torch.empty_like(losses_N)
    )
    bias_C = None if bias_C is None else bias_C.to(hidden_ND.dtype)
    chunk = chunk_rows(rows, classes, features, hidden_ND.element_size(), with_weight_gradient)
    logits_KC = hidden_ND.new_empty(min(chunk, rows), classes)
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
        row_losses(
            x_KC, targets_N[part], label_smoothing, losses_N[part], None if lse_N is None else lse_N[part]
        )
        # from here on x holds d row loss / d logits
        if with_hidden_gradient:
            torch.mm(x_KC, weight_CD, out=grad_hidden[part])
        if with_weight_gradient:
            _add_product(grad_weight, x_KC, hidden_ND[part])
        if with_bias_gradient:
            grad_bias += x_KC.sum(0, dtype=torch.float32)
    loss, count = mean(losses_N)
    return loss, count, grad_hidden, grad_weight, grad_bias


def _add_product(sum_CD: Tensor, x_KC: Tensor, hidden_KD: Tensor) -> None:
    """``sum += x.T @ hidden``, the sum in float32."""
    if x_KC.dtype == torch.float32:
        sum_CD.addmm_(x_KC.T, hidden_KD)
    else:
        sum_CD += x_KC.T @ hidden_KD


@triton.jit
def _scaled(grad, count, x, out, elements, BLOCK: tl.constexpr):
    """out = x * grad / count, in float32 until it is stored."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grad).to(tl.float32) / tl.load(count)
    y = tl.load(x + element, mask=element < elements).to(tl.float32) * scale
    tl.store(out + element, y.to(out.dtype.element_ty), mask=element < elements)


def linear_cross_entropy_backward(
    grad: Tensor, count: Tensor, grad_of_sum: Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.empty_like(grad_of_sum, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        _scaled[grid](grad, count, grad_of_sum, out, out.numel(), _BLOCK)
    return out
