"""Shapes of ``masked_cross_entropy`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels.roofline import Direction, Work, statistic_bytes


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

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        rows, e, f = self.rows - self.padding, dtype.itemsize, statistic_bytes(dtype)
        if direction == "fwd":
            # logits of the rows with a target, targets -> loss, logsumexp; max, minus, exp, two sums
            return Work(rows * self.classes * e + 8 * self.rows, f * (1 + self.rows), 5 * rows * self.classes)
        # grad, logits, logsumexp, targets -> grad of every row; minus, exp, minus, times
        read, written = rows * (self.classes * e + f) + 8 * self.rows + f, self.rows * self.classes * e
        return Work(read, written, 4 * rows * self.classes)


def baseline(logits_NC: Tensor, targets_N: Tensor, *, label_smoothing: float) -> Tensor:
    """The eager chain."""
    return F.cross_entropy(logits_NC, targets_N, ignore_index=-1, label_smoothing=label_smoothing)


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
