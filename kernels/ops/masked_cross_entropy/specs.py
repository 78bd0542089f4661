"""Shapes of ``masked_cross_entropy`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """``rows`` masked rows, the last ``padding`` of them without a target, over ``classes``."""

    name: str
    rows: int
    classes: int
    padding: int = 0
    label_smoothing: float = 0.1

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        logits = 2.0 * torch.randn(self.rows, self.classes, generator=generator)
        targets = torch.randint(self.classes, (self.rows,), generator=generator)
        targets[self.rows - self.padding :] = -1
        return {
            "logits_NC": logits.to(device, dtype).requires_grad_(),
            "targets_N": targets.to(device),
            "label_smoothing": self.label_smoothing,
        }


SPECS = (
    Spec("tiny", 6, 11, padding=2),
    Spec("tiny_no_smoothing", 5, 8, label_smoothing=0.0),
    # the tiles of the real shapes, few rows: one warp, a row that ends inside a tile, a loop over tiles
    Spec("small_codebook", 12, 1024, padding=3),
    Spec("small_odd", 5, 1031, padding=1),
    Spec("small_long", 4, 16384 + 8192 + 5, padding=1),
    Spec("small_long_no_smoothing", 3, 16385, label_smoothing=0.0),
    # mask ratio 0.694 on average: 178 masked of 256 tokens an image, at most 256
    Spec("batch4", 4 * 178, 1024),
    Spec("batch4_padded", 4 * 256, 1024, padding=4 * 78),
)

#: One step of a batch of 128 (mask ratio 0.694), the same filled up to all tokens, and a large codebook.
GPU_SPECS = (
    Spec("batch128", 128 * 178, 1024),
    Spec("batch128_padded", 128 * 256, 1024, padding=128 * 78),
    Spec("codebook_65536", 4096, 65536),
)
