"""Shapes of ``add_norm`` in the published models, shared by tests and benchmarks."""

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

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        branch, residual = torch.randn(2, self.rows, self.features, generator=generator)
        weight = 1 + 0.1 * torch.randn(self.features, generator=generator)
        bias = 0.1 * torch.randn(self.features, generator=generator)
        return {
            "branch_TD": branch.to(device, dtype).requires_grad_(),
            "residual_TD": residual.to(device, dtype).requires_grad_(),
            "weight_D": weight.to(device, dtype).requires_grad_(),
            "bias_D": bias.to(device, dtype).requires_grad_(),
            "dropout": self.dropout,
            "rng_state": rng.new_state(0, device=device),
            "stream": rng.stream(rng.Stream.PROJECTION_DROPOUT),
        }


SPECS = (
    Spec("tiny", 5, 24),
    Spec("tiny_no_dropout", 7, 16, 0.0),
    Spec("vit_b_encoder_batch4", 4 * 129, 768),
    Spec("vit_b_decoder_batch4", 4 * 257, 768),
    Spec("vit_l_encoder_batch4", 4 * 129, 1024),
)
