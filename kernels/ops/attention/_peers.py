"""Attention of other packages on packed qkv, differentiable by autograd, dropout by their own laws: what the
benchmarks compare with. ``scale`` multiplies the scores, ``cu_seqlens`` are int32.

The packages are imported when called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import dispatch


def sdpa(qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float) -> Tensor:
    """torch's ``scaled_dot_product_attention``: one call where all lengths are equal, else one a sequence."""
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2).flatten(0, 1)
        for q, k, v in segments(qkv_T3HD, cu_seqlens, max_seqlen)
    ]
    return torch.cat(outputs) if outputs else qkv_T3HD[:, 0]


def sdpa_without_dropout(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float
) -> Tensor:
    """The same with its flash kernel also where the others drop: what their dropout costs."""
    return sdpa(qkv_T3HD, cu_seqlens, max_seqlen, scale, 0.0)


def varlen_attn(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn``, which has no dropout: it is left out."""
    from torch.nn.attention import varlen

    if qkv_T3HD.device.type != "cuda":
        raise dispatch.Unsupported(f"varlen_attn runs on cuda, the tensors are on {qkv_T3HD.device.type}")
    q, k, v = qkv_T3HD.unbind(1)
    out = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)
    assert isinstance(out, Tensor)
    return out


def flash_attn(qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float) -> Tensor:
    """``flash_attn.flash_attn_varlen_qkvpacked_func``."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv_T3HD, cu_seqlens, max_seqlen, dropout, softmax_scale=scale)


def xformers(qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float) -> Tensor:
    """``xformers.ops.memory_efficient_attention`` and its mask, which wants lengths on the host."""
    from xformers.ops import fmha

    q, k, v = qkv_T3HD[None].unbind(2)
    mask = fmha.BlockDiagonalMask.from_seqlens(_lengths(cu_seqlens))
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout, scale=scale)[0]


@lru_cache(maxsize=1)
def _lengths(cu_seqlens: Tensor) -> list[int]:
    """Read once for the same tensor, so that a benchmark does not time the wait for the device."""
    return cu_seqlens.diff().tolist()


def segments(x_TNHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[tuple[Tensor, ...]]:
    """N views ``[B, H, length, D]`` of sequences of one length, packed: all of them, or each by itself."""
    total, sequences = len(x_TNHD), len(cu_seqlens) - 1
    if 0 < total == sequences * max_seqlen:
        pieces = [x_TNHD.unflatten(0, (sequences, max_seqlen))]
    else:
        pieces = [x_TNHD[None, a:b] for a, b in pairwise(cu_seqlens.tolist()) if b > a]
    return [piece.permute(2, 0, 3, 1, 4).unbind(0) for piece in pieces]


def unsupported(function: str, *args: object) -> str | None:
    """Why an implementation by another package declines: ``dropout`` is the third last argument."""
    if args[-3]:
        return "its dropout draws other bits than this library's contract; time it as the benchmarks' peer"
    return None


def _peer(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of the benchmarks' inputs."""

    def call(*, qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, **_: Any) -> Tensor:
        scale = qkv_T3HD.shape[-1] ** -0.5
        try:
            return function(qkv_T3HD, cu_seqlens, max_seqlen, scale, dropout)
        except ModuleNotFoundError as error:
            raise dispatch.Unsupported(f"the package {error.name} is not installed") from error

    return call


#: By the name in the benchmarks' tables.
PEERS = {
    f"{function.__name__}, own dropout": _peer(function) for function in (sdpa, flash_attn, xformers)
} | {"sdpa, no dropout": _peer(sdpa_without_dropout), "varlen_attn, no dropout": _peer(varlen_attn)}
