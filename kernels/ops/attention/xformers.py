"""Attention by the package xformers, without dropout. Its mask wants the lengths on the host: it waits for
the device once a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha

from mage_fast.kernels.ops.attention import _peers

DEVICES = ("cuda",)


def unsupported(function: str, *args: Any) -> str | None:
    qkv_T3HD = args[0] if function == "attention" else args[1]
    if qkv_T3HD.dtype == torch.float64:
        return "it takes float32, float16 and bfloat16, got float64"
    return _peers.unsupported(function, *args)


def _mask(cu_seqlens: Tensor) -> Any:
    return fmha.BlockDiagonalMask.from_seqlens(cu_seqlens.diff().tolist())


def attention(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv_T3HD[None].unbind(2)
    out_1THD, lse_1HT = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=_mask(cu_seqlens), p=0.0, scale=softmax_scale
    )
    lse_TH = lse_1HT[0, :, : len(qkv_T3HD)].T
    return out_1THD[0].contiguous(), lse_TH.contiguous()


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
    q, k, v = qkv_T3HD[None].unbind(2)
    grads = fmha.memory_efficient_attention_backward(
        grad_THD[None], out_THD[None], lse_TH.T.contiguous()[None], q, k, v,
        attn_bias=_mask(cu_seqlens), p=0.0, scale=softmax_scale,
    )  # fmt: skip
    return torch.stack([grad[0] for grad in grads], 1)
