"""Attention in Triton: which kernels run for which lengths, and their launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mage_fast.kernels import rng, triton_support
from mage_fast.kernels.ops.attention import _triton_long as long
from mage_fast.kernels.ops.attention import _triton_short as short
from mage_fast.kernels.ops.attention._triton_table import Tile, tile
from mage_fast.kernels.ops.attention._triton_tiles import parts
from mage_fast.kernels.triton_support import DEVICES, unit_stride

__all__ = ["DEVICES", "attention", "attention_backward", "unsupported"]
#: The longest sequence that one program of the short kernels owns: a class token and 128 others.
_SHORT = 129


def unsupported(function: str, *args: Any) -> str | None:
    """Why these arguments go to the reference."""
    qkv_T3HD = args[0] if function == "attention" else args[1]
    softmax_scale = args[3] if function == "attention" else args[6]
    if softmax_scale < 0:
        return "the kernels take the maximum of scores before scaling, and softmax_scale is negative"
    reason = triton_support.unsupported(function, *args)
    if reason is None and tile("forward_long", qkv_T3HD, sum(parts(qkv_T3HD.shape[-1]))) is None:
        most = 64 if qkv_T3HD.dtype == torch.float32 else 128
        reason = f"heads have {qkv_T3HD.shape[-1]} features, in {qkv_T3HD.dtype} the registers hold {most}"
    return reason


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
    qkv_T3HD = unit_stride(qkv_T3HD)
    out_THD = qkv_T3HD.new_empty((total, heads, features))
    lse_TH = qkv_T3HD.new_empty((total, heads), dtype=torch.float32)
    sequences = len(cu_seqlens) - 1
    if not total * heads:
        return out_THD, lse_TH
    tensors = (qkv_T3HD, out_THD, lse_TH)
    common = _common(qkv_T3HD, cu_seqlens, softmax_scale, dropout, rng_state, stream)
    if found := _short("forward_short", qkv_T3HD, max_seqlen):
        short.forward_short[(sequences * heads,)](
            *tensors, *common, *found[:2], num_warps=found[2], num_stages=1
        )
    else:
        queries, keys, options = _long("forward_long", qkv_T3HD)
        grid = (sequences * heads, triton.cdiv(max_seqlen - 1, queries) + 1)
        long.forward_long[grid](*tensors, *common, queries, keys, **options)
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
    total, _, heads, _ = qkv_T3HD.shape
    grad_qkv_T3HD = torch.empty_like(qkv_T3HD, memory_format=torch.contiguous_format)
    qkv_T3HD = unit_stride(qkv_T3HD)
    grad_THD, out_THD, lse_TH = grad_THD.contiguous(), out_THD.contiguous(), lse_TH.contiguous()
    sequences = len(cu_seqlens) - 1
    if not total * heads:
        return grad_qkv_T3HD
    common = _common(qkv_T3HD, cu_seqlens, softmax_scale, dropout, rng_state, stream)
    tensors = (grad_THD, qkv_T3HD, out_THD, lse_TH)
    if found := _short("backward_short", qkv_T3HD, max_seqlen):
        short.backward_short[(sequences * heads,)](
            *tensors, grad_qkv_T3HD, *common, *found[:2], num_warps=found[2], num_stages=1
        )
        return grad_qkv_T3HD
    delta_TH = torch.empty_like(lse_TH)
    queries, keys, options = _long("backward_queries_long", qkv_T3HD)
    grid = (sequences * heads, triton.cdiv(max_seqlen - 1, queries) + 1)
    long.backward_queries_long[grid](*tensors, delta_TH, grad_qkv_T3HD, *common, queries, keys, **options)
    queries, keys, options = _long("backward_keys_long", qkv_T3HD)
    grid = (sequences * heads, triton.cdiv(max_seqlen - 1, keys) + 1)
    long.backward_keys_long[grid](
        grad_THD, qkv_T3HD, lse_TH, delta_TH, grad_qkv_T3HD, *common, queries, keys, **options
    )
    return grad_qkv_T3HD


def _short(kernel: str, qkv_T3HD: Tensor, max_seqlen: int) -> Tile | None:
    """Tile of a short kernel; None where sequences or heads do not fit it."""
    found = tile(kernel, qkv_T3HD, sum(parts(qkv_T3HD.shape[-1])))
    if found is None or max_seqlen > _SHORT:
        return None
    queries, keys, warps = found
    if max_seqlen > queries // 2 + 1:
        return found
    return queries // 2, min(keys, 32) if kernel == "backward_short" else keys, warps // 2


def _long(kernel: str, qkv_T3HD: Tensor) -> tuple[int, int, dict[str, int]]:
    """Queries and keys of a tile, and the options of the launch."""
    found = tile(kernel, qkv_T3HD, sum(parts(qkv_T3HD.shape[-1])))
    assert found is not None  # or unsupported would have said so
    queries, keys, warps = found
    return queries, keys, {"num_warps": warps, "num_stages": 1 if qkv_T3HD.dtype == torch.float32 else 3}


def _common(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple:
    """The kernels' arguments between the tensors and the tile sizes."""
    _, _, heads, features = qkv_T3HD.shape
    bits = rng.ATTENTION_BITS
    return (
        cu_seqlens.contiguous(), cu_seqlens if rng_state is None else rng_state.contiguous(),
        *qkv_T3HD.stride()[:3], heads, softmax_scale, stream,
        rng.least_kept(dropout, bits), rng.keep_scale(dropout, bits), dropout > 0.0,
        features, *parts(features),
    )  # fmt: skip
