"""Attention within each sequence of a packed batch.

    P = softmax(scale * Q K^T),  O = dropout(P) V

Shape suffixes: T packed rows, B sequences, M longest sequence, H heads, D head features, Q queries and K
keys of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels import rng


class _Padding:
    """Packed rows <-> ``[B, M]``, a plain view where every sequence has the greatest length."""

    def __init__(self, cu_seqlens: Tensor, total: int, longest: int) -> None:
        if total < longest:  # nothing to index where every sequence is empty
            longest = total
        self.batch, self.longest, self.total = cu_seqlens.shape[0] - 1, longest, total
        self.uniform = total == self.batch * longest
        if not self.uniform:
            position_M = torch.arange(longest, device=cu_seqlens.device)
            self.rows_BM = cu_seqlens[:-1, None] + position_M
            self.valid_BM = self.rows_BM < cu_seqlens[1:, None]
            # not a boolean index: its size would be read from the device, and be unknown to torch.export
            self.row_T = torch.nonzero_static(self.valid_BM.flatten(), size=total).flatten()

    def pad(self, x: Tensor) -> Tensor:
        """``[T, H, ...]`` to ``[B, H, M, ...]``."""
        if self.uniform:
            return x.unflatten(0, (self.batch, self.longest)).transpose(1, 2)
        return x[self.rows_BM.clamp(max=self.total - 1)].transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, H, M, ...]`` to ``[T, H, ...]``."""
        x = x.transpose(1, 2)
        x = x.flatten(0, 1)
        return x if self.uniform else x.index_select(0, self.row_T)

    def hide(self, scores_BHQK: Tensor) -> Tensor:
        """-inf at keys past a sequence's end."""
        if self.uniform:
            return scores_BHQK
        return scores_BHQK.masked_fill(~self.valid_BM[:, None, None, :], float("-inf"))


def _keep_BHQK(
    padding: _Padding, like: Tensor, dropout: float, rng_state: Tensor | None, stream: int
) -> Tensor | None:
    """Scale of each probability, 0 where dropped; None without dropout."""
    if dropout == 0.0:
        return None
    assert rng_state is not None
    heads = like.shape[1]
    rows = padding.total * heads
    keep = rng.keep_mask_attention(rng_state, stream, rows, padding.longest, dropout)
    keep_BHQK = padding.pad(keep.unflatten(0, (-1, heads))).to(like.dtype)
    return keep_BHQK.mul_(rng.keep_scale(dropout, rng.ATTENTION_BITS))


def _dropped(p_BHQK: Tensor, keep_BHQK: Tensor | None) -> Tensor:
    return p_BHQK if keep_BHQK is None else p_BHQK * keep_BHQK


def attention(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    total = qkv_T3HD.shape[0]
    accumulate = torch.promote_types(qkv_T3HD.dtype, torch.float32)
    padding = _Padding(cu_seqlens, total, max_seqlen)
    q, k, v = (padding.pad(x) for x in qkv_T3HD.to(accumulate).unbind(1))
    scores_BHQK = padding.hide(q @ k.transpose(2, 3) * softmax_scale)
    lse_BHQ = scores_BHQK.logsumexp(3)
    out = _dropped(scores_BHQK.softmax(3), _keep_BHQK(padding, q, dropout, rng_state, stream)) @ v
    return padding.pack(out).to(qkv_T3HD.dtype).contiguous(), padding.pack(lse_BHQ).contiguous()


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
    total = qkv_T3HD.shape[0]
    accumulate = lse_TH.dtype
    padding = _Padding(cu_seqlens, total, max_seqlen)
    q, k, v = (padding.pad(x) for x in qkv_T3HD.to(accumulate).unbind(1))
    grad = padding.pad(grad_THD.to(accumulate))
    keep = _keep_BHQK(padding, q, dropout, rng_state, stream)

    p_BHQK = padding.hide(q @ k.transpose(2, 3) * softmax_scale).softmax(3)
    if not padding.uniform:  # rows past a sequence's end hold another sequence's queries
        p_BHQK = p_BHQK.masked_fill(~padding.valid_BM[:, None, :, None], 0.0)
    grad_v = _dropped(p_BHQK, keep).transpose(2, 3) @ grad
    grad_p_BHQK = _dropped(grad @ v.transpose(2, 3), keep)
    row_BHQ1 = (p_BHQK * grad_p_BHQK).sum(3, keepdim=True)
    grad_scores_BHQK = p_BHQK * (grad_p_BHQK - row_BHQ1) * softmax_scale
    grad_q, grad_k = grad_scores_BHQK @ k, grad_scores_BHQK.transpose(2, 3) @ q
    return torch.stack([padding.pack(x) for x in (grad_q, grad_k, grad_v)], 1).to(qkv_T3HD.dtype)
