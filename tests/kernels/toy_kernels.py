"""Small Triton kernels for tests of the tools around kernels. Imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from mage_fast.kernels.ops.group_norm_silu.triton import _tile


@triton.jit
def corners(out, first_pixel, pixels, channels, stride_pixel, stride_channel):
    """Addresses of the tiles' corners in a map, ``[images, blocks of 8 channels]``."""
    corner, _, _ = _tile(tl.program_id(0) + first_pixel, pixels, channels, stride_pixel, stride_channel, 1, 8)
    tl.store(out + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1), corner)


@triton.jit
def spills(x, out, SIZE: tl.constexpr):
    """Holds SIZE numbers in the registers of one warp: every one is wanted again after the sum."""
    index = tl.arange(0, SIZE)
    value = tl.load(x + index)
    tl.store(out + index, value - tl.sum(value, 0))


@triton.jit
def product(x, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """A square times itself; in "ieee" precision no tensor core is used."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(x + index)
    tl.store(out + index, tl.dot(value, value, input_precision=PRECISION))
