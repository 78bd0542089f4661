"""Bytes saved for backward, against what the formulas of the derivatives read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mage_fast.benchmark.activations import of_step, saved, saved_bytes
from mage_fast.benchmark.training import steps


def test_bytes_are_what_the_derivative_reads() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), nn.Parameter(torch.randn(7, 3))
    assert saved_bytes(lambda: x.sin().sum()) == 5 * 7 * 4
    assert saved_bytes(lambda: (x + 1).sum()) == 0
    assert saved_bytes(lambda: (x @ w).sum()) == (5 * 7 + 7 * 3) * 4
    assert saved_bytes(lambda: (x @ w).sum(), [w]) == 5 * 7 * 4
    assert saved_bytes(lambda: (x @ w.detach()[:, :2]).sum(), [w]) == 0  # a view of a parameter
    # a storage counts once, whatever its views; of a view, all of the storage is held
    assert saved_bytes(lambda: (x.sin() + x[:1].cos() + x.t().exp().sum()).sum()) == 2 * 5 * 7 * 4
    assert saved(lambda: x.double().sin().sum()).tensors == [((5, 7), torch.float64, 5 * 7 * 8)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_saves_less_than_the_references(precision: str) -> None:
    found = of_step(steps("cpu", smoke=True)[0], precision)
    assert 0 < found["mage_fast"].bytes < found["reference"].bytes
