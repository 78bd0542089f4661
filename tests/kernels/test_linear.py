"""``linear`` against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.linear.api import linear
from mage_fast.kernels.ops.linear.specs import Spec
from tests.kernels.suite import OpSuite, Target, few


def oracle(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return F.linear(x_TD, weight_FD, bias_F)


class TestLinear(OpSuite):
    op = "linear"
    oracle = staticmethod(oracle)
    #: Sums of up to 256 terms in order, where torch adds up shorter ones: as exact to a few units.
    units = 4
    bad = {  # noqa: RUF012
        "no features": ({"x_TD": torch.ones(3, 0)}, r"x has shape \(3, 0\), wanted"),
        "integer x": ({"x_TD": torch.ones(5, 24).int()}, "x is int32, wanted float64"),
        "integer weight": ({"weight_FD": torch.ones(34, 24).int()}, "weight is int32, wanted float64"),
        "integer bias": ({"bias_F": torch.ones(34).int()}, "bias is int32, wanted float64"),
        "weight's features": (
            {"weight_FD": torch.ones(34, 23)},
            r"weight has shape \(34, 23\), wanted \(.*24\)",
        ),
        "bias's features": ({"bias_F": torch.ones(33)}, r"bias has shape \(33,\), wanted \(34,\)"),
        "device": ({"bias_F": torch.ones(34, device="meta")}, "bias is on meta, wanted cpu"),
    }

    @few
    @given(rows=st.integers(0, 80), features=st.integers(1, 150), out=st.integers(1, 150), bias=st.booleans())
    @example(rows=0, features=4, out=6, bias=True)
    @example(rows=1, features=2, out=2, bias=False)
    @example(rows=13, features=64, out=64, bias=True)
    @example(rows=3, features=66, out=130, bias=True)
    def test_shapes(self, target: Target, rows: int, features: int, out: int, bias: bool) -> None:
        spec = Spec("drawn", rows, features, out, bias)
        self.check(self.function(target), spec.inputs(target.widest, target.device))

    def test_leading_dimensions(self, target: Target) -> None:
        inputs = Spec("flat", 6, 8, 10).inputs(device=target.device)
        flat = self.function(target)(**inputs)
        inputs["x_TD"] = inputs["x_TD"].detach().view(2, 3, 8)
        assert torch.equal(self.function(target)(**inputs), flat.view(2, 3, 10))


@pytest.mark.parametrize("rows", [1, 6, 17])
def test_bfloat16_is_what_autocast_computes(rows: int) -> None:
    inputs = Spec("autocast", rows, 48, 20).inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(inputs["x_TD"].bfloat16(), inputs["weight_FD"], inputs["bias_F"])
        plain = F.linear(**{"input": inputs["x_TD"], "weight": inputs["weight_FD"], "bias": inputs["bias_F"]})
    assert y.dtype == plain.dtype == torch.bfloat16
    # both round the same factors; the sums differ in their last bits before they are rounded
    torch.testing.assert_close(y, plain, rtol=2**-7, atol=2**-7)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    inputs = Spec("frozen", 5, 8, 6).inputs()
    inputs["weight_FD"].requires_grad_(False)
    linear(**inputs).sum().backward()
    assert inputs["weight_FD"].grad is None
    torch.testing.assert_close(inputs["bias_F"].grad, torch.full((6,), 5.0))
    torch.testing.assert_close(inputs["x_TD"].grad, inputs["weight_FD"].sum(0).expand(5, 8))


def test_the_weights_gradient_keeps_what_bfloat16_would_round_off() -> None:
    """1 + 1/1024 is no bfloat16; the sum of both terms is the gradient all the same."""
    weight = torch.zeros(2, 2, requires_grad=True)
    x = torch.tensor([[1.0, 0.0], [2.0**-10, 0.0]], dtype=torch.bfloat16)
    linear(x, weight, implementation="auto").backward(torch.ones(2, 2, dtype=torch.bfloat16))
    assert weight.grad is not None
    if dispatch.select("linear", "auto", "cpu", "linear", (x, weight, None)).__name__.endswith("cpp"):
        assert weight.grad[0, 0] == 1 + 2.0**-10
