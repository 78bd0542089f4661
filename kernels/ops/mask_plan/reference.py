"""Random masking with exact counts: a random order of the tokens, cut at the counts.

rank[b, l]    = place of word[b, l] among the random words of sample b; of equal words the first is before
masked[b, l]  = rank[b, l] < num_masked[b]
dropped[b, l] = rank[b, l] < num_dropped[b]
encoder rows: class token and what is not dropped;  rows of the loss: what is masked
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels import rng


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
    noise_BL = rng.words(rng_state, stream, batch, length)
    # rank in the random order; equal words keep their positions' order, so counts are exact
    rank_BL = noise_BL.argsort(dim=1, stable=True).argsort(dim=1)
    is_masked_BL = rank_BL < num_masked_B[:, None]
    is_dropped_BL = rank_BL < num_dropped_B[:, None]
    return plan_tensors(is_masked_BL, is_dropped_BL, total_masked, total_kept, total_visible)


def plan_tensors(
    is_masked_BL: Tensor, is_dropped_BL: Tensor, total_masked: int, total_kept: int, total_visible: int
) -> tuple[Tensor, ...]:
    """The tensors of a plan: positions, cu_seqlens, masked_index, source, is_masked, visible and its
    cu_seqlens.
    """
    class_token_B1 = is_masked_BL.new_ones(is_masked_BL.shape[0], 1)
    kept_BS = torch.cat([class_token_B1, ~is_dropped_BL], 1)
    visible_BS = torch.cat([class_token_B1, ~is_masked_BL], 1)
    # nonzero_static: the sizes are known on the host, so nothing waits for the device
    positions_T = torch.nonzero_static(kept_BS.flatten(), size=total_kept).flatten()
    masked_index_N = torch.nonzero_static(is_masked_BL.flatten(), size=total_masked).flatten()
    # 0 fills up: the first position, whose packed row is 0
    visible_positions_V = torch.nonzero_static(visible_BS.flatten(), size=total_visible, fill_value=0)
    packed_row_P = kept_BS.flatten().cumsum(0) - 1
    visible_row_BS = visible_BS.flatten().cumsum(0).view_as(visible_BS) - 1
    return (
        positions_T.to(torch.int32),
        _first_rows(kept_BS),
        masked_index_N.to(torch.int32),
        visible_row_BS.masked_fill(~visible_BS, -1).to(torch.int32),
        is_masked_BL,
        packed_row_P[visible_positions_V.flatten()].to(torch.int32),
        _first_rows(visible_BS),
    )


def _first_rows(is_row_BS: Tensor) -> Tensor:
    """cu_seqlens: the first row of each sample, and their number."""
    return torch.nn.functional.pad(is_row_BS.sum(1).cumsum(0), (1, 0)).to(torch.int32)
