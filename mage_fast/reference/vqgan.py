"""The convolutional VQGAN tokenizer in plain PyTorch, with the published parameter names.

Shape suffixes: B images, C channels, H and W pixels or tokens, L = H * W tokens, K codes, N = B * L.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=bias)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU.

    Where the width changes, the published block adds a 1x1 convolution of the branch to the branch: its
    input is not added.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = conv3x3(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = conv3x3(outputs, outputs, bias=False)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs, outputs, kernel_size=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return h_BCHW + (self.nin_shortcut(h_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW)


class Upsample(nn.Module):
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, width, bias=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, with upsampling at the end where asked for."""

    def __init__(self, widths: list[int], groups: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(*pair, groups) for pair in pairwise(widths))
        if upsample:
            self.upsample = Upsample(widths[-1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return self.upsample(x_BCHW) if hasattr(self, "upsample") else x_BCHW


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.block_1(x_BCHW))


class Encoder(nn.Module):
    """Images to features; 2x2 average pooling between levels."""

    def __init__(self, base: int, widths: list[int], blocks: int, features: int, groups: int) -> None:
        super().__init__()
        self.conv_in = conv3x3(3, base, bias=False)
        before = [base, *widths[:-1]]
        self.down = nn.ModuleList(
            Level([before[level], *[width] * blocks], groups) for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], features, kernel_size=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(images_B3HW)
        for index, level in enumerate(self.down):
            if index > 0:
                x_BCHW = F.avg_pool2d(x_BCHW, 2)
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    """Features to images; levels run from the last to 0, all but 0 end with 2x upsampling."""

    def __init__(self, widths: list[int], blocks: int, features: int, groups: int) -> None:
        super().__init__()
        self.conv_in = conv3x3(features, widths[-1], bias=True)
        self.mid = Middle(widths[-1], groups)
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level([before[level], *[width] * blocks], groups, upsample=level > 0)
            for level, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = conv3x3(widths[0], 3, bias=True)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class Quantizer(nn.Module):
    """Nearest codebook entry in squared Euclidean distance, by the whole distance matrix."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def forward(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        z_BHWC = z_BCHW.permute(0, 2, 3, 1).contiguous()
        z_NC = z_BHWC.flatten(0, 2)
        codes_KC = self.embedding.weight
        distance_NK = (z_NC**2).sum(1, keepdim=True) + (codes_KC**2).sum(1) - 2 * z_NC @ codes_KC.t()
        ids_N = distance_NK.argmin(dim=1)
        z_q_BCHW = self.embedding(ids_N).view(z_BHWC.shape).permute(0, 3, 1, 2).contiguous()
        return z_q_BCHW, ids_N.view(z_BCHW.shape[0], -1)


class VQGAN(nn.Module):
    """Images in [0, 1] to codebook ids and back; the defaults are the published sizes."""

    def __init__(
        self,
        *,
        codebook_size: int = 1024,
        codebook_dim: int = 256,
        base_width: int = 128,
        width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks_per_level: int = 2,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [base_width * multiplier for multiplier in width_multipliers]
        self.encoder = Encoder(base_width, widths, blocks_per_level, codebook_dim, norm_groups)
        self.decoder = Decoder(widths, blocks_per_level, codebook_dim, norm_groups)
        self.quantize = Quantizer(codebook_size, codebook_dim)

    @classmethod
    def from_config(cls, config: Any) -> VQGAN:
        """Sizes from any object with the attributes of a ``TokenizerConfig``."""
        names = ("codebook_size", "codebook_dim", "base_width", "width_multipliers", "blocks_per_level")
        return cls(**{name: getattr(config, name) for name in (*names, "norm_groups")})

    def encode(
        self, images_B3HW: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Int64[Tensor, "B L"]]:
        """``(quantised features, ids)`` of images in [0, 1]."""
        return self.quantize(self.encoder(images_B3HW))

    def decode(self, z_q_BCHW: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of quantised features; the range is about [0, 1], unclamped."""
        return self.decoder(z_q_BCHW)

    def decode_ids(self, ids_BL: Int64[Tensor, "B L"]) -> Float[Tensor, "B 3 H W"]:
        """Images of ids on a square grid."""
        side = int(ids_BL.shape[1] ** 0.5)
        assert side * side == ids_BL.shape[1]
        z_q_BHWC = self.quantize.embedding(ids_BL).unflatten(1, (side, side))
        return self.decode(z_q_BHWC.permute(0, 3, 1, 2).contiguous())
