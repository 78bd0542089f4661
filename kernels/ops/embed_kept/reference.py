"""Embedding of the kept tokens only.

e = word[id] + position[p],  id = class id at p = 0, [M] at a masked token, else the token's id
x = dropout(LayerNorm(e))
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels import rng


def embed_kept(
    ids_BL: Tensor,
    class_ids_B: Tensor,
    positions_T: Tensor,
    is_masked_BL: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    mask_token_id: int,
    eps: float,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(word_weight_VD.dtype, torch.float32)
    ids_BS = torch.cat([class_ids_B[:, None], ids_BL.masked_fill(is_masked_BL, mask_token_id)], 1)
    ids_T = ids_BS.flatten()[positions_T]
    embedded_TD = _embed(ids_T, positions_T, word_weight_VD, position_weight_SD)
    normed_TD, mean_T1, rstd_T1 = torch.native_layer_norm(
        embedded_TD, norm_weight_D.shape, norm_weight_D.to(accumulate), norm_bias_D.to(accumulate), eps
    )
    x_TD = rng.dropout(normed_TD, rng_state, stream, dropout).to(word_weight_VD.dtype)
    return x_TD, ids_T.to(torch.int32), mean_T1, rstd_T1


def _embed(ids_T: Tensor, positions_T: Tensor, word_weight_VD: Tensor, position_weight_SD: Tensor) -> Tensor:
    accumulate = torch.promote_types(word_weight_VD.dtype, torch.float32)
    position_T = positions_T % position_weight_SD.shape[0]
    return word_weight_VD[ids_T].to(accumulate) + position_weight_SD[position_T].to(accumulate)


def embed_kept_backward(
    grad_TD: Tensor,
    ids_T: Tensor,
    positions_T: Tensor,
    mean_T1: Tensor,
    rstd_T1: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    dropout: float,
    rng_state: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = mean_T1.dtype
    embedded_TD = _embed(ids_T, positions_T, word_weight_VD, position_weight_SD)
    grad_normed_TD = rng.dropout(grad_TD.to(accumulate), rng_state, stream, dropout)
    weight_D = norm_weight_D.to(accumulate)
    grad_embedded_TD, grad_weight_D, grad_bias_D = torch.ops.aten.native_layer_norm_backward(
        grad_normed_TD, embedded_TD, weight_D.shape, mean_T1, rstd_T1, weight_D, weight_D, [True] * 3
    )
    position_T = positions_T % position_weight_SD.shape[0]
    grad_word_VD = grad_embedded_TD.new_zeros(word_weight_VD.shape).index_add_(0, ids_T, grad_embedded_TD)
    grad_position_SD = grad_embedded_TD.new_zeros(position_weight_SD.shape)
    grad_position_SD.index_add_(0, position_T, grad_embedded_TD)
    return (
        grad_word_VD.to(word_weight_VD.dtype),
        grad_position_SD.to(position_weight_SD.dtype),
        grad_weight_D.to(norm_weight_D.dtype),
        grad_bias_D.to(norm_weight_D.dtype),
    )
