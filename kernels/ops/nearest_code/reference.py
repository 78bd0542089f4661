"""The nearest codebook entry as an equation.

argmin_k |x - c_k|^2 = argmin_k (|c_k|^2 - 2 x . c_k)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Distances held at a time: 16 MiB in float32.
_CHUNK = 2**22


def nearest_code(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    accumulate = torch.promote_types(torch.promote_types(x_ND.dtype, codebook_KD.dtype), torch.float32)
    codebook_KD = codebook_KD.to(accumulate)
    square_K = codebook_KD.square().sum(1)
    index_N = torch.empty(x_ND.shape[0], dtype=torch.int64, device=x_ND.device)
    rows = max(1, _CHUNK // codebook_KD.shape[0])
    for x_chunk_ND, index_chunk_N in zip(x_ND.split(rows), index_N.split(rows), strict=True):
        distance_NK = torch.addmm(square_K, x_chunk_ND.to(accumulate), codebook_KD.T, alpha=-2)
        torch.argmin(distance_NK, 1, out=index_chunk_N)
    return index_N
