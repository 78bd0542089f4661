"""Token embedding: words, positions, LayerNorm and dropout, for the tokens the encoder sees."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from mage_fast.kernels.ops.embed_kept.api import embed_kept
from mage_fast.kernels.ops.mask_plan.api import MaskPlan

NORM_EPS = 1e-6


class TokenEmbedding(nn.Module):
    """Word plus position embedding, normalised; position 0 is the class token."""

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        self.mask_token_id = config.mask_token_id
        self.dropout = config.dropout
        self.word_embeddings = nn.Embedding(config.vocabulary_size, config.encoder_width)
        self.position_embeddings = nn.Embedding(config.num_tokens + 1, config.encoder_width)
        self.norm = nn.LayerNorm(config.encoder_width, eps=NORM_EPS)

    def forward(
        self,
        ids_BL: Int[Tensor, "B L"],
        class_ids_B: Int[Tensor, "B"],
        plan: MaskPlan,
        rng_state: Tensor | None,
    ) -> Float[Tensor, "T D"]:
        """Packed rows of the plan's kept positions."""
        return embed_kept(
            ids_BL,
            class_ids_B,
            plan.positions_T,
            plan.is_masked_BL,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.norm.weight,
            self.norm.bias,
            mask_token_id=self.mask_token_id,
            eps=self.norm.eps,
            dropout=self.dropout if self.training else 0.0,
            rng_state=rng_state,
            stream=rng.stream(rng.Stream.EMBEDDING_DROPOUT),
        )
