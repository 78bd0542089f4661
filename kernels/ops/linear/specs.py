"""Shapes of ``linear`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels.roofline import Direction, Work


@dataclass(frozen=True)
class Spec:
    """``rows`` of ``features`` times a weight of ``out`` rows. ``autocast``: weight and bias are float32."""

    name: str
    rows: int
    features: int
    out: int
    bias: bool = True
    autocast: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.features, generator=generator)
        weight = torch.randn(self.out, self.features, generator=generator) / self.features**0.5
        bias = 0.1 * torch.randn(self.out, generator=generator)
        kept = self._kept(dtype)
        return {
            "x_TD": x.to(device, dtype).requires_grad_(),
            "weight_FD": weight.to(device, kept).requires_grad_(),
            "bias_F": bias.to(device, kept).requires_grad_() if self.bias else None,
        }

    def _kept(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if self.autocast else dtype

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        e, w = dtype.itemsize, self._kept(dtype).itemsize
        rows, weight = self.rows, self.out * self.features
        flops = 2 * rows * weight
        if direction == "fwd":
            return Work(rows * self.features * e + weight * w, rows * self.out * e, flops, matrix=True)
        # grad, x, weight -> grad x, grad weight
        read = rows * (self.out + self.features) * e + weight * w
        return Work(read, rows * self.features * e + weight * w, 2 * flops, matrix=True)


def baseline(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """The eager layer; weight and bias are cast each time, as autocast does."""
    dtype = x_TD.dtype
    return F.linear(x_TD, weight_FD.to(dtype), None if bias_F is None else bias_F.to(dtype))


SPECS = (
    Spec("tiny", 5, 24, 34),
    Spec("tiny_no_bias", 7, 18, 66, bias=False),
    Spec("tiny_odd", 7, 17, 65),
    Spec("tiny_one_dtype", 9, 34, 130, autocast=False),
    # more rows than one piece of the depth of the weight's gradient
    Spec("tall", 1031, 34, 20),
    Spec("small_vit_b", 5, 768, 2304),
    Spec("vit_b_encoder_fc1_batch4", 4 * 129, 768, 3072, bias=False),
    Spec("vit_b_encoder_fc2_batch4", 4 * 129, 3072, 768),
    Spec("vit_b_decoder_qkv_batch4", 4 * 257, 768, 2304),
    Spec("vit_b_decoder_fc2_batch4", 4 * 257, 3072, 768),
    # a step of decoding one image, whose weights were rounded beforehand
    Spec("vit_b_qkv_batch1", 257, 768, 2304, autocast=False),
)
