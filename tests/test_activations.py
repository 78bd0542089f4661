"""Bytes kept for the backward pass, against what the formulas of the derivatives read."""

from __future__ import annotations

import torch
from torch import nn

from mage_fast.benchmark.end_to_end import kept_bytes


def test_bytes_are_what_the_derivative_reads() -> None:
    nothing, layer = nn.Module(), nn.Linear(7, 3, bias=False)
    x, w = torch.randn(5, 7, requires_grad=True), layer.weight
    assert kept_bytes(nothing, lambda: x.sin().sum()) == 5 * 7 * 4
    assert kept_bytes(nothing, lambda: (x + 1).sum()) == 0
    assert kept_bytes(nothing, lambda: layer(x).sum()) == (5 * 7 + 7 * 3) * 4
    assert kept_bytes(layer, lambda: layer(x).sum()) == 5 * 7 * 4
    assert kept_bytes(layer, lambda: (x @ w.detach()[:2].t()).sum()) == 0  # a view of a parameter
    # a storage counts once, whatever its views; of a view, all of the storage is held
    assert kept_bytes(nothing, lambda: (x.sin() + x[:1].cos() + x.t().exp().sum()).sum()) == 2 * 5 * 7 * 4
    assert kept_bytes(nothing, lambda: x.double().sin().sum()) == 5 * 7 * 8
