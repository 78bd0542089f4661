"""Token embedding: words, positions, LayerNorm and dropout, for the tokens the encoder sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from mage_fast.kernels.ops.embed_kept.api import embed_kept
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.linear import Linear
from mage_fast.tokenizer import FeatureTokenizer, Tokenizer

NORM_EPS = 1e-6


class TokenEmbedding(nn.Module):
    """Word plus position embedding, normalised; position 0 is the class token.

    With ``encoder_input="features"`` the tokenizer's features, projected, stand for the words of unmasked
    tokens (MAGE table 6).

    Args:
        config: the model's configuration.
        feature_size: channels of a token's features, see :func:`feature_size`.
    """

    def __init__(self, config: MAGEConfig, feature_size: int | None = None) -> None:
        super().__init__()
        self.mask_token_id = config.mask_token_id
        self.dropout = config.dropout
        self.word_embeddings = nn.Embedding(config.vocabulary_size, config.encoder_width)
        self.position_embeddings = nn.Embedding(config.num_tokens + 1, config.encoder_width)
        self.norm = nn.LayerNorm(config.encoder_width, eps=NORM_EPS)
        self.feature_projection = None if feature_size is None else Linear(feature_size, config.encoder_width)

    def forward(
        self,
        inputs: Int[Tensor, "B L"] | Float[Tensor, "B L C"],
        class_ids_B: Int[Tensor, "B"],
        plan: MaskPlan,
        rng_state: Tensor | None,
    ) -> Float[Tensor, "T D"]:
        """Packed rows of the plan's kept positions.

        Raises:
            ValueError: ids for a model of features.
        """
        if self.feature_projection is not None:
            return self._embed_features(inputs, class_ids_B, plan, rng_state, self.feature_projection)
        return embed_kept(
            inputs,
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

    def _embed_features(
        self,
        features_BLC: Tensor,
        class_ids_B: Tensor,
        plan: MaskPlan,
        rng_state: Tensor | None,
        projection: Linear,
    ) -> Tensor:
        """As ``embed_kept``, sums and statistics in float32 too, and the same dropout."""
        if not features_BLC.is_floating_point():
            raise ValueError(
                "MAGE: got ids, wanted what the tokenizer computes before it quantizes: this model's "
                'encoder_input is "features"'
            )
        weight_VD, positions_T = self.word_embeddings.weight, plan.positions_T
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        ids_BL = torch.full_like(plan.is_masked_BL, self.mask_token_id, dtype=class_ids_B.dtype)
        ids_T = torch.cat([class_ids_B[:, None], ids_BL], 1).flatten().index_select(0, positions_T)
        word_TD = F.embedding(ids_T, weight_VD)
        # position 0 has no features; kept rows alone are projected
        features_BSC = F.pad(features_BLC, (0, 0, 1, 0))
        seen_BS = F.pad(~plan.is_masked_BL, (1, 0))
        feature_TD = projection(features_BSC.flatten(0, 1).index_select(0, positions_T))
        seen_T1 = seen_BS.flatten().index_select(0, positions_T)[:, None]
        position_TD = F.embedding(positions_T % seen_BS.shape[1], self.position_embeddings.weight)
        x_TD = torch.where(seen_T1, feature_TD.to(wide), word_TD.to(wide)) + position_TD.to(wide)
        norm_weight_D, norm_bias_D = self.norm.weight.to(wide), self.norm.bias.to(wide)
        x_TD = F.layer_norm(x_TD, norm_weight_D.shape, norm_weight_D, norm_bias_D, self.norm.eps)
        if self.training and self.dropout > 0.0:
            assert rng_state is not None
            stream = rng.stream(rng.Stream.EMBEDDING_DROPOUT)
            keep_TD = rng.keep_mask(rng_state, stream, x_TD.shape, self.dropout).to(x_TD.dtype)
            x_TD = x_TD * (keep_TD * rng.keep_scale(self.dropout, rng.ACTIVATION_BITS))
        return x_TD.to(weight_VD.dtype)


def feature_size(config: MAGEConfig, tokenizer: Tokenizer | None) -> int | None:
    """Channels of the features that the encoder sees; None for a model of tokens.

    Raises:
        ValueError: no tokenizer to make features, or one that gives none.
    """
    if config.encoder_input == "tokens":
        return None
    if tokenizer is None and config.tokenizer is not None:
        return config.tokenizer.codebook_dim
    if not isinstance(tokenizer, FeatureTokenizer):
        got = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise ValueError(
            f'MAGE: encoder_input is "features" and there is {got}, wanted a tokenizer with feature_size and '
            "encode_with_features"
        )
    return tokenizer.feature_size
