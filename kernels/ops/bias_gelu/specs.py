"""Shapes of ``bias_gelu`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_fast.kernels import rng


@dataclass(frozen=True)
class Spec:
    """``rows x features`` with a dropout probability."""

    name: str
    rows: int
    features: int
    dropout: float = 0.1

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.features, generator=generator)
        bias = 0.1 * torch.randn(self.features, generator=generator)
        return {
            "x_TF": x.to(device, dtype).requires_grad_(),
            "bias_F": bias.to(device, dtype).requires_grad_(),
            "dropout": self.dropout,
            "rng_state": rng.new_state(0, device=device),
            "stream": rng.stream(rng.Stream.MLP_DROPOUT),
        }


SPECS = (
    Spec("tiny", 5, 24),
    Spec("tiny_no_dropout", 7, 17, 0.0),
    Spec("vit_b_encoder_batch4", 4 * 129, 3072),
    Spec("vit_b_decoder_batch4", 4 * 257, 3072),
    Spec("vit_l_encoder_batch4", 4 * 129, 4096),
    # the head's fully connected layer at the masked rows of a batch of 4: bias and GELU, no dropout
    Spec("vit_b_head_batch4", 4 * 178, 768, 0.0),
)
