"""Shapes of ``attention`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.roofline import Direction, Work, statistic_bytes


@dataclass(frozen=True)
class Spec:
    """Sequence lengths, heads and head features."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    features: int
    dropout: float = 0.1

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        total = sum(self.lengths)
        qkv = torch.randn(total, 3, self.heads, self.features, generator=generator)
        return {
            "qkv_T3HD": qkv.to(device, dtype).requires_grad_(),
            "cu_seqlens": torch.tensor((0, *self.lengths)).cumsum(0).to(device, torch.int32),
            "max_seqlen": max(self.lengths, default=0),
            "dropout": self.dropout,
            "rng_state": rng.new_state(0, device=device),
            "stream": rng.stream(rng.Stream.ATTENTION_DROPOUT),
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        rows = sum(self.lengths) * self.heads
        one, lse = rows * self.features * dtype.itemsize, rows * statistic_bytes(dtype)
        ends = 4 * (len(self.lengths) + 1)
        # two products of 2 l l D a head: scores and output
        flops = 4 * sum(length**2 for length in self.lengths) * self.heads * self.features
        if direction == "fwd":
            return Work(3 * one + ends, one + lse, flops, matrix=True)  # q, k, v -> out, logsumexp
        # grad, q, k, v, out, logsumexp -> their grads; five products: scores again, dP, dQ, dK, dV
        return Work(5 * one + lse + ends, 3 * one, flops * 5 // 2, matrix=True)


def baseline(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, dropout: float, rng_state: Tensor, stream: int
) -> Tensor:
    """The eager chain over padded sequences, with torch's own dropout."""
    total, batch = qkv_T3HD.shape[0], len(cu_seqlens) - 1
    position_M = torch.arange(max_seqlen, device=cu_seqlens.device)
    is_row_BM = position_M < cu_seqlens.diff()[:, None]
    if total == batch * max_seqlen:
        padded_BM3HD = qkv_T3HD.unflatten(0, (batch, max_seqlen))
    else:
        padded_BM3HD = qkv_T3HD[(cu_seqlens[:-1, None] + position_M).clamp(max=total - 1)]
    q, k, v = padded_BM3HD.permute(2, 0, 3, 1, 4)
    scores_BHQK = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if total < batch * max_seqlen:  # not -inf: an empty sequence has no score
        least = torch.finfo(scores_BHQK.dtype).min
        scores_BHQK = scores_BHQK.masked_fill(~is_row_BM[:, None, None, :], least)
    out_BMHD = (F.dropout(scores_BHQK.softmax(3), dropout) @ v).transpose(1, 2)
    if total == batch * max_seqlen:
        return out_BMHD.flatten(0, 1)
    row_T1 = torch.nonzero_static(is_row_BM.flatten(), size=total)  # nothing waits for the device
    return out_BMHD.flatten(0, 1)[row_T1[:, 0]]


SPECS = (
    Spec("tiny", (5, 5), 2, 8),
    Spec("tiny_varying", (3, 1, 6), 2, 8),
    Spec("tiny_no_dropout", (4, 0, 2), 1, 16, 0.0),
    Spec("small_encoder", (129,), 1, 64),
    Spec("small_decoder", (257,), 1, 48),
    Spec("small_varying", (1, 17, 65, 129, 130), 1, 48),
    Spec("small_short", (65, 2), 1, 64),
    # the other widths of heads, each with tiles of its own
    *(Spec(f"small_heads_{features}", (130,), 1, features) for features in (32, 64, 80, 96, 128)),
    Spec("vit_b_encoder_batch4", (129,) * 4, 12, 64),
    Spec("vit_b_decoder_batch4", (257,) * 4, 16, 48),
    Spec("vit_b_unmasked_batch4", (129, 97, 65, 1), 12, 64),
    Spec("vit_l_encoder_batch4", (129,) * 4, 16, 64),
    Spec("vit_b_full_batch8", (257,) * 8, 12, 64),
)

#: A batch of 128 on one GPU; 128 lengths over 1..129 in a fixed order for the encoder without masked tokens.
GPU_SPECS = (
    Spec("vit_b_encoder", (129,) * 128, 12, 64),
    Spec("vit_b_decoder", (257,) * 128, 16, 48),
    Spec("vit_l_encoder", (129,) * 128, 16, 64),
    Spec("vit_b_unmasked", tuple(1 + 37 * i % 129 for i in range(128)), 12, 64),
    Spec("vit_b_encoder_no_dropout", (129,) * 128, 12, 64, 0.0),
    Spec("vit_b_decoder_no_dropout", (257,) * 128, 16, 48, 0.0),
    *(
        Spec(f"heads_{features}_no_dropout", (257,) * 16, 12, features, 0.0)
        for features in (32, 64, 80, 96, 128)
    ),
)
