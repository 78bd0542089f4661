"""Attention by the package flash_attn (2.7 and later), without dropout."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn import flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward
from torch import Tensor

from mage_fast.kernels.ops.attention import _peers

DEVICES = ("cuda",)


def unsupported(function: str, *args: Any) -> str | None:
    qkv_T3HD = args[0] if function == "attention" else args[1]
    if qkv_T3HD.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {qkv_T3HD.dtype}"
    return _peers.unsupported(function, *args)


def attention(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    out_THD, lse_HT, _ = flash_attn_varlen_qkvpacked_func(
        qkv_T3HD, cu_seqlens, max_seqlen, 0.0, softmax_scale=softmax_scale, return_attn_probs=True
    )
    return out_THD.contiguous(), lse_HT.T.contiguous()


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
    grad_q, grad_k, grad_v = grad_qkv_T3HD.unbind(1)
    q, k, v = qkv_T3HD.unbind(1)
    _flash_attn_varlen_backward(
        dout=grad_THD, q=q, k=k, v=v, out=out_THD, softmax_lse=lse_TH.T.contiguous(),
        dq=grad_q, dk=grad_k, dv=grad_v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, dropout_p=0.0, softmax_scale=softmax_scale,
        causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=False,
    )  # fmt: skip
    return grad_qkv_T3HD
