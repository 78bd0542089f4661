"""Shapes of ``group_norm_silu`` in the published tokenizer, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels.roofline import NORM, NORM_BACKWARD, Direction, Work, statistic_bytes


@dataclass(frozen=True)
class Spec:
    """``images x channels x size x size`` feature maps."""

    name: str
    images: int
    channels: int
    size: int
    num_groups: int = 32
    channels_last: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.images, self.channels, self.size, self.size, generator=generator)
        weight = 1 + 0.1 * torch.randn(self.channels, generator=generator)
        bias = 0.1 * torch.randn(self.channels, generator=generator)
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        return {
            "x_NCHW": x.to(device, dtype).contiguous(memory_format=format).requires_grad_(),
            "weight_C": weight.to(device, dtype).requires_grad_(),
            "bias_C": bias.to(device, dtype).requires_grad_(),
            "num_groups": self.num_groups,
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        elements, e = self.images * self.channels * self.size**2, dtype.itemsize
        parameters, statistics = 2 * self.channels, 2 * self.images * self.num_groups * statistic_bytes(dtype)
        if direction == "fwd":
            # x, weight, bias -> out, mean, rstd; norm, then y / (1 + exp(-y))
            return Work((elements + parameters) * e, elements * e + statistics, elements * (NORM + 4))
        # grad, x, weight, bias, mean, rstd -> grads of x, weight, bias; y again (2), its SiLU's slope (9)
        read, written = (2 * elements + parameters) * e + statistics, (elements + parameters) * e
        return Work(read, written, elements * (NORM_BACKWARD + 11))


def baseline(x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, *, num_groups: int) -> Tensor:
    """The eager chain."""
    return F.silu(F.group_norm(x_NCHW, num_groups, weight_C, bias_C, 1e-6))


SPECS = (
    Spec("tiny", 2, 6, 3, num_groups=3),
    Spec("tiny_contiguous", 2, 8, 5, num_groups=4, channels_last=False),
    # held whole; groups of 5 channels; several chunks and blocks of channels, in both formats
    Spec("small_whole", 1, 128, 12),
    Spec("small_groups_of_5", 1, 320, 5, num_groups=64),
    Spec("small_chunks", 1, 40, 33, num_groups=10),
    Spec("small_contiguous", 1, 20, 72, num_groups=4, channels_last=False),
    # one for each resolution of the encoder, widths 128 * (1, 1, 2, 2, 4)
    Spec("level0_batch1", 1, 128, 256),
    Spec("level1_batch1", 1, 128, 128),
    Spec("level2_batch1", 1, 256, 64),
    Spec("level3_batch1", 1, 256, 32),
    Spec("level4_batch1", 1, 512, 16),
)
GPU_SPECS = (
    Spec("level0_batch8", 8, 128, 256),
    Spec("level1_batch32", 32, 128, 128),
    Spec("level2_batch32", 32, 256, 64),
    Spec("level3_batch32", 32, 256, 32),
    Spec("level4_batch32", 32, 512, 16),
    Spec("level2_batch32_contiguous", 32, 256, 64, channels_last=False),
    Spec("level4_batch32_contiguous", 32, 512, 16, channels_last=False),
)
