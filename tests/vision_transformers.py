"""Small vision transformers whose parts have the names that timm and MAE give theirs: stand-ins for both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """As in timm: scaled_dot_product_attention, a mask may be given."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, qk_norm: bool = False, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.heads_of(x)
        p = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=p, is_causal=is_causal, scale=self.scale
        )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class CausalAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, is_causal=True)


class HeadsFirstAttention(Attention):
    """Each head's q, k and v stand together."""

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(2, (self.num_heads, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)


class UnnamedHeadsAttention(Attention):
    """The number of heads under a name that no one knows."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.how_many = self.num_heads
        del self.num_heads

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(2, (3, self.how_many, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


class FunctionalDropoutAttention(Attention):
    """Drops without an nn.Dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class BiasedAttention(Attention):
    """A learned table beside the linear layers."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, num_heads))


class WindowAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] % 4 == 0, "wanted whole windows"
        return super().forward(x.unflatten(1, (-1, 4)).flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1, 2)


class Mlp(nn.Module):
    """As in timm."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, drop: float, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class OneDropMlp(nn.Module):
    """As in the timm that MAE was made with."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, drop: float) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), act, nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drops a branch of a whole sample."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class Block(nn.Module):
    """As in timm; what makes a variant is given."""

    def __init__(
        self,
        dim: int = 16,
        num_heads: int = 2,
        *,
        attention: type[Attention] = Attention,
        mlp: type[nn.Module] = Mlp,
        act: nn.Module | None = None,
        norm: Any = nn.LayerNorm,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: bool = False,
        mlp_options: dict[str, Any] | None = None,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attention(dim, num_heads, drop=drop, **attention_options)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(dim)
        self.mlp = mlp(dim, 3 * dim, act or nn.GELU(), drop, **(mlp_options or {}))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **options)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks, a norm and a head."""

    def __init__(self, depth: int = 2, dim: int = 16, **options: Any) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, **options) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])
