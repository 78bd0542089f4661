"""Shapes of ``philox`` calls at the real sizes, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mage_fast.kernels import rng


@dataclass(frozen=True)
class Spec:
    """``high x low`` blocks of four words."""

    name: str
    high: int
    low: int

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        state = rng.new_state(0, device=device)
        return {"state": state, "stream": int(rng.Stream.MLP_DROPOUT), "high": self.high, "low": self.low}


SPECS = (
    Spec("tiny", 3, 5),
    # 16 bits an element: dropout after the MLP's GELU, ViT-B encoder, batch 4
    Spec("mlp_dropout_vit_b_batch4", 1, 4 * 129 * 3072 // 8),
    # 8 bits a probability: attention dropout, ViT-B encoder, batch 4
    Spec("attention_dropout_vit_b_batch4", 4 * 129 * 12, 9),
)
