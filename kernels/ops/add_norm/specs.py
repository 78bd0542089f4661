"""Shapes of ``add_norm`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """``rows x features`` with a dropout probability.

    ``autocast``: only the branch is narrow, the residual stream and the parameters are float32.
    """

    name: str
    rows: int
    features: int
    dropout: float = 0.1
    autocast: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        branch, residual = torch.randn(2, self.rows, self.features, generator=generator)
        weight = 1 + 0.1 * torch.randn(self.features, generator=generator)
        bias = 0.1 * torch.randn(self.features, generator=generator)
        wide = torch.float32 if self.autocast else dtype
        return {
            "branch_TD": branch.to(device, dtype).requires_grad_(),
            "residual_TD": residual.to(device, wide).requires_grad_(),
            "weight_D": weight.to(device, wide).requires_grad_(),
            "bias_D": bias.to(device, wide).requires_grad_(),
            "dropout": self.dropout,
            "rng_state": rng.new_state(0, device=device),
            "stream": rng.stream(rng.Stream.PROJECTION_DROPOUT),
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        elements, e = self.rows * self.features, dtype.itemsize
        wide = max(4, e) if self.autocast else e  # the residual stream and the parameters
        statistics, drops = 2 * self.rows * statistic_bytes(dtype), dropout_flops(elements, self.dropout)
        if direction == "fwd":
            # reads branch, residual, weight, bias; writes sum, normed, mean, rstd
            both = elements * (e + wide)
            read, written = both + 2 * self.features * wide, both + statistics
            return Work(read, written, elements * (1 + NORM) + drops)
        # reads two grads, sum, weight, mean, rstd; writes the grads of branch, residual, weight, bias
        read = elements * (2 * wide + e) + self.features * wide + statistics
        written = elements * (e + wide) + 2 * self.features * wide
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
    # rows of the published width, few of them: what the interpreter has time for
    Spec("small_vit_b", 24, 768),
    Spec("small_vit_b_no_dropout", 5, 768, 0.0),
    Spec("small_unaligned", 2, 1283),
    Spec("vit_b_encoder_batch4", 4 * 129, 768),
    Spec("vit_b_decoder_batch4", 4 * 257, 768),
    Spec("vit_l_encoder_batch4", 4 * 129, 1024),
)
#: The rows of a training step on one GPU, batch 128.
GPU_SPECS = (
    Spec("vit_b_encoder", 128 * 129, 768),
    Spec("vit_b_decoder", 128 * 257, 768),
    Spec("vit_l_encoder", 128 * 129, 1024),
    Spec("vit_b_encoder_autocast", 128 * 129, 768, autocast=True),
    Spec("vit_b_decoder_autocast", 128 * 257, 768, autocast=True),
    Spec("huge_autocast", 1024, 1280, autocast=True),
    Spec("widest", 1024, 8192),
    Spec("widest_autocast", 1024, 4096, autocast=True),
)
