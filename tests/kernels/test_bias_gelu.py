"""``bias_gelu`` against a sum, torch's erf GELU and dropout by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.bias_gelu.api import bias_gelu
from mage_fast.kernels.ops.bias_gelu.specs import Spec
from tests.kernels.suite import OpSuite, Target, assert_as_good, differentiate, few


def oracle(
    x_TF: Tensor,
    bias_F: Tensor,
    *,
    dropout: float = 0.0,
    rng_state: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    y = F.gelu(x_TF + bias_F)
    if rng_state is not None and dropout > 0:
        y = y * rng.keep_mask(rng_state, stream, y.shape, dropout) / (1 - round(dropout * 65536) / 65536)
    return y


class TestBiasGelu(OpSuite):
    op = "bias_gelu"
    oracle = staticmethod(oracle)
    bad = {  # noqa: RUF012
        "no features": ({"x_TF": torch.ones(3, 0)}, r"x has shape \(3, 0\), wanted"),
        "integer x": ({"x_TF": torch.ones(5, 24).int()}, "x is int32, wanted float64"),
        "integer bias": ({"bias_F": torch.ones(24).int()}, "bias is int32, wanted float64"),
        "bias's features": ({"bias_F": torch.ones(23)}, r"bias has shape \(23,\), wanted \(24,\)"),
        "bias's rank": ({"bias_F": torch.ones(1, 24)}, r"bias has shape \(1, 24\), wanted \(24,\)"),
        "dropout of 1": ({"dropout": 1.0}, r"dropout is 1\.0, wanted 0 <= dropout < 1"),
        "negative dropout": ({"dropout": -0.5}, r"dropout is -0\.5, wanted 0 <= dropout < 1"),
        "no state": ({"rng_state": None}, "dropout is 0.1 but rng_state is None"),
        "state's dtype": ({"rng_state": torch.zeros(2).int()}, "rng_state is int32, wanted int64"),
        "state's shape": ({"rng_state": torch.zeros(1).long()}, r"rng_state has shape \(1,\), wanted \(2,\)"),
        "device": ({"bias_F": torch.ones(24, device="meta")}, "bias is on meta, wanted cpu"),
    }

    @few
    @given(rows=st.integers(0, 9), features=st.integers(1, 40), dropout=st.sampled_from([0.0, 0.1, 0.5]))
    @example(rows=0, features=3, dropout=0.1)
    @example(rows=1, features=1, dropout=0.0)
    @example(rows=3, features=7, dropout=0.1)
    def test_shapes(self, target: Target, rows: int, features: int, dropout: float) -> None:
        self.check(
            self.function(target), Spec("drawn", rows, features, dropout).inputs(target.widest, target.device)
        )

    def test_leading_dimensions(self, target: Target) -> None:
        flat = Spec("flat", 6, 8).inputs(device=target.device)
        folded = flat | {"x_TF": flat["x_TF"].detach().view(2, 3, 8)}
        got = self.function(target)(**folded)
        assert got.shape == (2, 3, 8)
        assert torch.equal(got.view(6, 8), self.function(target)(**flat))

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_narrow_activations_with_float32_bias(self, target: Target, narrow: torch.dtype) -> None:
        """As under autocast: one rounding at the end, so at most half a unit in the last place of error."""
        inputs = Spec("mixed", 5, 64).inputs(torch.float32, target.device)
        inputs["x_TF"] = inputs["x_TF"].detach().to(narrow).requires_grad_()
        wide = {n: x.detach().double().requires_grad_() for n, x in inputs.items() if n in ("x_TF", "bias_F")}
        wanted = differentiate(oracle, inputs | wide)
        got = differentiate(self.function(target), inputs)
        assert [x.dtype for x in got.values()] == [narrow, narrow, torch.float32]
        rounded = {name: x.to(got[name].dtype) for name, x in wanted.items()}
        assert_as_good(got, rounded, wanted, 1e-6)

    def test_far_tails(self, target: Target) -> None:
        """GELU and its gradient stay finite and reach 0 and the identity."""
        x = torch.tensor([[-100.0, -10.0, 0.0, 10.0, 100.0]], device=target.device, requires_grad=True)
        y = self.function(target)(x_TF=x, bias_F=torch.zeros(5, device=target.device))
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y.detach().cpu(), torch.tensor([[0.0, 0.0, 0.0, 10.0, 100.0]]))
        torch.testing.assert_close(slope.cpu(), torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))

    @pytest.mark.parametrize("precision", [torch.float32, torch.float16])
    @pytest.mark.parametrize("features", [1032, 20, 7])
    def test_dropout_bits(self, target: Target, features: int, precision: torch.dtype) -> None:
        """Large inputs pass GELU as they are and show the mask, forward and backward, bit for bit."""
        x = torch.full((3, features), 8.0, dtype=precision, device=target.device, requires_grad=True)
        bias, state = torch.zeros_like(x[0]), rng.new_state(5, device=target.device)
        y = self.function(target)(x_TF=x, bias_F=bias, dropout=0.3, rng_state=state, stream=9)
        (grad,) = torch.autograd.grad(y.sum(), x)
        keep = rng.keep_mask(state, 9, x.shape, 0.3)
        assert torch.equal(y != 0, keep)
        assert torch.equal(grad != 0, keep)

    def test_gelu_is_as_exact_as_float32(self, target: Target) -> None:
        """Over its whole range, against float64: two units in the last place of x, or of a half."""
        if target.implementation == "reference":
            pytest.skip("torch's own, which on a CPU is less exact")
        x = torch.linspace(-30, 30, 4096, device=target.device)[None].requires_grad_()
        y = self.function(target)(x_TF=x, bias_F=torch.zeros_like(x[0]))
        (slope,) = torch.autograd.grad(y.sum(), x)
        wide = x.detach().double().requires_grad_()
        exact = F.gelu(wide)
        (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
        assert ((y - exact).abs() <= 2**-22 * x.abs().clamp(min=0.5)).all()
        assert (slope - exact_slope).abs().max() <= 2**-22

    def test_not_finite(self, target: Target) -> None:
        """Overflow and NaN stay visible."""
        x = torch.tensor([[torch.inf, torch.nan]], device=target.device, requires_grad=True)
        y = self.function(target)(x_TF=x, bias_F=torch.zeros(2, device=target.device))
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert not y.isfinite().any()
        assert slope[0, 1].isnan()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_more_than_2_to_the_31_elements(self) -> None:
        """The last rows of a tensor that 32 bits cannot index are those of the rows alone."""
        x = torch.zeros(2**31 // 1024 + 2, 1024, dtype=torch.bfloat16, device="cuda")
        x[-2:] = torch.randn(2, 1024, device="cuda")
        bias = torch.randn(1024, device="cuda")
        got = bias_gelu(x, bias, implementation="triton")[-2:]
        assert torch.equal(got, bias_gelu(x[-2:], bias, implementation="triton"))
