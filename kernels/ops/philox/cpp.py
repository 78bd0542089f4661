"""Philox-4x32-10 in C++ (``csrc/philox.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.library import load_extension

DEVICES = ("cpu",)
load_extension()


def philox(state: Tensor, stream: int, high: int, low: int, first_high: int) -> Tensor:
    return torch.ops.mage_fast_cpu.philox(state.contiguous(), stream, high, low, first_high)
