"""Shapes of ``add_norm`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.roofline import (
    NORM,
    NORM_BACKWARD,
    Direction,
    Work,
    dropout_flops,
    statistic_bytes,
)


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

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        e, elements = dtype.itemsize, self.rows * self.features
        statistics, drops = 2 * self.rows * statistic_bytes(dtype), dropout_flops(elements, self.dropout)
        if direction == "fwd":
            # reads branch, residual, weight, bias; writes sum, normed, mean, rstd
            read, written = 2 * (elements + self.features) * e, 2 * elements * e + statistics
            return Work(read, written, elements * (1 + NORM) + drops)
        # reads two grads, sum, weight, mean, rstd; writes the grads of branch, residual, weight, bias
        read, written = (3 * elements + self.features) * e + statistics, 2 * (elements + self.features) * e
        return Work(read, written, elements * (1 + NORM_BACKWARD) + drops)


def baseline(
    branch_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    dropout: float,
    rng_state: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """The eager chain, with torch's own dropout."""
    out_TD = residual_TD + F.dropout(branch_TD, dropout)
    return out_TD, F.layer_norm(out_TD, weight_D.shape, weight_D, bias_D, 1e-6)


SPECS = (
    Spec("tiny", 5, 24),
    Spec("tiny_no_dropout", 7, 16, 0.0),
    Spec("vit_b_encoder_batch4", 4 * 129, 768),
    Spec("vit_b_decoder_batch4", 4 * 257, 768),
    Spec("vit_l_encoder_batch4", 4 * 129, 1024),
)
