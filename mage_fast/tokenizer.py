"""Tokenizers: images to a grid of codebook ids and back.

:class:`Tokenizer` is what a model asks for; :class:`VQGAN` is the paper's. Its parameter names are the
published ones without their ``vqgan.`` prefix. Shapes are torch's usual ones, the memory format is
channels_last throughout: of images, features and convolution weights.

Shape suffixes: B images, C channels, H and W pixels or tokens, L tokens an image, N = B * L, K codes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mage_fast import storage
from mage_fast.config import TokenizerConfig
from mage_fast.hub import HubMixin, local_path
from mage_fast.kernels.ops.group_norm_silu.api import group_norm_silu
from mage_fast.kernels.ops.nearest_code.api import nearest_code


@runtime_checkable
class Tokenizer(Protocol):
    """What a model needs of a tokenizer; any object with these members will do."""

    @property
    def codebook_size(self) -> int:
        """Number of codes: ids are in [0, codebook_size)."""
        ...

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the square grid."""
        ...

    def encode(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B L"]:
        """Ids, row by row, of RGB images in [0, 1]."""
        ...

    def decode(self, ids_BL: Int64[Tensor, "B L"]) -> Float[Tensor, "B 3 H W"]:
        """Images of ids; the range is about [0, 1], unclamped."""
        ...


@runtime_checkable
class FeatureTokenizer(Tokenizer, Protocol):
    """What a model with ``encoder_input="features"`` needs of a tokenizer beside."""

    @property
    def feature_size(self) -> int:
        """Channels of a token's features."""
        ...

    def encode_with_features(
        self, images_B3HW: Float[Tensor, "B 3 H W"]
    ) -> tuple[Int64[Tensor, "B L"], Float[Tensor, "B L C"]]:
        """Ids as :meth:`encode` gives them, and the features they were quantized from."""
        ...


class Reconstruction(NamedTuple):
    """What :meth:`VQGAN.forward` returns, for the losses of tokenizer training."""

    images: Float[Tensor, "B 3 H W"]
    ids: Int64[Tensor, "B L"]
    #: The encoder's features and their nearest codes; gradients reach the codebook through the second.
    z: Float[Tensor, "B C h w"]
    z_q: Float[Tensor, "B C h w"]


class GroupNormSiLU(nn.Module):
    """``F.silu(F.group_norm(x))`` in one op."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return group_norm_silu(x_BCHW, self.weight, self.bias, num_groups=self.groups, eps=1e-6)


def _conv3x3(inputs: int, outputs: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=bias)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU.

    Where the width changes, a 1x1 convolution of the branch takes the place of the input in the sum: so
    were the published weights trained.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, inputs)
        self.conv1 = _conv3x3(inputs, outputs, bias=False)
        self.norm2 = GroupNormSiLU(groups, outputs)
        self.conv2 = _conv3x3(outputs, outputs, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))
        return h_BCHW + (x_BCHW if self.nin_shortcut is None else self.nin_shortcut(h_BCHW))


class Upsample(nn.Module):
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution, in 4/9 of its products.

    Equivalent PyTorch: ``self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))``. A pixel of the large
    map sees only 2 x 2 different pixels of the small one, with weights that depend on whether its row and
    its column are even: so four 2x2 convolutions of the small map, in one call, give all.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3x3(width, width, bias=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert self.conv.bias is not None
        phases_BPHW = F.conv2d(x_BCHW, _phase_weights(self.conv.weight), self.conv.bias.repeat(4), padding=1)
        return _Interleave.apply(phases_BPHW)


def _phase_weights(weight_OCHW: Tensor) -> Tensor:
    """3x3 weights for the upsampled map as 2x2 weights for the small one, ``[4 * O, C, 2, 2]``.

    Even rows (columns) see the row above once and their own twice, odd ones their own twice and the one
    below once. Summed in float32.
    """
    wide_OHWC = weight_OCHW.permute(0, 2, 3, 1).to(torch.promote_types(weight_OCHW.dtype, torch.float32))
    top, middle, bottom = wide_OHWC.unbind(1)
    rows = torch.stack((top, middle + bottom, top + middle, bottom)).unflatten(0, (2, 2))
    left, centre, right = rows.unbind(3)
    taps = torch.stack((left, centre + right, left + centre, right)).unflatten(0, (2, 2))
    # (column phase, column tap, row phase, row tap, O, C) to channels_last weights of (row, column) phases
    return taps.permute(2, 0, 4, 3, 1, 5).flatten(0, 2).to(weight_OCHW.dtype).permute(0, 3, 1, 2)


class _Interleave(torch.autograd.Function):
    """Four maps a pixel larger, as channels (row phase, column phase, C), to one map of twice the size.

    The row (column) of odd phase at index i is the map's i + 1: with that shift all is one strided view.
    """

    @staticmethod
    def forward(ctx: Any, phases_BPHW: Tensor) -> Tensor:
        ctx.batch, ctx.channels, ctx.height, ctx.width = phases_BPHW.shape
        view = _phase_view(phases_BPHW.contiguous(memory_format=torch.channels_last))
        return view.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BCHW: Tensor) -> Tensor:
        zeros_BHWP = grad_BCHW.new_zeros(ctx.batch, ctx.height, ctx.width, ctx.channels)
        grad_phases_BPHW = zeros_BHWP.permute(0, 3, 1, 2)
        view = _phase_view(grad_phases_BPHW)
        view.copy_(grad_BCHW.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)))
        return grad_phases_BPHW


def _phase_view(phases_BPHW: Tensor) -> Tensor:
    """``[B, h, 2, w, 2, C]`` of channels_last phases ``[B, 4 * C, h + 1, w + 1]``, no element twice."""
    batch, channels, height, width = phases_BPHW.shape
    row, part = width * channels, channels // 4
    return phases_BPHW.as_strided(
        (batch, height - 1, 2, width - 1, 2, part),
        (height * row, row, row + 2 * part, channels, channels + part, 1),
    )


class Level(nn.Module):
    """The residual blocks of one resolution, with upsampling at the end where asked for."""

    def __init__(self, widths: list[int], groups: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.Sequential(*(ResidualBlock(*pair, groups) for pair in pairwise(widths)))
        self.upsample = Upsample(widths[-1]) if upsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.block(x_BCHW)
        return x_BCHW if self.upsample is None else self.upsample(x_BCHW)


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.block_1(x_BCHW))


class Encoder(nn.Module):
    """Images to features; 2x2 average pooling between levels.

    Under autocast the lowest resolution's sums and what follows them are in the weights' dtype: a rounding
    counts the more the nearer it is to the choice of a code, and few pixels are left to pay for.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_width * multiplier for multiplier in config.width_multipliers]
        self.conv_in = _conv3x3(3, config.base_width, bias=False)
        before = [config.base_width, *widths[:-1]]
        self.down = nn.ModuleList(
            Level([first, *[width] * config.blocks_per_level], config.norm_groups)
            for first, width in zip(before, widths, strict=True)
        )
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = GroupNormSiLU(config.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.codebook_dim, kernel_size=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        # the levels of 8-bit images as whole numbers, which bfloat16 holds exactly
        x_BCHW = F.conv2d(images_B3HW * 255, self.conv_in.weight / 255, padding=1)
        for index, level in enumerate(self.down):
            if index == len(self.down) - 1:
                x_BCHW = x_BCHW.to(dtype)
            x_BCHW = level(x_BCHW if index == 0 else F.avg_pool2d(x_BCHW, 2))
        x_BCHW = self.mid(x_BCHW.to(dtype))
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return self.conv_out(self.norm_out(x_BCHW.to(dtype)))


class Decoder(nn.Module):
    """Features to images; levels run from the last to level 0, all but 0 end with 2x upsampling."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_width * multiplier for multiplier in config.width_multipliers]
        self.conv_in = _conv3x3(config.codebook_dim, widths[-1], bias=True)
        self.mid = Middle(widths[-1], config.norm_groups)
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level([first, *[width] * config.blocks_per_level], config.norm_groups, upsample=level > 0)
            for level, (first, width) in enumerate(zip(before, widths, strict=True))
        )
        self.norm_out = GroupNormSiLU(config.norm_groups, widths[0])
        self.conv_out = _conv3x3(widths[0], 3, bias=True)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW))


class Quantizer(nn.Module):
    """Nearest codebook entry in squared Euclidean distance."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def forward(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        ids_BL = self.nearest(z_BCHW)
        return ids_BL, self.lookup(ids_BL, (z_BCHW.shape[2], z_BCHW.shape[3]))

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        z_NC = z_BCHW.permute(0, 2, 3, 1).reshape(-1, z_BCHW.shape[1])
        return nearest_code(z_NC, self.embedding.weight).view(z_BCHW.shape[0], -1)

    def lookup(self, ids_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.embedding(ids_BL).unflatten(1, grid).permute(0, 3, 1, 2)


class VQGAN(HubMixin, nn.Module):
    """The paper's convolutional tokenizer (section 3.1), of any size."""

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config or TokenizerConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quantize = Quantizer(self.config.codebook_size, self.config.codebook_dim)
        _to_channels_last(self)
        self.register_load_state_dict_post_hook(_to_channels_last)  # assigned weights come as they were saved

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.config.grid_size

    @property
    def feature_size(self) -> int:
        """Channels of a token's features."""
        return self.config.codebook_dim

    def encode_features(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The encoder's features of RGB images in [0, 1], before quantisation, in the weights' dtype.

        Raises:
            ValueError: images of another shape than (B, 3, image_size, image_size), or not floating.
        """
        side = self.config.image_size
        if images_B3HW.dim() != 4 or tuple(images_B3HW.shape[1:]) != (3, side, side):
            raise ValueError(
                f"VQGAN: images have shape {tuple(images_B3HW.shape)}, wanted (B, 3, {side}, {side})"
            )
        if not images_B3HW.is_floating_point():
            got = str(images_B3HW.dtype).removeprefix("torch.")
            raise ValueError(f"VQGAN: images are {got}, wanted a floating dtype with values in [0, 1]")
        dtype = self.encoder.conv_in.weight.dtype
        return self.encoder(images_B3HW.to(dtype, memory_format=torch.channels_last))

    @torch.no_grad()
    def encode(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B L"]:
        """Ids, row by row, of RGB images in [0, 1]; no gradient. Raises as :meth:`encode_features`."""
        return self.encode_with_features(images_B3HW)[0]

    @torch.no_grad()
    def encode_with_features(
        self, images_B3HW: Float[Tensor, "B 3 H W"]
    ) -> tuple[Int64[Tensor, "B L"], Float[Tensor, "B L C"]]:
        """Ids, and the features before quantisation, of one pass; else as :meth:`encode`."""
        z_BCHW = self.encode_features(images_B3HW)
        return self.quantize.nearest(z_BCHW), z_BCHW.flatten(2).mT

    def decode(self, ids_BL: Int64[Tensor, "B L"]) -> Float[Tensor, "B 3 H W"]:
        """Images of ids; the range is about [0, 1], unclamped.

        Raises:
            ValueError: ids of another shape than (B, grid_size ** 2), not integers, or (checked on the
                CPU only, where it costs no synchronisation) outside the codebook.
        """
        tokens = self.grid_size**2
        if ids_BL.dim() != 2 or ids_BL.shape[1] != tokens:
            raise ValueError(f"VQGAN: ids have shape {tuple(ids_BL.shape)}, wanted (B, {tokens})")
        if ids_BL.dtype not in (torch.int64, torch.int32):
            got = str(ids_BL.dtype).removeprefix("torch.")
            raise ValueError(f"VQGAN: ids are {got}, wanted int64 or int32")
        if ids_BL.is_cpu and ids_BL.numel() and not torch.compiler.is_compiling():
            low, high = (int(x) for x in ids_BL.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"VQGAN: ids are in [{low}, {high}], wanted [0, {self.codebook_size - 1}]")
        return self.decode_features(self.quantize.lookup(ids_BL, (self.grid_size, self.grid_size)))

    def decode_features(self, z_q_BCHW: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of quantised features."""
        return self.decoder(z_q_BCHW.contiguous(memory_format=torch.channels_last))

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Reconstruct images; the gradient passes the quantiser straight through to the encoder.

        Raises:
            ValueError: as :meth:`encode_features`.
        """
        z_BCHW = self.encode_features(images_B3HW)
        ids_BL, z_q_BCHW = self.quantize(z_BCHW)
        straight_through_BCHW = z_BCHW + (z_q_BCHW - z_BCHW).detach()
        return Reconstruction(self.decode_features(straight_through_BCHW), ids_BL, z_BCHW, z_q_BCHW)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> Self:
        """The tokenizer of a folder of :meth:`save_pretrained`, or of ``"owner/name"`` on a model hub.

        Raises:
            CheckpointError: a file is missing, truncated or of another configuration; not to be had from the
                hub.
            ValueError: ``config.json`` has an unknown key or a value out of range.
        """
        folder = local_path(folder, revision)
        values, state = storage.load_pretrained(folder)
        config = TokenizerConfig.from_dict(values)
        with torch.device("meta"):  # the checkpoint's tensors become the parameters
            tokenizer = cls(config)
        storage.load_state(tokenizer, state, folder, assign=True)
        return tokenizer


def _to_channels_last(module: nn.Module, *_: object) -> None:
    """Lay the convolution weights out as channels_last; their shape stays."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
