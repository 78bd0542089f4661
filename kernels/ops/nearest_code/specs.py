"""Shapes of ``nearest_code`` in the published tokenizer, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels.roofline import Direction, Work


@dataclass(frozen=True)
class Spec:
    """``rows`` features against ``codes`` entries of ``channels``."""

    name: str
    rows: int
    codes: int
    channels: int
    #: The codebook is a float32 parameter and the features are autocast.
    wide_codebook: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.channels, generator=generator)
        codebook = torch.randn(self.codes, self.channels, generator=generator)
        return {
            "x_ND": x.to(device, dtype),
            "codebook_KD": codebook.to(
                device, torch.promote_types(dtype, torch.float32) if self.wide_codebook else dtype
            ),
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        assert direction == "fwd"
        read = (self.rows + self.codes) * self.channels * dtype.itemsize
        # x, codebook -> int64 index; one product
        return Work(read, 8 * self.rows, 2 * self.rows * self.codes * self.channels, matrix=True)


def baseline(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """The eager chain, in float32: every distance, then the least."""
    x_ND, codebook_KD = x_ND.float(), codebook_KD.float()
    return (codebook_KD.square().sum(1) - 2 * x_ND @ codebook_KD.T).argmin(1)


def comparable(inputs: dict[str, Any], outputs: list[Tensor]) -> list[Tensor]:
    """What right results share: rounding may choose another of two codes that are equally far, up to it."""
    chosen_ND = inputs["codebook_KD"].double()[outputs[0]]
    return [(inputs["x_ND"].double() - chosen_ND).square().sum(1).float()]


SPECS = (
    Spec("tiny", 7, 5, 6),
    # several blocks of everything, none of them whole
    Spec("small", 150, 300, 72),
    Spec("small_many_channels", 70, 130, 300),
    Spec("batch4", 4 * 256, 1024, 256),
    Spec("batch32", 32 * 256, 1024, 256),
)
GPU_SPECS = (
    Spec("batch128", 128 * 256, 1024, 256),
    Spec("batch128_codes16384", 128 * 256, 16384, 256),
    Spec("batch128_autocast", 128 * 256, 1024, 256, wide_codebook=True),
    Spec("batch128_channels512", 128 * 256, 1024, 512),
)
