"""Dropout and addition in plain PyTorch, LayerNorm by NVIDIA apex: a third-party baseline, named only.

apex fuses nothing else than the LayerNorm, so the dropout in front of it is ours and its bits are the
library's. Its functions are those of ``apex.normalization`` built with CUDA extensions; PyPI's "apex" is
another package.
"""

from __future__ import annotations

from typing import Any

import fused_layer_norm_cuda  # noqa: F401  apex's extension, which it would miss only when called
import torch
from apex.normalization import fused_layer_norm
from torch import Tensor

from mage_fast.kernels import dispatch, rng

DEVICES = ("cuda",)
if not hasattr(fused_layer_norm, "fused_layer_norm_affine_fwd"):
    raise dispatch.Unsupported("this apex is too old, fused_layer_norm_affine_fwd is missing")


def unsupported(function: str, *args: Any) -> str | None:
    rows, weight = (args[1], args[2]) if function == "add_norm" else (args[2], args[5])
    if weight.dtype != rows.dtype:
        return f"apex wants weight in the residual's dtype, got {weight.dtype} and {rows.dtype}"
    return None


def add_norm(
    branch_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(residual_TD.dtype, torch.float32)
    branch = rng.dropout(branch_TD.to(accumulate), rng_state, stream, dropout)
    out_TD = (residual_TD.to(accumulate) + branch).to(residual_TD.dtype).contiguous()
    normed_TD, mean_T, rstd_T = fused_layer_norm.fused_layer_norm_affine_fwd(
        out_TD, weight_D.contiguous(), bias_D.contiguous(), list(weight_D.shape), eps, False
    )
    return out_TD, normed_TD.to(branch_TD.dtype), mean_T.view(-1, 1), rstd_T.view(-1, 1)


def add_norm_backward(
    grad_out_TD: Tensor,
    grad_normed_TD: Tensor,
    out_TD: Tensor,
    mean_T1: Tensor,
    rstd_T1: Tensor,
    weight_D: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = mean_T1.dtype
    weight_D = weight_D.contiguous()
    # eps is in rstd already, and of the bias apex reads only dtype and shape
    through_norm_TD, grad_weight_D, grad_bias_D = fused_layer_norm.fused_layer_norm_affine_bwd(
        grad_normed_TD.to(out_TD.dtype).contiguous(), mean_T1.flatten(), rstd_T1.flatten(), out_TD,
        list(weight_D.shape), weight_D, weight_D, 0.0, False,
    )  # fmt: skip
    grad_sum_TD = (through_norm_TD.to(accumulate) + grad_out_TD.to(accumulate)).contiguous()
    return (
        rng.dropout(grad_sum_TD, rng_state, stream, dropout).to(grad_normed_TD.dtype),
        grad_sum_TD.to(out_TD.dtype, copy=dropout == 0.0),
        grad_weight_D,
        grad_bias_D,
    )
