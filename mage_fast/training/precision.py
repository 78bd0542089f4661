"""The precisions of a training step: autocast, and the loss scale that float16 wants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: What matrix products compute in; parameters and the optimizer stay float32.
Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 or float16, or nothing."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, _DTYPES[precision])


class LossScale(nn.Module):
    """The dynamic loss scale of float16 training, on the device: no step waits to learn of an overflow.

    Equivalent PyTorch: the scale of ``torch.amp.GradScaler``, with its defaults. A module, so that a run's
    state holds it.

    Source: Micikevicius et al., Mixed Precision Training (ICLR 2018), section 3.2.
    """

    scale: Tensor
    growth_tracker: Tensor

    def __init__(self, start: float = 2.0**16, growth_interval: int = 2000) -> None:
        super().__init__()
        self.growth_interval = growth_interval
        self.register_buffer("scale", torch.tensor(start))
        self.register_buffer("growth_tracker", torch.tensor(0, dtype=torch.int32))

    def update(self, found_inf: Float[Tensor, ""]) -> None:
        """Halve the scale after an overflow (``found_inf`` 1), double it after enough steps without."""
        torch._amp_update_scale_(self.scale, self.growth_tracker, found_inf, 2.0, 0.5, self.growth_interval)
