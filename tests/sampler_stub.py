"""A stand-in for a model with known laws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mage_fast.config import MAGEConfig
from mage_fast.sampler import (
    SamplerConfig,
    decode_steps,
)


class Stub:
    """Stands for a model: each position has a law of its own, whatever the other tokens are."""

    training = False

    def __init__(self, logits_LC: Tensor) -> None:
        length, codes = logits_LC.shape
        self.logits_LC = logits_LC
        self.config = MAGEConfig.tiny(
            tokenizer=None, grid_size=math.isqrt(length), codebook_size=codes, class_slots=1,
            unconditional_class=0,
        )  # fmt: skip
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def class_ids(self, labels_B: Tensor | None, batch: int) -> Tensor:
        return torch.full((batch,), self.config.unconditional_class_id)

    def logits(self, ids: Tensor, mask: Tensor, classes: Tensor, *, num_masked_B: Tensor) -> Tensor:
        self.calls.append((ids, mask, num_masked_B))
        return self.logits_LC.expand(len(ids), -1, -1)

    def decode(self, ids_BL: Tensor, config: SamplerConfig, seed: int = 0) -> list[Tensor]:
        return list(decode_steps(self, ids_BL, config, seed=seed))  # type: ignore[arg-type]

    def unknown(self, batch: int) -> Tensor:
        return torch.full((batch, len(self.logits_LC)), self.config.mask_token_id)
