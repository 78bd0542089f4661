"""Random masking with exact counts in C++ (``csrc/mask_plan.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels.cpp_support import DEVICES, unsupported

__all__ = ["DEVICES", "mask_plan", "unsupported"]


def mask_plan(
    rng_state: Tensor,
    num_masked_B: Tensor,
    num_dropped_B: Tensor,
    length: int,
    total_masked: int,
    total_kept: int,
    total_visible: int,
    stream: int,
) -> tuple[Tensor, ...]:
    batch = num_masked_B.shape[0]
    positions_T = torch.empty(total_kept, dtype=torch.int32)
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32)
    masked_index_N = torch.empty(total_masked, dtype=torch.int32)
    source_BS = torch.empty((batch, length + 1), dtype=torch.int32)
    is_masked_BL = torch.empty((batch, length), dtype=torch.bool)
    visible_V = torch.empty(total_visible, dtype=torch.int32)
    visible_cu_seqlens = torch.empty(batch + 1, dtype=torch.int32)
    outputs = (
        positions_T, cu_seqlens, masked_index_N, source_BS, is_masked_BL, visible_V, visible_cu_seqlens
    )  # fmt: skip
    torch.ops.mage_fast_cpu.mask_plan.default(
        rng_state.contiguous(), num_masked_B.contiguous(), num_dropped_B.contiguous(), stream,
        *outputs,
    )  # fmt: skip
    return outputs
