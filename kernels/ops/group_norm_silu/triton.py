"""GroupNorm and SiLU as Triton kernels, for channels_last and contiguous maps alike.

A map is ``[images, pixels, channels]`` with two strides, one of them 1. A program owns a chunk of an image's
pixels for a block of channels, whole groups or not: a group of channels_last is 8 to 32 adjacent bytes a
pixel, too few to be read alone. So the forward reads the map twice and writes it once:

1. ``_statistics``: mean and sum of squared deviations of every channel over the chunk,
2. ``_group_statistics``: these combined over chunks and over the channels of a group,
3. ``_apply``: the normalised activations.

The backward does the same with the two sums that its group means need. Nothing is added atomically. Of a
small map a program holds whole groups in registers (``_triton_whole.py``): one launch and one read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels.ops.group_norm_silu._triton_whole import grad_before_silu, whole, whole_backward
from mage_fast.kernels.ops.group_norm_silu.reference import memory_format
from mage_fast.kernels.triton_support import DEVICES, unsupported

__all__ = ["DEVICES", "group_norm_silu", "group_norm_silu_backward", "unsupported"]
#: Elements of a tile: 16 a thread, two loads of 16 bytes.
_TILE = 2048
#: Tiles of a chunk; small maps have few chunks, and are cut finer.
_STEPS, _SMALL_STEPS, _SMALL_PIXELS = 16, 4, 4096
#: Bytes of a small map that a program holds, at most, and bytes of a pixel that it reads, at least.
_WHOLE, _SECTOR = 32768, 32
#: The longer side of a tile along the memory: channels of channels_last, pixels of contiguous maps.
_CHANNELS, _PIXELS = 128, 512


@triton.jit
def _tile(first_pixel, pixels, channels, stride_pixel, stride_channel, PIXELS, CHANNELS):
    """Pixels and channels of the program's first tile, as the address of its corner and offsets into it.

    The corner is int64: a map can have more than 2**31 elements. A tile spans fewer.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    corner = (
        tl.program_id(2).to(tl.int64) * pixels * channels
        + first_pixel.to(tl.int64) * stride_pixel
        + (tl.program_id(1) * CHANNELS).to(tl.int64) * stride_channel
    )
    offset = tl.arange(0, PIXELS)[:, None] * stride_pixel + tl.arange(0, CHANNELS)[None, :] * stride_channel
    return corner, offset, channel


@triton.jit
def _statistics(
    x, partial_mean, partial_square, pixels, channels, stride_pixel, stride_channel,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first_pixel = tl.program_id(0) * PIXELS * STEPS
    corner, offset, channel = _tile(
        first_pixel, pixels, channels, stride_pixel, stride_channel, PIXELS, CHANNELS
    )
    pixel = first_pixel + tl.arange(0, PIXELS)
    inside_channel = (channel < channels)[None, :]
    address = x + corner + offset
    # A lane's own first element is its shift: the sum of squares about it is at most STEPS + 1 times that
    # about the mean, so little cancels whatever the mean is.
    shift = tl.load(address, mask=(pixel < pixels)[:, None] & inside_channel, other=0.0).to(tl.float32)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for step in range(1, STEPS):
        address += PIXELS * stride_pixel
        inside = (pixel + step * PIXELS < pixels)[:, None] & inside_channel
        delta = tl.where(inside, tl.load(address, mask=inside, other=0.0).to(tl.float32) - shift, 0.0)
        total += delta
        squares += delta * delta
    # the lanes' means and squares to those of the chunk
    count = tl.minimum(tl.maximum((pixels - pixel + PIXELS - 1) // PIXELS, 0), STEPS).to(tl.float32)
    share = (count / tl.sum(count, 0))[:, None]
    mean = total / tl.maximum(count, 1.0)[:, None]
    squares -= total * mean
    mean += shift
    mean_C = tl.sum(mean * share, 0)
    mean -= mean_C[None, :]
    square_C = tl.sum(squares + count[:, None] * mean * mean, 0)
    partial = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * channels + channel
    tl.store(partial_mean + partial, mean_C, mask=channel < channels)
    tl.store(partial_square + partial, square_C, mask=channel < channels)


@triton.jit
def _group_statistics(
    partial_mean, partial_square, mean, rstd, pixels, channels, chunks, chunk_pixels, eps,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program owns a group, WIDTH channels of an image, and reads CHUNKS chunks at a time."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    partial = image * chunks * channels + group * WIDTH + channel
    total = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        inside = (chunk < chunks) & (channel < WIDTH)
        share = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float32) / (WIDTH * pixels)
        total += share * tl.load(partial_mean + partial + chunk * channels, mask=inside, other=0.0)
    group_mean = tl.sum(tl.sum(total, 0), 0)
    total = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        inside = (chunk < chunks) & (channel < WIDTH)
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float32)
        address = partial + chunk * channels
        delta = tl.load(partial_mean + address, mask=inside, other=0.0) - group_mean
        square = tl.load(partial_square + address, mask=inside, other=0.0)
        total += tl.where(inside, square + count * delta * delta, 0.0)
    variance = tl.sum(tl.sum(total, 0), 0) / (WIDTH * pixels)
    index = image * tl.num_programs(0) + group
    tl.store(mean + index, group_mean)
    tl.store(rstd + index, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _affine(mean, rstd, weight, bias, channel, channels, WIDTH: tl.constexpr):
    """Of each channel: its group's mean and 1 / standard deviation, its weight and bias."""
    inside = channel < channels
    group = tl.program_id(2).to(tl.int64) * (channels // WIDTH) + channel // WIDTH
    return (
        tl.load(mean + group, mask=inside, other=0.0)[None, :],
        tl.load(rstd + group, mask=inside, other=0.0)[None, :],
        tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :],
        tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _apply(
    x, weight, bias, mean, rstd, out, pixels, channels, stride_pixel, stride_channel,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first_pixel = tl.program_id(0) * PIXELS * STEPS
    corner, offset, channel = _tile(
        first_pixel, pixels, channels, stride_pixel, stride_channel, PIXELS, CHANNELS
    )
    mean_C, rstd_C, weight_C, bias_C = _affine(mean, rstd, weight, bias, channel, channels, WIDTH)
    scale_C = rstd_C * weight_C
    for step in range(STEPS):
        pixel = first_pixel + step * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        address = corner + offset
        corner += PIXELS * stride_pixel
        # the mean is taken off first: near a great mean the difference is exact
        y = (tl.load(x + address, mask=inside, other=0.0).to(tl.float32) - mean_C) * scale_C + bias_C
        tl.store(out + address, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_sums(
    grad, x, weight, bias, mean, rstd, partial_bias, partial_weight,
    pixels, channels, stride_pixel, stride_channel,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of every channel over the chunk: the sums of grad_y and of grad_y * x_hat."""
    first_pixel = tl.program_id(0) * PIXELS * STEPS
    corner, offset, channel = _tile(
        first_pixel, pixels, channels, stride_pixel, stride_channel, PIXELS, CHANNELS
    )
    mean_C, rstd_C, weight_C, bias_C = _affine(mean, rstd, weight, bias, channel, channels, WIDTH)
    sum_bias = tl.zeros([PIXELS, CHANNELS], tl.float32)
    sum_weight = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for step in range(STEPS):
        pixel = first_pixel + step * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        address = corner + offset
        corner += PIXELS * stride_pixel
        x_hat = (tl.load(x + address, mask=inside, other=0.0).to(tl.float32) - mean_C) * rstd_C
        # 0 outside, as the gradient is
        grad_y = grad_before_silu(tl.load(grad + address, mask=inside, other=0.0), x_hat, weight_C, bias_C)
        sum_bias += grad_y
        sum_weight += grad_y * x_hat
    partial = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * channels + channel
    tl.store(partial_bias + partial, tl.sum(sum_bias, 0), mask=channel < channels)
    tl.store(partial_weight + partial, tl.sum(sum_weight, 0), mask=channel < channels)


@triton.jit
def _group_sums(
    partial_bias, partial_weight, weight, grad_bias, grad_weight, group_mean, group_mean_x_hat,
    pixels, channels, chunks, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program owns a group of an image: its channels' sums, and the means of grad_x_hat and its product
    with x_hat over the group, grad_x_hat being grad_y * weight.
    """
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, CHANNELS)
    channel = group * WIDTH + column
    sum_bias = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    sum_weight = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < WIDTH)[None, :]
        address = (image * chunks + chunk)[:, None] * channels + channel[None, :]
        sum_bias += tl.load(partial_bias + address, mask=inside, other=0.0)
        sum_weight += tl.load(partial_weight + address, mask=inside, other=0.0)
    bias_C, weight_C = tl.sum(sum_bias, 0), tl.sum(sum_weight, 0)
    tl.store(grad_bias + image * channels + channel, bias_C, mask=column < WIDTH)
    tl.store(grad_weight + image * channels + channel, weight_C, mask=column < WIDTH)
    scale_C = tl.load(weight + channel, mask=column < WIDTH, other=0.0).to(tl.float32)
    index = image * tl.num_programs(0) + group
    tl.store(group_mean + index, tl.sum(bias_C * scale_C, 0) / (WIDTH * pixels))
    tl.store(group_mean_x_hat + index, tl.sum(weight_C * scale_C, 0) / (WIDTH * pixels))


@triton.jit
def _backward_apply(
    grad, x, weight, bias, mean, rstd, group_mean, group_mean_x_hat, grad_x,
    pixels, channels, stride_pixel, stride_channel,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first_pixel = tl.program_id(0) * PIXELS * STEPS
    corner, offset, channel = _tile(
        first_pixel, pixels, channels, stride_pixel, stride_channel, PIXELS, CHANNELS
    )
    mean_C, rstd_C, weight_C, bias_C = _affine(mean, rstd, weight, bias, channel, channels, WIDTH)
    group = tl.program_id(2).to(tl.int64) * (channels // WIDTH) + channel // WIDTH
    mean_grad_C = tl.load(group_mean + group, mask=channel < channels, other=0.0)[None, :]
    mean_product_C = tl.load(group_mean_x_hat + group, mask=channel < channels, other=0.0)[None, :]
    for step in range(STEPS):
        pixel = first_pixel + step * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        address = corner + offset
        corner += PIXELS * stride_pixel
        x_hat = (tl.load(x + address, mask=inside, other=0.0).to(tl.float32) - mean_C) * rstd_C
        grad_y = grad_before_silu(tl.load(grad + address, mask=inside, other=0.0), x_hat, weight_C, bias_C)
        value = rstd_C * (grad_y * weight_C - mean_grad_C - x_hat * mean_product_C)
        tl.store(grad_x + address, value.to(grad_x.dtype.element_ty), mask=inside)


class _Plan:
    """Tile and grid of a map: a tile's long side runs along the memory."""

    def __init__(self, x_NCHW: Tensor, num_groups: int) -> None:
        self.images, self.channels, height, width = x_NCHW.shape
        self.pixels = height * width
        self.group_channels = self.channels // num_groups
        channels_last = memory_format(x_NCHW) is torch.channels_last
        if channels_last:
            tile_channels = min(triton.next_power_of_2(self.channels), _CHANNELS)
            tile_pixels = _TILE // tile_channels
        else:
            tile_pixels = min(triton.next_power_of_2(self.pixels), _PIXELS)
            tile_channels = min(triton.next_power_of_2(self.channels), _TILE // tile_pixels)
        self.strides = (self.channels, 1) if channels_last else (1, self.pixels)
        steps = _SMALL_STEPS if self.pixels < _SMALL_PIXELS else _STEPS
        self.tile = (tile_pixels, tile_channels, steps)
        self.chunk_pixels = tile_pixels * steps
        self.chunks = triton.cdiv(self.pixels, self.chunk_pixels)
        self.grid = (self.chunks, triton.cdiv(self.channels, tile_channels), self.images)
        self.group_grid = (num_groups, self.images)
        group_channels = triton.next_power_of_2(self.group_channels)
        self.group_tile = (self.group_channels, max(1, 1024 // group_channels), group_channels)

        # small maps: 32 channels of whole groups a program if they fit
        size = x_NCHW.element_size()
        held = triton.next_power_of_2(self.pixels) * group_channels
        groups = min(triton.next_power_of_2(num_groups), max(1, 32 // group_channels))
        while groups > 1 and groups * held * size > _WHOLE:
            groups //= 2
        wide = groups * self.group_channels * size >= _SECTOR or groups >= num_groups
        self.whole = groups * held * size <= _WHOLE and (wide or not channels_last)
        self.whole_warps = min(max(groups * held // 1024, 4), 16)
        self.whole_grid = (triton.cdiv(num_groups, groups), self.images)
        self.whole_tile = (
            self.group_channels, triton.next_power_of_2(self.pixels), groups, group_channels
        )  # fmt: skip

    def partials(self, like: Tensor) -> Tensor:
        """Two float32 numbers a channel of every chunk."""
        return like.new_empty((2, self.images, self.chunks, self.channels), dtype=torch.float32)


def group_norm_silu(
    x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    format = memory_format(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=format)
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    plan = _Plan(x_NCHW, num_groups)
    out_NCHW = torch.empty_like(x_NCHW, memory_format=format)
    mean_NG = x_NCHW.new_empty((plan.images, num_groups), dtype=torch.float32)
    rstd_NG = torch.empty_like(mean_NG)
    size = (plan.pixels, plan.channels)
    if plan.images and plan.whole:
        whole[plan.whole_grid](
            x_NCHW, weight_C, bias_C, mean_NG, rstd_NG, out_NCHW, *size, *plan.strides, eps,
            *plan.whole_tile, num_warps=plan.whole_warps,
        )  # fmt: skip
    elif plan.images:
        partials = plan.partials(x_NCHW)
        _statistics[plan.grid](x_NCHW, partials[0], partials[1], *size, *plan.strides, *plan.tile)
        _group_statistics[plan.group_grid](
            partials[0], partials[1], mean_NG, rstd_NG, *size, plan.chunks, plan.chunk_pixels, eps,
            *plan.group_tile,
        )  # fmt: skip
        _apply[plan.grid](
            x_NCHW, weight_C, bias_C, mean_NG, rstd_NG, out_NCHW, *size, *plan.strides,
            plan.group_channels, *plan.tile,
        )  # fmt: skip
    return out_NCHW, mean_NG, rstd_NG


def group_norm_silu_backward(
    grad_NCHW: Tensor,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    format = memory_format(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=format)
    grad_NCHW = grad_NCHW.contiguous(memory_format=format)
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    plan = _Plan(x_NCHW, num_groups)
    grad_x_NCHW = torch.empty_like(x_NCHW, memory_format=format)
    grads_2NC = x_NCHW.new_empty((2, plan.images, plan.channels), dtype=torch.float32)
    size = (plan.pixels, plan.channels)
    inputs = (grad_NCHW, x_NCHW, weight_C, bias_C, mean_NG.contiguous(), rstd_NG.contiguous())
    if plan.images and plan.whole:
        whole_backward[plan.whole_grid](
            *inputs, grads_2NC[0], grads_2NC[1], grad_x_NCHW, *size, *plan.strides, *plan.whole_tile,
            num_warps=plan.whole_warps,
        )  # fmt: skip
    elif plan.images:
        means_2NG = x_NCHW.new_empty((2, plan.images, num_groups), dtype=torch.float32)
        partials = plan.partials(x_NCHW)
        _backward_sums[plan.grid](
            *inputs, partials[0], partials[1], *size, *plan.strides, plan.group_channels, *plan.tile
        )
        _group_sums[plan.group_grid](
            partials[0], partials[1], weight_C, grads_2NC[0], grads_2NC[1], means_2NG[0], means_2NG[1],
            *size, plan.chunks, *plan.group_tile,
        )  # fmt: skip
        _backward_apply[plan.grid](
            *inputs, means_2NG[0], means_2NG[1], grad_x_NCHW, *size, *plan.strides, plan.group_channels,
            *plan.tile,
        )  # fmt: skip
    # two sums: results may not share memory
    return grad_x_NCHW, grads_2NC[1].sum(0).to(weight_C.dtype), grads_2NC[0].sum(0).to(bias_C.dtype)
