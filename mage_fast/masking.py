"""Mask ratios and counts, drawn on the host; the plan itself is drawn on the device by ``mask_plan``.

The host draws the ratios from the same Philox as everything else, so it knows every count (encoder rows,
masked rows) without waiting for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mage_fast.config import MAGEConfig
from mage_fast.kernels import check, rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, mask_plan


def draw_mask_ratios(config: MAGEConfig, batch: int, rng_state: Int64[Tensor, "2"]) -> Float64[Tensor, "B"]:
    """Mask ratios of a batch from the truncated normal law, by inversion of its distribution function.

    Equivalent SciPy: ``truncnorm((min - mode) / std, (max - mode) / std, mode, std).rvs()``. With
    ``mask_ratio_std = 0`` every ratio is the mode. One draw for all samples when ``ratio_per = "batch"``.

    Args:
        config: the model's configuration.
        batch: number of samples.
        rng_state: int64 ``(seed, step)`` on the CPU.

    Source: MAGE section 3.1, "Masking"; mode 0.55, standard deviation 0.25, bounds [0.5, 1].
    """
    if config.mask_ratio_std == 0.0:
        return torch.full((batch,), config.mask_ratio_mode, dtype=torch.float64)
    rows = batch if config.ratio_per == "sample" else 1
    u = rng.uniform(rng_state, rng.stream(rng.Stream.MASK_RATIO), rows, 1)[:, 0].double()
    bounds = torch.tensor([config.mask_ratio_min, config.mask_ratio_max], dtype=torch.float64)
    # bounds over the mode are mirrored: the distribution function is exact near 0, not near 1
    std = config.mask_ratio_std * (-1.0 if config.mask_ratio_min > config.mask_ratio_mode else 1.0)
    # erfc, not ndtr, which rounds its tails to 0
    at_min, at_max = 0.5 * torch.special.erfc((config.mask_ratio_mode - bounds) / (std * math.sqrt(2)))
    z = torch.special.ndtri(at_min + u * (at_max - at_min))
    ratio = config.mask_ratio_mode + std * z
    return ratio.clamp(config.mask_ratio_min, config.mask_ratio_max).expand(batch)


def token_counts(ratios_B: Float[Tensor, "B"], length: int) -> Int64[Tensor, "B"]:
    """ceil(ratio * length), whatever a ratio like 0.6 is in binary.

    Ratios are taken as exact to their dtype's rounding: 0.6 in float32 is a little more than 0.6, and still
    6 tokens of 10.
    """
    rounding = 2 * torch.finfo(ratios_B.dtype).eps
    return ((ratios_B.double() - rounding) * length).ceil().clamp(min=0).to(torch.int64)


def check_mask_ratios(mask_ratios_B: Tensor, batch: int) -> None:
    """Raises ValueError unless these are ``batch`` ratios in [0, 1] on the CPU."""
    check.dtype("MAGE", "mask_ratios", mask_ratios_B, (torch.float64, torch.float32))
    if tuple(mask_ratios_B.shape) != (batch,) or mask_ratios_B.device.type != "cpu":
        raise ValueError(
            f"MAGE: mask_ratios has shape {tuple(mask_ratios_B.shape)} on {mask_ratios_B.device}, "
            f"wanted ({batch},) on the CPU"
        )
    if batch and not bool(((mask_ratios_B >= 0) & (mask_ratios_B <= 1)).all()):
        wrong = mask_ratios_B[~((mask_ratios_B >= 0) & (mask_ratios_B <= 1))][0].item()
        raise ValueError(f"MAGE: mask_ratios holds {wrong:.6g}, wanted ratios in [0, 1]")


@dataclass(frozen=True)
class MaskCounts:
    """How many tokens of each sample a step masks and drops, and the sizes of the plan that follow."""

    num_masked_B: Int64[Tensor, "B"]
    num_dropped_B: Int64[Tensor, "B"]
    length: int
    total_masked: int
    total_kept: int
    total_visible: int | None
    max_seqlen: int

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """All that shapes depend on: steps of equal sizes can share a CUDA graph."""
        batch = len(self.num_masked_B)
        return batch, self.length, self.total_masked, self.total_kept, self.total_visible, self.max_seqlen

    def to(self, device: torch.device) -> Self:
        """The counts on a device; the host does not wait."""
        masked_B, dropped_B = (
            x.to(device, non_blocking=True) for x in (self.num_masked_B, self.num_dropped_B)
        )
        return replace(self, num_masked_B=masked_B, num_dropped_B=dropped_B)

    def padded(self, multiple: int) -> Self:
        """Masked rows rounded up to a multiple, visible rows to what the fewest masked of it leave.

        So steps of different mask ratios have one of a few sizes; rows that fill up count nothing.
        """
        total_masked = -(-self.total_masked // multiple) * multiple
        fewest = max(total_masked - multiple + 1, 0)
        total_visible = len(self.num_masked_B) * (self.length + 1) - fewest
        return replace(
            self,
            total_masked=total_masked,
            total_visible=None if self.total_visible is None else min(total_visible, self.total_kept),
        )

    def plan(self, rng_state: Int64[Tensor, "2"]) -> MaskPlan:
        """Draw which tokens these are; ``rng_state`` is on the device of the counts."""
        return mask_plan(
            rng_state,
            self.num_masked_B,
            self.num_dropped_B,
            self.length,
            total_masked=self.total_masked,
            total_kept=self.total_kept,
            total_visible=self.total_visible,
            max_seqlen=self.max_seqlen,
            stream=rng.stream(rng.Stream.MASK_PLAN),
        )


def count_masks(config: MAGEConfig, mask_ratios_B: Float[Tensor, "B"]) -> MaskCounts:
    """The masking of a training step: ceil(ratio * L) tokens masked, ceil(drop_ratio * L) of them dropped.

    In the ``"unmasked"`` mode every masked token is dropped. A ratio under ``drop_ratio`` drops what it
    masks.

    Args:
        config: the model's configuration.
        mask_ratios_B: float64 or float32, on the CPU.
    """
    length = config.num_tokens
    masked_B = token_counts(mask_ratios_B, length)
    dropped_B = masked_B
    if config.encoder_tokens == "paper":
        dropped_B = masked_B.minimum(token_counts(torch.tensor([config.drop_ratio]).double(), length))
    kept_B = length + 1 - dropped_B
    total_masked = int(masked_B.sum())
    total_visible = (length + 1) * len(masked_B) - total_masked
    return MaskCounts(
        masked_B,
        dropped_B,
        length,
        total_masked,
        total_kept=int(kept_B.sum()),
        total_visible=total_visible if config.encoder_tokens == "paper" else None,
        max_seqlen=int(kept_B.max()) if len(kept_B) else 0,
    )


def draw_plan(
    config: MAGEConfig,
    mask_ratios_B: Float[Tensor, "B"],
    rng_state: Int64[Tensor, "2"],
) -> MaskPlan:
    """The mask plan of a training step, see :func:`count_masks`.

    Args:
        config: the model's configuration.
        mask_ratios_B: float64 or float32, on the CPU.
        rng_state: int64 ``(seed, step)`` on the device of the model.
    """
    return count_masks(config, mask_ratios_B).to(rng_state.device).plan(rng_state)
