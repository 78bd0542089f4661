"""Operations of whole steps, from the models' shapes alone; of matrix products and convolutions only.

``needed`` is what the results take: every product of the paper's forward pass, twice that backward, and the
head at masked tokens over the codebook's columns. It is what floors and MFU are counted with, for every
implementation alike. ``release`` is what the published release computes: its head at all positions over the
whole vocabulary besides. An implementation may execute fewer than ``needed`` (rows of the last blocks that
nothing reads) and is then given credit for those it saved.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from mage_fast import reference
from mage_fast.config import MAGEConfig, TokenizerConfig

Counted = Literal["needed", "release"]


def linear(rows: float, inputs: int, outputs: int) -> float:
    """Of ``rows`` by a weight."""
    return 2.0 * rows * inputs * outputs


def block(width: int, rows: int, mlp_ratio: float) -> float:
    """Of one image: qkv, projection and MLP, scores and their product with the values."""
    hidden = int(width * mlp_ratio)
    return linear(rows, width, 4 * width) + 2 * linear(rows, width, hidden) + 4.0 * rows**2 * width


def forward(config: MAGEConfig, kept: int, head_rows: float, classes: int) -> float:
    """One image through the transformer: ``kept`` positions in the encoder, the head at ``head_rows``."""
    positions = config.num_tokens + 1
    flops = config.encoder_depth * block(config.encoder_width, kept, config.mlp_ratio)
    flops += linear(kept, config.encoder_width, config.decoder_width)
    flops += config.decoder_depth * block(config.decoder_width, positions, config.mlp_ratio)
    flops += linear(head_rows, config.decoder_width, config.encoder_width)
    return flops + linear(head_rows, config.encoder_width, classes)


def mean_mask_ratio(config: MAGEConfig) -> float:
    """Mean of the law of the mask ratio, a truncated normal; 0.694 in the paper.

    Equivalent SciPy: ``truncnorm.mean((min - mode) / std, (max - mode) / std, mode, std)``.
    """
    mode, std = config.mask_ratio_mode, config.mask_ratio_std
    low, high = config.mask_ratio_min, config.mask_ratio_max
    if std == 0.0:
        return mode
    if low > mode:  # mirrored, since erfc is exact far above 0, not far below
        mode, low, high, mirrored = -mode, -high, -low, -1.0
    else:
        mirrored = 1.0
    a, b = (mode - low) / std, (mode - high) / std
    mass = 0.5 * (math.erfc(b / math.sqrt(2)) - math.erfc(a / math.sqrt(2)))
    densities = (math.exp(-a * a / 2) - math.exp(-b * b / 2)) / math.sqrt(2 * math.pi)
    mean = mode + std * densities / mass if mass else mode
    return mirrored * min(max(mean, low), high)  # without a mass all lies at the bound beside the mode


def masked(config: MAGEConfig) -> int:
    """Masked tokens of an image, at the mean of the law."""
    return round(config.num_tokens * mean_mask_ratio(config))


def training(config: MAGEConfig, counted: Counted = "needed") -> float:
    """One image of a training step from ids: forward, and twice that backward."""
    rows, classes = masked(config), config.codebook_size
    dropped = rows if config.encoder_tokens == "unmasked" else round(config.num_tokens * config.drop_ratio)
    kept = config.num_tokens + 1 - dropped
    if counted == "release":
        rows, classes = config.num_tokens + 1, config.vocabulary_size
    # the tied weight of the last product gets no gradient
    return 3 * forward(config, kept, rows, classes) - linear(rows, config.encoder_width, classes)


def decoding(config: MAGEConfig, steps: int, counted: Counted = "needed") -> float:
    """One image's ids in so many steps: nothing is dropped; the head at tokens yet unknown."""
    positions = config.num_tokens + 1
    if counted == "release":
        return steps * forward(config, positions, positions, config.vocabulary_size)
    left, flops = config.num_tokens, 0.0
    for step in range(steps):
        flops += forward(config, positions, left, config.codebook_size)
        left = reference.num_remasked(step, steps, config.num_tokens, left)
    return flops


@functools.cache
def tokenizer(config: TokenizerConfig, direction: Literal["encode", "decode"]) -> float:
    """One image through the VQGAN, counted by torch on tensors without storage."""
    with torch.device("meta"):
        vqgan = reference.VQGAN.from_config(config)
        images = torch.zeros(1, 3, config.image_size, config.image_size)
        ids = torch.zeros(1, config.grid_size**2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            if direction == "encode":
                vqgan.encode(images)
            else:
                vqgan.decode_ids(ids)
    return float(counter.get_total_flops())


@functools.cache
def parameters(config: MAGEConfig) -> int:
    """Trained parameters of the transformer, without the tokenizer's."""
    with torch.device("meta"):
        model = reference.MAGE.from_config(config.replace(tokenizer=None))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(config: MAGEConfig) -> tuple[int, int]:
    """Bytes that AdamW reads and writes: parameter and two moments, each in float32, each way.

    Gradients are left out: where one is used as soon as it is made, it need not reach memory.
    """
    return 12 * parameters(config), 12 * parameters(config)
