"""Shapes of ``sample_confident`` in decoding, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_fast.kernels import rng


@dataclass(frozen=True)
class Spec:
    """Batch, tokens, codes, how many tokens are unknown, and what is on."""

    name: str
    batch: int
    length: int
    codes: int
    unknown: int
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 0.0

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        mask_token_id = self.codes + 5
        ids = torch.randint(self.codes, (self.batch, self.length), generator=generator)
        ids[:, : self.unknown] = mask_token_id
        logits = 3 * torch.randn(self.batch, self.length, self.codes, generator=generator)
        arguments = {
            "logits_BLC": logits.to(device, dtype),
            "ids_BL": ids.to(device),
            "num_masked_B": torch.full((self.batch,), self.unknown // 2, device=device),
            "mask_token_id": mask_token_id,
            "choice_temperature": 3.0,
            "rng_state": rng.new_state(0, device=device),
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        if self.guidance_scale:
            guidance = 3 * torch.randn(logits.shape, generator=generator)
            arguments |= {
                "guidance_logits_BLC": guidance.to(device, dtype),
                "guidance_scale": self.guidance_scale,
            }
        return arguments


SPECS = (
    Spec("tiny", 2, 6, 11, 4),
    Spec("tiny_one_unknown", 3, 4, 8, 1),
    Spec("tiny_filtered", 2, 5, 12, 5, top_k=6, top_p=0.8, guidance_scale=1.5),
    # the tiles of the real shapes, few tokens
    Spec("small_codebook", 2, 12, 1024, 9),
    Spec("small_filtered", 1, 9, 1024, 7, top_k=100, top_p=0.9),
    Spec("small_odd", 1, 9, 1023, 7),
    Spec("first_step_batch8", 8, 256, 1024, 256),
    Spec("middle_step_batch8", 8, 256, 1024, 128),
)
#: A step of 64 samples: nothing known, half known, and with each option on.
GPU_SPECS = (
    Spec("first_step_batch64", 64, 256, 1024, 256),
    Spec("middle_step_batch64", 64, 256, 1024, 128),
    Spec("top_k_batch64", 64, 256, 1024, 256, top_k=100),
    Spec("filtered_batch64", 64, 256, 1024, 256, top_k=100, top_p=0.9),
    Spec("guided_batch64", 64, 256, 1024, 256, guidance_scale=1.5),
    Spec("codebook_16384", 8, 1024, 16384, 1024),
    Spec("codebook_16384_filtered", 8, 1024, 16384, 1024, top_k=100, top_p=0.9),
)
