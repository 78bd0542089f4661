"""LARS against its equation, one number at a time, and against timm's where conventions coincide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mage_fast.errors import InputError
from mage_fast.optional import optional
from mage_fast.training.lars import Lars
from mage_fast.training.run_state import fit, flatten


def by_hand(
    w: np.ndarray, gradients: list[np.ndarray], lrs: list[float], *, momentum: float, decay: float, eta: float
) -> np.ndarray:
    """The equation for one tensor, in float64."""
    w, m = w.astype(np.float64), np.zeros(w.shape)
    for g, lr in zip(gradients, lrs, strict=True):
        trust, beta = 1.0, 0.0
        if w.ndim > 1:
            size_w, size_g, beta = math.sqrt((w**2).sum()), math.sqrt((g**2).sum()), decay
            if size_w > 0 and size_g > 0:
                trust = eta * size_w / (size_g + beta * size_w)
        for place in np.ndindex(w.shape):
            m[place] = momentum * m[place] + trust * (g[place] + beta * w[place])
        w = w - lr * m
    return w


def steps(optimizer: torch.optim.Optimizer, tensors: list[Tensor], gradients: Any, lrs: list[float]) -> None:
    for number, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for tensor, its in zip(tensors, gradients, strict=True):
            tensor.grad = torch.from_numpy(its[number]).to(tensor.dtype)
        optimizer.step()


SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(
    SHAPES, st.floats(0, 0.99), st.floats(0, 0.5), st.floats(1e-4, 1.0), st.integers(0, 10**6), st.booleans()
)
def test_steps_are_the_equation(
    shapes: list[tuple[int, ...]], momentum: float, decay: float, eta: float, seed: int, zero: bool
) -> None:
    """Any number of tensors of any shape, a learning rate that changes, weights or gradients of zero."""
    random = np.random.default_rng(seed)
    start = [random.standard_normal(shape) * (0 if zero and not n else 1) for n, shape in enumerate(shapes)]
    gradients = [[random.standard_normal(shape) for _ in range(3)] for shape in shapes]
    gradients[-1][1][...] = 0
    lrs = [0.5, 2.0, 0.1]
    tensors = [nn.Parameter(torch.from_numpy(x.copy())) for x in start]
    optimizer = Lars(tensors, 1.0, momentum=momentum, weight_decay=decay, trust_coefficient=eta)
    steps(optimizer, tensors, gradients, lrs)
    for tensor, w, its in zip(tensors, start, gradients, strict=True):
        wanted = by_hand(w, its, lrs, momentum=momentum, decay=decay, eta=eta)
        np.testing.assert_allclose(tensor.detach().numpy(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_of_matrices_are_timm_s(decay: float) -> None:
    """timm adds 1e-8 to the denominator and adapts 1-D tensors too: those are left out here."""
    theirs = optional("timm.optim", extra="finetune").Lars
    random = np.random.default_rng(0)
    start = [random.standard_normal(shape) for shape in ((5, 3), (2, 2, 4))]
    gradients = [[random.standard_normal(x.shape) for _ in range(4)] for x in start]
    results = []
    for make in (
        lambda x: Lars(x, 1.0, weight_decay=decay),
        lambda x: theirs(x, 1.0, momentum=0.9, weight_decay=decay, always_adapt=True, eps=0.0),
    ):
        tensors = [nn.Parameter(torch.from_numpy(x.copy())) for x in start]
        steps(make(tensors), tensors, gradients, [0.3, 1.0, 4.0, 0.2])
        results.append(tensors)
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=0)
        assert not torch.equal(ours, torch.from_numpy(start[0] if ours.ndim == 2 else start[1]))


def test_vectors_take_plain_steps() -> None:
    """As ``torch.optim.SGD`` with momentum, also with a weight decay that is for matrices only."""
    random = np.random.default_rng(1)
    start, gradients = random.standard_normal(7), [[random.standard_normal(7) for _ in range(5)]]
    results = []
    for make in (lambda x: Lars(x, 1.0, weight_decay=0.5), lambda x: torch.optim.SGD(x, 1.0, momentum=0.9)):
        tensors = [nn.Parameter(torch.from_numpy(start.copy()))]
        steps(make(tensors), tensors, gradients, [0.1] * 5)
        results.append(tensors[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_the_step_s_length_does_not_depend_on_the_gradient_s() -> None:
    """lr * 0.001 * |w| in the first step, whatever the loss is multiplied by."""
    w = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for factor in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(w.clone())
        parameter.grad = factor * torch.ones_like(w)
        Lars([parameter], 2.0).step()
        assert (parameter - w).norm().item() == pytest.approx(2.0 * 0.001 * w.norm().item(), rel=1e-9)


def test_float32_is_as_near_as_a_plain_loop() -> None:
    random = np.random.default_rng(2)
    start = random.standard_normal((40, 30)).astype(np.float32)
    gradients = [[random.standard_normal((40, 30)) for _ in range(20)]]
    lrs = [1.0 / (number + 1) for number in range(20)]
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    steps(Lars([parameter], 1.0), [parameter], gradients, lrs)
    wanted = by_hand(start, gradients[0], lrs, momentum=0.9, decay=0.0, eta=0.001)
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=0, atol=1e-6)


def test_a_restored_state_goes_on_to_the_bit() -> None:
    """Also where there is no gradient yet, and through a closure."""

    def run(model: nn.Linear, optimizer: Lars, first: int, last: int) -> None:
        for number in range(first, last):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0

    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    one, other = (Lars(model.parameters(), 0.7) for model in models)
    one.step()
    assert not one.state
    run(models[0], one, 0, 3)
    tensors, options = flatten({"model": models[0], "optimizer": one})
    assert "optimizer.weight.momentum_buffer" in tensors
    saved = {key: (x.shape, x.dtype) for key, x in tensors.items()}
    targets, finish = fit("state", {"model": models[1], "optimizer": other}, saved, options)
    with torch.no_grad():
        for key, x in targets.items():
            x.copy_(tensors[key])
    finish()
    run(models[0], one, 3, 6)
    run(models[1], other, 3, 6)
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"trust_coefficient": 0.0}, {"lr": math.nan}],
)
def test_numbers_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"Lars: lr .*, momentum .* trust_coefficient"):
        Lars([nn.Parameter(torch.ones(2))], **({"lr": 1.0} | options))
