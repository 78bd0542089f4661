"""Shapes of ``linear_cross_entropy`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels.roofline import Direction, Work, statistic_bytes


@dataclass(frozen=True)
class Spec:
    """``rows`` of ``features``, the last ``padding`` of them without a target, onto ``classes``.

    In MAGE the weight is the detached word embedding; the bias learns.
    """

    name: str
    rows: int
    features: int
    classes: int
    padding: int = 0
    label_smoothing: float = 0.1
    weight_learns: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.rows, self.features, generator=generator)
        weight = torch.randn(self.classes, self.features, generator=generator) * 2 / self.features**0.5
        bias = 0.1 * torch.randn(self.classes, generator=generator)
        targets = torch.randint(self.classes, (self.rows,), generator=generator)
        targets[self.rows - self.padding :] = -1
        return {
            "hidden_ND": hidden.to(device, dtype).requires_grad_(),
            "weight_CD": weight.to(device, dtype).requires_grad_(self.weight_learns),
            "bias_C": bias.to(device, dtype).requires_grad_(),
            "targets_N": targets.to(device),
            "label_smoothing": self.label_smoothing,
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        rows, e, f = self.rows - self.padding, dtype.itemsize, statistic_bytes(dtype)
        weights = self.classes * (self.features + 1) * e
        product = 2 * rows * self.classes * self.features
        # rows with a target, weight, bias, targets -> loss, count; one product
        forward = Work(rows * self.features * e + weights + 8 * self.rows, 2 * f, product, matrix=True)
        if direction == "fwd":
            return forward
        # the same again -> grads of every row, of the bias, of the weight if it learns: d W and d^T x
        written = (self.rows * self.features + self.classes) * e
        written += self.classes * self.features * e if self.weight_learns else 0
        return Work(forward.read_bytes + 2 * f, written, product * (1 + self.weight_learns), matrix=True)


def baseline(
    hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor, targets_N: Tensor, *, label_smoothing: float
) -> Tensor:
    logits_NC = F.linear(hidden_ND, weight_CD, bias_C)
    return F.cross_entropy(logits_NC, targets_N, ignore_index=-1, label_smoothing=label_smoothing)


SPECS = (
    Spec("tiny", 6, 8, 11, padding=2, weight_learns=True),
    Spec("tiny_detached_weight", 5, 4, 8, label_smoothing=0.0),
    Spec("small_codebook", 10, 96, 1024, padding=3),
    Spec("small_long", 3, 8, 16384 + 4096 + 5, padding=1),
    # mask ratio 0.694 on average: 178 masked of 256 tokens an image
    Spec("vit_b_batch4", 4 * 178, 768, 1024),
)
#: One step of a batch of 128 (mask ratio 0.694), and a large codebook whose weight learns.
GPU_SPECS = (
    Spec("vit_b_batch128", 128 * 178, 768, 1024),
    Spec("codebook_65536", 8192, 1024, 65536, weight_learns=True),
)
