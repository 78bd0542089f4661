"""The encoder: transformer blocks over the packed kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from mage_fast.blocks import Block, run_blocks
from mage_fast.config import MAGEConfig
from mage_fast.embedding import NORM_EPS
from mage_fast.kernels.ops.mask_plan.api import MaskPlan


class Encoder(nn.Module):
    """``encoder_depth`` blocks and a final LayerNorm."""

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        sizes = (config.encoder_width, config.encoder_heads, config.mlp_ratio, config.dropout)
        self.blocks = nn.ModuleList(Block(*sizes, layer) for layer in range(config.encoder_depth))
        self.norm = nn.LayerNorm(config.encoder_width, eps=NORM_EPS)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        plan: MaskPlan,
        rng_state: Tensor | None,
        *,
        all_rows: bool = False,
    ) -> Float[Tensor, "V D"]:
        """Normalised output of the plan's visible rows: the decoder reads no other.

        ``all_rows`` gives every packed row, ``[T, D]``, to a loss that reads the encoder's output itself.
        """
        rows_N = None if all_rows else plan.visible_V
        return run_blocks(self.blocks, self.norm, x_TD, plan.cu_seqlens, plan.max_seqlen, rng_state, rows_N)[
            1
        ]

    def block_output(
        self, x_TD: Float[Tensor, "T D"], plan: MaskPlan, block: int, rng_state: Tensor | None
    ) -> Float[Tensor, "T D"]:
        """The residual stream after block number ``block``, before any norm."""
        return next(islice(self.block_outputs(x_TD, plan, rng_state), block, None))

    def block_outputs(
        self, x_TD: Float[Tensor, "T D"], plan: MaskPlan, rng_state: Tensor | None
    ) -> Iterator[Float[Tensor, "T D"]]:
        """The residual stream after each block in turn, before any norm."""
        blocks = [cast(Block, block) for block in self.blocks]
        next_norms = [block.norm1 for block in blocks[1:]] + [self.norm]
        normed_TD = blocks[0].norm1(x_TD)
        for block, next_norm in zip(blocks, next_norms, strict=True):
            x_TD, normed_TD = block(
                x_TD, normed_TD, next_norm, plan.cu_seqlens, plan.max_seqlen, rng_state, None
            )
            yield x_TD
