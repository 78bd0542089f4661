"""Shapes of ``sample_confident`` in decoding, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_fast.kernels import rng


@dataclass(frozen=True)
class Spec:
    """Batch, tokens, codes and how many tokens are unknown."""

    name: str
    batch: int
    length: int
    codes: int
    unknown: int

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        mask_token_id = self.codes + 5
        ids = torch.randint(self.codes, (self.batch, self.length), generator=generator)
        ids[:, : self.unknown] = mask_token_id
        logits = 3 * torch.randn(self.batch, self.length, self.codes, generator=generator)
        return {
            "logits_BLC": logits.to(device, dtype),
            "ids_BL": ids.to(device),
            "num_masked_B": torch.full((self.batch,), self.unknown // 2, device=device),
            "mask_token_id": mask_token_id,
            "choice_temperature": 3.0,
            "rng_state": rng.new_state(0, device=device),
        }


SPECS = (
    Spec("tiny", 2, 6, 11, 4),
    Spec("tiny_one_unknown", 3, 4, 8, 1),
    Spec("first_step_batch8", 8, 256, 1024, 256),
    Spec("middle_step_batch8", 8, 256, 1024, 128),
    Spec("first_step_batch64", 64, 256, 1024, 256),
)
