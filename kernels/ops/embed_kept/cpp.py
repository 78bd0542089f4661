"""Embedding of the kept tokens in C++ (``csrc/embed_kept.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import cpp_support
from mage_fast.kernels.cpp_support import DEVICES, activation_dropout, wide

__all__ = ["DEVICES", "embed_kept", "embed_kept_backward", "unsupported"]


def unsupported(function: str, *args: Any) -> str | None:
    word_weight_VD, position_weight_SD = args[4:6] if function == "embed_kept" else args[5:7]
    if word_weight_VD.dtype != position_weight_SD.dtype:
        return "the kernel wants both tables in one dtype"
    return cpp_support.unsupported(function, *args)


def embed_kept(
    ids_BL: Tensor,
    class_ids_B: Tensor,
    positions_T: Tensor,
    is_masked_BL: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    mask_token_id: int,
    eps: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = positions_T.shape[0]
    x_TD = word_weight_VD.new_empty((rows, word_weight_VD.shape[1]))
    ids_T = positions_T.new_empty(rows, dtype=torch.int32)
    mean_T1 = word_weight_VD.new_empty((rows, 1), dtype=torch.float32)
    rstd_T1 = torch.empty_like(mean_T1)
    torch.ops.mage_fast_cpu.embed_kept.default(
        ids_BL.contiguous(), class_ids_B.contiguous(), positions_T.contiguous(), is_masked_BL.contiguous(),
        word_weight_VD.contiguous(), position_weight_SD.contiguous(), wide(norm_weight_D), wide(norm_bias_D),
        mask_token_id, eps, *activation_dropout(dropout, rng_state, stream), x_TD, ids_T, mean_T1, rstd_T1,
    )  # fmt: skip
    return x_TD, ids_T, mean_T1, rstd_T1


def embed_kept_backward(
    grad_TD: Tensor,
    ids_T: Tensor,
    positions_T: Tensor,
    mean_T1: Tensor,
    rstd_T1: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_TD = grad_TD.to(word_weight_VD.dtype).contiguous()
    grad_word_VD = word_weight_VD.new_empty(word_weight_VD.shape)
    grad_position_SD = position_weight_SD.new_empty(position_weight_SD.shape)
    grad_weight_D = norm_weight_D.new_empty(norm_weight_D.shape, dtype=torch.float32)
    grad_bias_D = torch.empty_like(grad_weight_D)
    torch.ops.mage_fast_cpu.embed_kept_backward.default(
        grad_TD, ids_T.contiguous(), positions_T.contiguous(), mean_T1.contiguous(), rstd_T1.contiguous(),
        word_weight_VD.contiguous(), position_weight_SD.contiguous(), wide(norm_weight_D),
        *activation_dropout(dropout, rng_state, stream),
        grad_word_VD, grad_position_SD, grad_weight_D, grad_bias_D,
    )  # fmt: skip
    dtype = norm_weight_D.dtype
    return grad_word_VD, grad_position_SD, grad_weight_D.to(dtype), grad_bias_D.to(dtype)
