"""A stand-in for a model with known laws."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mage_fast.config import MAGEConfig
from mage_fast.decoding import Decoding
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.sampler_config import SamplerConfig


class Stub(nn.Module):
    """Stands for a model: each position has a law of its own, whatever the other tokens are."""

    def __init__(self, logits_LC: Tensor) -> None:
        super().__init__()
        length, codes = logits_LC.shape
        self.logits_LC = logits_LC
        self.config = MAGEConfig.tiny(
            tokenizer=None, grid_size=math.isqrt(length), codebook_size=codes, class_slots=1,
            unconditional_class=0,
        )  # fmt: skip
        self.head = nn.Linear(1, 1)
        #: ids, class ids and plan of each forward pass
        self.calls: list[tuple[Tensor, Tensor, MaskPlan]] = []

    def class_ids(self, labels_B: Tensor | None, batch: int) -> Tensor:
        return torch.full((batch,), self.config.unconditional_class_id)

    def masked_logits(self, ids: Tensor, classes: Tensor, plan: MaskPlan) -> Tensor:
        self.calls.append((ids, classes, plan))
        return self.logits_LC[plan.masked_index_N % len(self.logits_LC)]

    def decode(self, ids_BL: Tensor, config: SamplerConfig, seed: int = 0) -> list[Tensor]:
        return list(Decoding(self, config).steps(ids_BL=ids_BL, seed=seed))  # type: ignore[arg-type]

    def unknown(self, batch: int) -> Tensor:
        return torch.full((batch, len(self.logits_LC)), self.config.mask_token_id)
