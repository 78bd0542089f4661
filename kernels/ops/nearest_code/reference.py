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

    def nearest(x_ND: Tensor) -> Tensor:
        return torch.addmm(square_K, x_ND.to(accumulate), codebook_KD.T, alpha=-2).argmin(1)

    if torch.compiler.is_compiling():  # a traced program has any number of rows: no number of chunks fits
        return nearest(x_ND)
    return torch.cat([nearest(x_chunk_ND) for x_chunk_ND in x_ND.split(max(1, _CHUNK // len(codebook_KD)))])
