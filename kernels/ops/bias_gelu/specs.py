"""Shapes of ``bias_gelu`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.roofline import Direction, Work, dropout_flops


@dataclass(frozen=True)
class Spec:
    """``rows x features`` with a dropout probability. ``autocast``: the bias is float32."""

    name: str
    rows: int
    features: int
    dropout: float = 0.1
    autocast: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.features, generator=generator)
        bias = 0.1 * torch.randn(self.features, generator=generator)
        return {
            "x_TF": x.to(device, dtype).requires_grad_(),
            "bias_F": bias.to(device, torch.float32 if self.autocast else dtype).requires_grad_(),
            "dropout": self.dropout,
            "rng_state": rng.new_state(0, device=device),
            "stream": rng.stream(rng.Stream.MLP_DROPOUT),
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        elements, e = self.rows * self.features, dtype.itemsize
        drops = dropout_flops(elements, self.dropout)
        if direction == "fwd":
            # x, bias -> y; an addition, then s / 2 (1 + erf(c s))
            return Work((elements + self.features) * e, elements * e, 6 * elements + drops)
        # grad, x, bias -> grad x, grad bias; Phi (4), s phi (5), their sum, x + bias, times grad, bias' sum
        read, written = (2 * elements + self.features) * e, (elements + self.features) * e
        return Work(read, written, 13 * elements + drops)


def baseline(x_TF: Tensor, bias_F: Tensor, *, dropout: float, rng_state: Tensor, stream: int) -> Tensor:
    """The eager chain, with torch's own dropout."""
    return F.dropout(F.gelu(x_TF + bias_F), dropout)


SPECS = (
    Spec("tiny", 5, 24),
    Spec("tiny_no_dropout", 7, 17, 0.0),
    # rows of the published width, few of them: what the interpreter has time for
    Spec("small_vit_b", 5, 3072),
    Spec("small_vit_b_head", 70, 768, 0.0),
    Spec("vit_b_encoder_batch4", 4 * 129, 3072),
    Spec("vit_b_decoder_batch4", 4 * 257, 3072),
    Spec("vit_l_encoder_batch4", 4 * 129, 4096),
    # the head's fully connected layer at the masked rows of a batch of 4: bias and GELU, no dropout
    Spec("vit_b_head_batch4", 4 * 178, 768, 0.0),
)
#: The activations of a training step on one GPU, batch 128.
GPU_SPECS = (
    Spec("vit_b_encoder", 128 * 129, 3072),
    Spec("vit_b_decoder", 128 * 257, 3072),
    Spec("vit_b_encoder_autocast", 128 * 129, 3072, autocast=True),
    Spec("vit_b_decoder_autocast", 128 * 257, 3072, autocast=True),
    Spec("vit_b_head", 128 * 178, 768, 0.0),
)
