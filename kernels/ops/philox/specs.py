"""Shapes of ``philox`` calls at the real sizes, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.roofline import PHILOX_BLOCK, Direction, Work


@dataclass(frozen=True)
class Spec:
    """``high x low`` blocks of four words."""

    name: str
    high: int
    low: int

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        state = rng.new_state(0, device=device)
        return {"state": state, "stream": int(rng.Stream.MLP_DROPOUT), "high": self.high, "low": self.low}

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        assert direction == "fwd"
        blocks = self.high * self.low
        return Work(0, 16 * blocks, PHILOX_BLOCK * blocks)  # 4 words of 4 bytes a block


def baseline(state: Tensor, stream: int, high: int, low: int) -> Tensor:
    """torch's own generator."""
    return torch.randint(-(2**31), 2**31, (high, low, 4), dtype=torch.int32, device=state.device)


def invariant(inputs: dict[str, Any], outputs: list[Tensor]) -> list[Tensor]:
    """What right results have in common whatever numbers they draw: here only the size."""
    return [torch.tensor(outputs[0].shape)]


SPECS = (
    Spec("tiny", 3, 5),
    # 16 bits an element: dropout after the MLP's GELU, ViT-B encoder, batch 4
    Spec("mlp_dropout_vit_b_batch4", 1, 4 * 129 * 3072 // 8),
    # 8 bits a probability: attention dropout, ViT-B encoder, batch 4
    Spec("attention_dropout_vit_b_batch4", 4 * 129 * 12, 9),
)
