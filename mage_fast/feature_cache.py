"""An approximation of decoding: encoder features are kept for a step, and only new tokens' are computed.

Shape suffixes: B samples, L tokens a sample, S = L + 1 positions, T = B * S encoder rows, R refreshed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.blocks import Block
from mage_fast.kernels.ops.add_norm.api import add_norm
from mage_fast.kernels.ops.attention.api import attention
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.model import MAGE


class FeatureCache:
    """The encoder's features of one batch of a ``"paper"`` model in eval mode, from step to step.

    A whole pass computes all rows and keeps every block's queries, keys and values. A partial pass computes
    the rows of the class tokens and of the tokens decided since the whole pass: they attend to each other
    and to what was kept of all other tokens, whose features stay as they were.
    """

    def __init__(self, model: MAGE) -> None:
        self.model = model
        #: Of the whole pass: each block's qkv, the output, what was masked.
        self._qkv: list[Float[Tensor, "T 3D"]] = []
        self._features_TD: Tensor
        self._is_masked_BL: Tensor
        self._num_masked: Sequence[int]

    def masked_logits(
        self,
        ids_BL: Int[Tensor, "B L"],
        class_ids_B: Int[Tensor, "B"],
        plan: MaskPlan,
        num_masked: Sequence[int],
        *,
        partial: bool,
    ) -> Float[Tensor, "N C"]:
        """As :meth:`MAGE.masked_logits`, by a whole pass or, after one, by a partial pass of the encoder.

        Args:
            ids_BL: ids of the vocabulary.
            class_ids_B: ids of the first position.
            plan: what is masked; nothing is dropped. A partial pass wants a part of the whole pass's.
            num_masked: row sums of the mask.
            partial: whether to compute the new rows only.
        """
        model = self.model
        x_TD = model.embedding(ids_BL, class_ids_B, plan, None)
        if partial:
            rows_R = self._new_rows(plan, num_masked)
            features_RD = self._encode(x_TD.index_select(0, rows_R), plan, rows_R)
            self._features_TD = self._features_TD.index_copy(0, rows_R, features_RD)
        else:
            self._is_masked_BL, self._num_masked = plan.is_masked_BL, num_masked
            self._features_TD = self._encode(x_TD, plan, None)
        visible_VD = self._features_TD
        if plan.visible_V is not None:
            visible_VD = visible_VD.index_select(0, plan.visible_V)
        return model.decode_masked(visible_VD, plan, None)

    def _new_rows(self, plan: MaskPlan, num_masked: Sequence[int]) -> Int[Tensor, "R"]:
        is_new_BL = self._is_masked_BL & ~plan.is_masked_BL
        is_new_BS = torch.cat([is_new_BL.new_ones(len(is_new_BL), 1), is_new_BL], 1)
        count = len(num_masked) + sum(self._num_masked) - sum(num_masked)
        return torch.nonzero_static(is_new_BS.flatten(), size=count).flatten()

    def _encode(self, x_RD: Tensor, plan: MaskPlan, rows_R: Tensor | None) -> Float[Tensor, "R D"]:
        """The encoder's normalised output at ``rows_R``, or at all rows."""
        encoder = self.model.encoder
        blocks = [cast(Block, block) for block in encoder.blocks]
        normed_RD = blocks[0].norm1(x_RD)
        if rows_R is None:
            self._qkv = []
        for layer, block in enumerate(blocks):
            qkv_RD = block.attention.qkv(normed_RD)
            if rows_R is None:
                self._qkv.append(qkv_RD)
            else:
                self._qkv[layer].index_copy_(0, rows_R, qkv_RD)
            qkv_T3HD = self._qkv[layer].unflatten(1, (3, block.attention.heads, -1))
            out_RD = attention(qkv_T3HD, plan.cu_seqlens, max_seqlen=plan.max_seqlen).flatten(1)
            if rows_R is not None:
                out_RD = out_RD.index_select(0, rows_R)
            next_norm = blocks[layer + 1].norm1 if block is not blocks[-1] else encoder.norm
            x_RD, normed_RD = _add(block.attention.proj(out_RD), x_RD, block.norm2)
            x_RD, normed_RD = _add(block.mlp(normed_RD, None), x_RD, next_norm)
        return normed_RD


def _add(branch_RD: Tensor, x_RD: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return add_norm(branch_RD, x_RD, norm.weight, norm.bias, eps=norm.eps)
