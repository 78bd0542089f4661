"""Philox-4x32-10 in C++ (``csrc/philox.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported

__all__ = ["DEVICES", "philox", "unsupported"]


def philox(state: Tensor, stream: int, high: int, low: int, first_high: int) -> Tensor:
    words = state.new_empty((high, low, 4), dtype=torch.int32)
    torch.ops.mage_fast_cpu.philox.default(state.contiguous(), stream, first_high, words)
    return words
