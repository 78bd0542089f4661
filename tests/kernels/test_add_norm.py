"""``add_norm`` against dropout by hand, a sum and torch's LayerNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.add_norm.api import add_norm
from mage_fast.kernels.ops.add_norm.specs import Spec
from tests.kernels.suite import OpSuite, Target, differentiate, few


def oracle(
    branch_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
    rng_state: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    if rng_state is not None and dropout > 0:
        keep = rng.keep_mask(rng_state, stream, branch_TD.shape, dropout)
        branch_TD = branch_TD * keep / (1 - round(dropout * 65536) / 65536)
    out = residual_TD + branch_TD
    return out, F.layer_norm(out, weight_D.shape, weight_D, bias_D, eps)


class TestAddNorm(OpSuite):
    op = "add_norm"
    oracle = staticmethod(oracle)
    #: The weight's gradient sums rows in order, each already rounded; how much is lost is luck in both.
    units = 2
    floor = 1.0  # a row less its mean: exactly 0 for one feature, then scaled by 1 / sqrt(eps)
    bad = {  # noqa: RUF012
        "no features": (
            {"branch_TD": torch.tensor(1.0)},
            r"branch has shape \(\), wanted \(\.\.\., features\)",
        ),
        "integer branch": ({"branch_TD": torch.ones(5, 24).int()}, "branch is int32, wanted float64 or"),
        "integer residual": (
            {"residual_TD": torch.ones(5, 24).int()},
            "residual is int32, wanted float64 or",
        ),
        "residual's rows": (
            {"residual_TD": torch.ones(4, 24)},
            r"residual has shape \(4, 24\), wanted \(5, 24\)",
        ),
        "weight's features": ({"weight_D": torch.ones(23)}, r"weight has shape \(23,\), wanted \(24,\)"),
        "integer weight": ({"weight_D": torch.ones(24).int()}, "weight is int32"),
        "bias's features": ({"bias_D": torch.ones(25)}, r"bias has shape \(25,\), wanted \(24,\)"),
        "bias's dtype": ({"bias_D": torch.ones(24).half()}, "bias is float16, wanted float32"),
        "dropout of 1": ({"dropout": 1.0}, r"dropout is 1\.0, wanted 0 <= dropout < 1"),
        "negative dropout": ({"dropout": -0.1}, r"dropout is -0\.1, wanted 0 <= dropout < 1"),
        "no state": ({"rng_state": None}, "dropout is 0.1 but rng_state is None"),
        "state's dtype": ({"rng_state": torch.zeros(2)}, "rng_state is float32, wanted int64"),
        "state's shape": ({"rng_state": torch.zeros(3).long()}, r"rng_state has shape \(3,\), wanted \(2,\)"),
        "device": ({"bias_D": torch.ones(24, device="meta")}, "bias is on meta, wanted cpu"),
    }

    @few
    @given(rows=st.integers(0, 9), features=st.integers(1, 40), dropout=st.sampled_from([0.0, 0.1, 0.5]))
    @example(rows=0, features=3, dropout=0.1)
    @example(rows=1, features=1, dropout=0.0)
    @example(rows=3, features=7, dropout=0.1)
    def test_shapes(self, target: Target, rows: int, features: int, dropout: float) -> None:
        inputs = Spec("drawn", rows, features, dropout).inputs(target.widest, target.device)
        self.check(self.function(target), inputs)

    def test_leading_dimensions(self, target: Target) -> None:
        flat = Spec("flat", 6, 8).inputs(device=target.device)
        folded = flat | {name: flat[name].detach().view(2, 3, 8) for name in ("branch_TD", "residual_TD")}
        wanted = self.function(target)(**flat)
        got = self.function(target)(**folded)
        for a, b in zip(got, wanted, strict=True):
            assert a.shape == (2, 3, 8)
            assert torch.equal(a.view(6, 8), b)

    @pytest.mark.parametrize("branch_dtype", [torch.bfloat16, torch.float16])
    def test_wide_residual(self, target: Target, branch_dtype: torch.dtype) -> None:
        """Under autocast the branch is narrow, the residual stream and the parameters are float32."""
        inputs: dict[str, Any] = Spec("mixed", 5, 64).inputs(torch.float32, target.device)
        inputs["branch_TD"] = inputs["branch_TD"].detach().to(branch_dtype).requires_grad_()
        got = differentiate(self.function(target), inputs)
        wide = inputs | {"branch_TD": inputs["branch_TD"].detach().float().requires_grad_()}
        wanted = differentiate(self.function(target), wide)
        narrow = {name for name, x in got.items() if x.dtype == branch_dtype}
        assert narrow == {"output 1", "gradient of branch_TD"}
        assert torch.equal(got["output 0"], wanted["output 0"])
        for name, x in wanted.items():
            torch.testing.assert_close(got[name].float(), x, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("precision", [torch.float32, torch.float16])
    @pytest.mark.parametrize("features", [768, 20, 7])
    def test_dropout_bits(self, target: Target, features: int, precision: torch.dtype) -> None:
        """Ones added to nothing show the mask, forward and backward: bit for bit that of the contract."""
        inputs: dict[str, Any] = Spec("bits", 3, features, 0.3).inputs(precision, target.device)
        inputs["branch_TD"] = torch.ones_like(inputs["branch_TD"], requires_grad=True)
        inputs["residual_TD"] = torch.zeros_like(inputs["residual_TD"])
        out, _ = self.function(target)(**inputs)
        (grad,) = torch.autograd.grad(out.sum(), inputs["branch_TD"])
        keep = rng.keep_mask(inputs["rng_state"], inputs["stream"], out.shape, 0.3)
        scaled = keep * torch.tensor(rng.keep_scale(0.3, rng.ACTIVATION_BITS), device=target.device)
        assert torch.equal(out, scaled.to(precision))
        assert torch.equal(grad, scaled.to(precision))

    def test_without_dropout_the_gradients_are_separate(self, target: Target) -> None:
        """Gradients that share memory would be scaled twice by an in-place optimiser or clipping."""
        inputs = Spec("plain", 3, 4, 0.0).inputs(device=target.device)
        out, normed = self.function(target)(**inputs)
        leaves = [inputs["branch_TD"], inputs["residual_TD"]]
        branch, residual = torch.autograd.grad((out + normed).sum(), leaves)
        assert torch.equal(branch, residual)
        assert branch.data_ptr() != residual.data_ptr()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_more_than_2_to_the_31_elements(self) -> None:
        """The last rows of a tensor that 32 bits cannot index are those of the rows alone."""
        rows, features = 2**31 // 1024 + 2, 1024
        branch, residual = torch.zeros(2, rows, features, dtype=torch.bfloat16, device="cuda")
        branch[-2:], residual[-2:] = torch.randn(2, 2, features, device="cuda")
        weight, bias = torch.randn(2, features, device="cuda")
        got = add_norm(branch, residual, weight, bias, implementation="triton")
        wanted = add_norm(branch[-2:], residual[-2:], weight, bias, implementation="triton")
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a[-2:], b)

    def test_too_many_features_are_declined(self) -> None:
        triton = pytest.importorskip("mage_fast.kernels.ops.add_norm.triton")
        row = torch.empty(1, 8192)
        assert triton.unsupported("add_norm", row, row) is None
        for branch, residual, most in ((row.half(), row, 4096), (row[:, 1:], row[:, 1:], 2048)):
            assert triton.unsupported("add_norm", branch, residual).endswith(f"at most {most}")
