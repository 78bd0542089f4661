"""The layers of MAGE in plain PyTorch, with the published parameter names.

Shape suffixes: B images, S positions, D features, H heads, V vocabulary ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with the probabilities written out."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        # float16 scores overflow in a deep encoder: the release leaves autocast for them
        with torch.autocast(x_BSD.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            scores_BHSS = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * self.scale
        probabilities_BHSS = self.attn_drop(scores_BHSS.softmax(dim=-1))
        out_BSD = (probabilities_BHSS @ v).transpose(1, 2).reshape(B, S, D)
        return self.proj_drop(self.proj(out_BSD))


class MLP(nn.Module):
    """Two linear layers with an erf GELU between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenEmbedding(nn.Module):
    """Word plus position embedding, LayerNorm, dropout."""

    position_ids: Tensor

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("position_ids", torch.arange(positions)[None])
        nn.init.normal_(self.word_embeddings.weight, std=0.02)
        nn.init.normal_(self.position_embeddings.weight, std=0.02)

    def forward(self, ids_BS: Tensor) -> Tensor:
        positions_1S = self.position_ids[:, : ids_BS.shape[1]]
        x_BSD = self.word_embeddings(ids_BS) + self.position_embeddings(positions_1S)
        return self.dropout(self.LayerNorm(x_BSD))


class MlmLayer(nn.Module):
    """Decoder features to logits through the word embedding, which gets no gradient from here."""

    def __init__(self, features: int, word_width: int, vocabulary: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, word_width)
        self.ln = nn.LayerNorm(word_width)
        self.bias = nn.Parameter(torch.zeros(1, 1, vocabulary))

    def forward(self, x_BSD: Tensor, word_embeddings_VD: Tensor) -> Tensor:
        x_BSD = self.ln(F.gelu(self.fc(x_BSD)))
        return x_BSD @ word_embeddings_VD.detach().t() + self.bias


class PatchEmbedding(nn.Module):
    """Parameters of the published layout that nothing uses."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
