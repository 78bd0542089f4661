"""The token head and the reconstruction loss (MAGE equation 1), at masked rows only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.config import MAGEConfig
from mage_fast.kernels.ops.bias_gelu.api import bias_gelu
from mage_fast.kernels.ops.masked_cross_entropy.api import masked_cross_entropy
from mage_fast.linear import Linear, project


class TokenHead(nn.Module):
    """Linear, erf GELU, LayerNorm (eps 1e-5), then a product with the word embeddings plus a bias.

    The word embeddings are shared with the encoder's input; no gradient reaches them from here, but in a
    model that sees features, where no other would train them.
    """

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.trains_words = config.encoder_input == "features"
        self.fc = Linear(config.decoder_width, config.encoder_width)
        self.norm = nn.LayerNorm(config.encoder_width, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(1, 1, config.vocabulary_size))

    def forward(
        self, x_ND: Float[Tensor, "*rows D"], word_weight_VD: Float[Tensor, "V D"]
    ) -> Float[Tensor, "*rows C"]:
        """Logits over the codebook's ids, which come first in the vocabulary."""
        codes = self.codebook_size
        hidden_ND = self.norm(bias_gelu(self.fc.product(x_ND), self.fc.bias))
        word_weight_CD = word_weight_VD[:codes]
        if not self.trains_words:
            word_weight_CD = word_weight_CD.detach()
        return project(hidden_ND, word_weight_CD, self.bias[0, 0, :codes])


def rows_of_tokens(index_N: Int[Tensor, "N"], length: int) -> Int[Tensor, "N"]:
    """Rows of the tokens ``b * L + l`` in packed sequences that start with a class token; row 0 for -1."""
    # token b * L + l stands in row b * (L + 1) + l + 1; -1, which fills up, takes any row
    return (index_N + index_N.div(length, rounding_mode="floor") + 1).clamp(min=0)


def reconstruction_loss(
    logits_NC: Float[Tensor, "N C"],
    ids_BL: Int[Tensor, "B L"],
    masked_index_N: Int[Tensor, "N"],
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """Cross-entropy with label smoothing, averaged over the masked tokens of the batch; 0 without any.

    Rows whose index is -1 (a plan filled up to a fixed size) count nothing.
    """
    targets_N = ids_BL.flatten()[masked_index_N].masked_fill(masked_index_N < 0, -1)
    return masked_cross_entropy(logits_NC, targets_N, label_smoothing=label_smoothing)
