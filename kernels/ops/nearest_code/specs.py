"""Shapes of ``nearest_code`` in the published tokenizer, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """``rows`` features against ``codes`` entries of ``channels``."""

    name: str
    rows: int
    codes: int
    channels: int

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.channels, generator=generator)
        codebook = torch.randn(self.codes, self.channels, generator=generator)
        return {"x_ND": x.to(device, dtype), "codebook_KD": codebook.to(device, dtype)}


SPECS = (
    Spec("tiny", 7, 5, 6),
    Spec("batch4", 4 * 256, 1024, 256),
    Spec("batch32", 32 * 256, 1024, 256),
)
