"""Shapes of ``attention`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_fast.kernels import rng


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


SPECS = (
    Spec("tiny", (5, 5), 2, 8),
    Spec("tiny_varying", (3, 1, 6), 2, 8),
    Spec("tiny_no_dropout", (4, 0, 2), 1, 16, 0.0),
    Spec("small_encoder", (129,), 1, 64),
    Spec("small_decoder", (257,), 1, 48),
    Spec("small_varying", (1, 17, 65, 129, 130), 1, 48),
    Spec("vit_b_encoder_batch4", (129,) * 4, 12, 64),
    Spec("vit_b_decoder_batch4", (257,) * 4, 16, 48),
    Spec("vit_b_unmasked_batch4", (129, 97, 65, 1), 12, 64),
    Spec("vit_l_encoder_batch4", (129,) * 4, 16, 64),
)

#: A batch of 128 on one GPU; 128 lengths over 1..129 in a fixed order for the encoder without masked tokens.
GPU_SPECS = (
    Spec("vit_b_encoder", (129,) * 128, 12, 64),
    Spec("vit_b_decoder", (257,) * 128, 16, 48),
    Spec("vit_l_encoder", (129,) * 128, 16, 64),
    Spec("vit_b_unmasked", tuple(1 + 37 * i % 129 for i in range(128)), 12, 64),
    Spec("vit_b_encoder_no_dropout", (129,) * 128, 12, 64, 0.0),
    Spec("vit_b_decoder_no_dropout", (257,) * 128, 16, 48, 0.0),
)
