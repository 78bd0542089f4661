"""The decoder: padding to the full grid and transformer blocks over all positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.blocks import Block, run_blocks
from mage_fast.config import MAGEConfig
from mage_fast.embedding import NORM_EPS
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.kernels.ops.pad_decoder.api import pad_decoder
from mage_fast.linear import Linear


class Decoder(nn.Module):
    """Linear to the decoder's width, padding plus positions, ``decoder_depth`` blocks, LayerNorm."""

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = Linear(config.encoder_width, width)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_tokens + 1, width))
        if config.padding == "mask_token":
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        else:
            self.register_parameter("mask_token", None)
        sizes = (width, config.decoder_heads, config.mlp_ratio, config.dropout)
        # layers count on from the encoder's, so that no two layers share a random stream
        layers = range(config.encoder_depth, config.encoder_depth + config.decoder_depth)
        self.blocks = nn.ModuleList(Block(*sizes, layer) for layer in layers)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(
        self,
        encoded_VD: Float[Tensor, "V D"],
        plan: MaskPlan,
        rng_state: Tensor | None,
        rows_N: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N D"]:
        """Normalised output at every position of every image, ``[B * S, D]``, or at ``rows_N`` only."""
        x_BSD = pad_decoder(
            self.embed(encoded_VD),
            plan.source_BS,
            plan.visible_cu_seqlens,
            self.position_embeddings[0],
            mask_token_D=None if self.mask_token is None else self.mask_token.flatten(),
        )
        batch, positions, _ = x_BSD.shape
        cu_seqlens = torch.arange(0, batch * positions + 1, positions, dtype=torch.int32, device=x_BSD.device)
        x_TD = x_BSD.flatten(0, 1)
        return run_blocks(self.blocks, self.norm, x_TD, cu_seqlens, positions, rng_state, rows_N)[1]
