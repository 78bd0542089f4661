"""GroupNorm and SiLU of small maps: a program holds whole groups of an image in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grad_before_silu(grad, x_hat, weight, bias):
    """Gradient of y in out = y * sigmoid(y), y = x_hat * weight + bias."""
    y = x_hat * weight + bias
    sigmoid = tl.sigmoid(y)
    return grad.to(tl.float32) * sigmoid * (1.0 + y * (1.0 - sigmoid))


@triton.jit
def _whole_tile(
    weight, bias, pixels, channels, stride_pixel, stride_channel,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Whole groups of an image as ``[PIXELS, GROUPS, CHANNELS]``."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, CHANNELS)
    channel = group[:, None] * WIDTH + within[None, :]
    inside_GC = (group[:, None] * WIDTH < channels) & (within < WIDTH)[None, :]
    pixel = tl.arange(0, PIXELS)[:, None, None]
    offset = pixel * stride_pixel + channel[None, :, :] * stride_channel
    weight_GC = tl.load(weight + channel, mask=inside_GC, other=0.0).to(tl.float32)
    bias_GC = tl.load(bias + channel, mask=inside_GC, other=0.0).to(tl.float32)
    corner = tl.program_id(1).to(tl.int64) * pixels * channels
    inside = (pixel < pixels) & inside_GC[None, :, :]
    return corner + offset, inside, group, channel, inside_GC, weight_GC[None, :, :], bias_GC[None, :, :]


@triton.jit
def _group_sum(x):
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def whole(
    x, weight, bias, mean, rstd, out, pixels, channels, stride_pixel, stride_channel, eps,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    address, inside, group, _, _, weight_GC, bias_GC = _whole_tile(
        weight, bias, pixels, channels, stride_pixel, stride_channel, WIDTH, PIXELS, GROUPS, CHANNELS
    )
    value = tl.load(x + address, mask=inside, other=0.0).to(tl.float32)
    mean_G = _group_sum(value) / (WIDTH * pixels)
    value = tl.where(inside, value - mean_G[None, :, None], 0.0)
    rstd_G = 1.0 / tl.sqrt_rn(_group_sum(value * value) / (WIDTH * pixels) + eps)
    y = value * (rstd_G[None, :, None] * weight_GC) + bias_GC
    tl.store(out + address, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=inside)
    index = tl.program_id(1).to(tl.int64) * (channels // WIDTH) + group
    tl.store(mean + index, mean_G, mask=group * WIDTH < channels)
    tl.store(rstd + index, rstd_G, mask=group * WIDTH < channels)


@triton.jit
def whole_backward(
    grad, x, weight, bias, mean, rstd, grad_bias, grad_weight, grad_x,
    pixels, channels, stride_pixel, stride_channel,
    WIDTH: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    address, inside, group, channel, inside_GC, weight_GC, bias_GC = _whole_tile(
        weight, bias, pixels, channels, stride_pixel, stride_channel, WIDTH, PIXELS, GROUPS, CHANNELS
    )
    index = tl.program_id(1).to(tl.int64) * (channels // WIDTH) + group
    mean_G = tl.load(mean + index, mask=group * WIDTH < channels, other=0.0)[None, :, None]
    rstd_G = tl.load(rstd + index, mask=group * WIDTH < channels, other=0.0)[None, :, None]
    x_hat = (tl.load(x + address, mask=inside, other=0.0).to(tl.float32) - mean_G) * rstd_G
    grad_y = grad_before_silu(tl.load(grad + address, mask=inside, other=0.0), x_hat, weight_GC, bias_GC)
    element = tl.program_id(1).to(tl.int64) * channels + channel
    tl.store(grad_bias + element, tl.sum(grad_y, 0), mask=inside_GC)
    tl.store(grad_weight + element, tl.sum(grad_y * x_hat, 0), mask=inside_GC)
    grad_x_hat = grad_y * weight_GC
    mean_grad_G = (_group_sum(grad_x_hat) / (WIDTH * pixels))[None, :, None]
    mean_product_G = (_group_sum(grad_x_hat * x_hat) / (WIDTH * pixels))[None, :, None]
    value = rstd_G * (grad_x_hat - mean_grad_G - x_hat * mean_product_G)
    tl.store(grad_x + address, value.to(grad_x.dtype.element_ty), mask=inside)
