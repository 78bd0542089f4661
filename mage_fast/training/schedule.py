"""Learning rates by iteration."""

from __future__ import annotations

import math

import torch

from mage_fast.errors import InputError


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """The linear scaling rule: ``base_lr * batch_size / 256``."""
    return base_lr * batch_size / 256


def cosine_lr(
    step: int, *, total_steps: int, warmup_steps: int, base_lr: float, min_lr: float = 0.0
) -> float:
    """Linear warm-up from 0, then half a cosine down to ``min_lr`` at ``total_steps``.

    ``step`` counts from 0: step 0 of a warm-up has lr 0, step ``warmup_steps`` has ``base_lr``.

    Raises:
        InputError: a warm-up longer than the training, negative values.

    Source: the recipes of the paper's appendix (cosine, per iteration).
    """
    if not 0 <= warmup_steps <= total_steps or step < 0:
        raise InputError(
            f"cosine_lr: step {step}, warmup_steps {warmup_steps}, total_steps {total_steps}: wanted "
            "0 <= step and 0 <= warmup_steps <= total_steps"
        )
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's lr to ``lr`` times the group's ``lr_scale`` (layer-wise decay), 1 by default.

    A lr that is a tensor (of an optimizer in a CUDA graph) is filled, without a wait.
    """
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
