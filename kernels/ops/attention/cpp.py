"""Attention in C++ (``csrc/attention.cpp`` and ``csrc/attention_backward.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.cpp_support import DEVICES, unsupported

__all__ = ["DEVICES", "attention", "attention_backward", "unsupported"]


def attention(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    total, _, heads, features = qkv_T3HD.shape
    out_THD = qkv_T3HD.new_empty((total, heads, features))
    lse_TH = qkv_T3HD.new_empty((total, heads), dtype=torch.float32)
    torch.ops.mage_fast_cpu.attention.default(
        qkv_T3HD.contiguous(), cu_seqlens.contiguous(), softmax_scale,
        *_dropout(dropout, rng_state, stream), out_THD, lse_TH,
    )  # fmt: skip
    return out_THD, lse_TH


def attention_backward(
    grad_THD: Tensor,
    qkv_T3HD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> Tensor:
    grad_qkv_T3HD = torch.empty_like(qkv_T3HD, memory_format=torch.contiguous_format)
    torch.ops.mage_fast_cpu.attention_backward.default(
        grad_THD.to(qkv_T3HD.dtype).contiguous(), qkv_T3HD.contiguous(), out_THD.contiguous(),
        lse_TH.contiguous(), cu_seqlens.contiguous(), softmax_scale,
        *_dropout(dropout, rng_state, stream), grad_qkv_T3HD,
    )  # fmt: skip
    return grad_qkv_T3HD


def _dropout(dropout: float, rng_state: Tensor | None, stream: int) -> tuple:
    """The kernels' arguments state, stream, least_kept, scale."""
    bits = rng.ATTENTION_BITS
    # a probability that rounds to 0 drops nothing
    state = None if rng_state is None or rng.threshold(dropout, bits) == 0 else rng_state.contiguous()
    return state, stream, rng.least_kept(dropout, bits), rng.keep_scale(dropout, bits)
