"""The decoder's input as an equation.

out[b, s] = encoded[source[b, s]] + position[s]    where source[b, s] >= 0
            padding[b] + position[s]               elsewhere
padding[b] = encoded[cu_seqlens[b]], image b's class feature, or the mask token
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _row_BS(source_BS: Tensor, cu_seqlens: Tensor, rows: int, with_mask_token: bool) -> Tensor:
    """Row that feeds each position; row ``rows`` stands for the mask token."""
    if with_mask_token:
        return torch.where(source_BS < 0, rows, source_BS)
    return torch.where(source_BS < 0, cu_seqlens[:-1, None], source_BS)


def pad_decoder(
    encoded_TD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    position_weight_SD: Tensor,
    mask_token_D: Tensor | None,
) -> Tensor:
    row_BS = _row_BS(source_BS, cu_seqlens, encoded_TD.shape[0], mask_token_D is not None)
    table = encoded_TD if mask_token_D is None else torch.cat([encoded_TD, mask_token_D[None]])
    dtype = torch.promote_types(encoded_TD.dtype, position_weight_SD.dtype)
    return F.embedding(row_BS, table).add(position_weight_SD).to(dtype)


def pad_decoder_backward(
    grad_BSD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    rows: int,
    with_mask_token: bool,
    encoded_dtype: torch.dtype,
    position_dtype: torch.dtype,
    mask_token_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(grad_BSD.dtype, torch.float32)
    row_BS = _row_BS(source_BS, cu_seqlens, rows, with_mask_token)
    # a row collects the gradient of all its uses; the class feature's are also its image's padded positions
    grad_table = grad_BSD.new_zeros((rows + with_mask_token, grad_BSD.shape[-1]), dtype=accumulate)
    grad_table.index_add_(0, row_BS.flatten(), grad_BSD.flatten(0, 1).to(accumulate))
    return (
        grad_table[:rows].to(encoded_dtype),
        grad_BSD.sum(0, dtype=accumulate).to(position_dtype),
        grad_table[rows:].sum(0).to(mask_token_dtype),
    )
