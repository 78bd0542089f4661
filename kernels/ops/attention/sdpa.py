"""Attention by the kernels beneath torch's ``scaled_dot_product_attention``, one call a length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels.ops.attention import _peers

DEVICES = ("cpu", "cuda")
_aten = torch.ops.aten


def unsupported(function: str, *args: Any) -> str | None:
    qkv_T3HD = args[0] if function == "attention" else args[1]
    half = qkv_T3HD.dtype in (torch.float16, torch.bfloat16)
    if qkv_T3HD.device.type == "cuda" and not half:
        return f"its flash kernels take float16 and bfloat16, got {qkv_T3HD.dtype}"
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
    out_THD = qkv_T3HD.new_empty(qkv_T3HD[:, 0].shape)
    statistic = torch.promote_types(qkv_T3HD.dtype, torch.float32)
    lse_TH = qkv_T3HD.new_empty(out_THD.shape[:2], dtype=statistic)
    targets = _peers.segments(out_THD[:, None], cu_seqlens, max_seqlen)
    lses = _peers.segments(lse_TH[:, None, :, None], cu_seqlens, max_seqlen)
    for (q, k, v), (out,), (lse,) in zip(
        _peers.segments(_unit_stride(qkv_T3HD), cu_seqlens, max_seqlen), targets, lses, strict=True
    ):
        if q.device.type == "cpu":
            o, total = _aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, scale=softmax_scale
            )
        else:
            o, total, *_ = _aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, False, False, scale=softmax_scale
            )
        out.copy_(o)
        lse.copy_(total[..., None])
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

    def segments(x_TNHD: Tensor) -> list[tuple[Tensor, ...]]:
        return _peers.segments(x_TNHD, cu_seqlens, max_seqlen)

    for targets, (g,), (q, k, v), (o,), (total,) in zip(
        segments(grad_qkv_T3HD),
        segments(grad_THD.contiguous()[:, None]),
        segments(_unit_stride(qkv_T3HD)),
        segments(out_THD[:, None]),
        segments(lse_TH[:, None, :, None]),
        strict=True,
    ):
        total = total[..., 0].contiguous()
        if q.device.type == "cpu":
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, total, 0.0, False, scale=softmax_scale
            )
        else:
            unused, length = q.new_empty(0, dtype=torch.int64), q.shape[2]
            grads = _aten._scaled_dot_product_flash_attention_backward(
                g, q, k, v, o, total, None, None, length, length, 0.0, False, unused, unused,
                scale=softmax_scale,
            )  # fmt: skip
        for target, grad in zip(targets, grads, strict=True):
            target.copy_(grad)
    return grad_qkv_T3HD


def _unit_stride(qkv_T3HD: Tensor) -> Tensor:
    return qkv_T3HD if qkv_T3HD.stride(3) == 1 else qkv_T3HD.contiguous()
