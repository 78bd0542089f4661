"""The nearest codebook entry in C++ (``csrc/nearest_code.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported

__all__ = ["DEVICES", "nearest_code", "unsupported"]


def nearest_code(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    index_N = x_ND.new_empty(x_ND.shape[0], dtype=torch.int64)
    torch.ops.mage_fast_cpu.nearest_code.default(x_ND.contiguous(), codebook_KD.contiguous(), index_N)
    return index_N
