"""Attention in C++ where the shapes of the suite do not reach."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.attention import reference
from mage_fast.kernels.ops.attention.api import attention
from mage_fast.kernels.ops.attention.specs import Spec
from tests.kernels.suite import cotangent, differentiate


class TestCppKernels:
    @pytest.fixture(autouse=True)
    def module(self) -> Any:
        module = dispatch._find("attention", "cpp")
        if isinstance(module, str):
            pytest.skip(module)
        return module

    @pytest.mark.parametrize("scale", [0.2, -0.2, 0.0])
    @pytest.mark.parametrize(
        ("lengths", "heads", "features"),
        [((1100, 3, 0, 530), 2, 24), ((1, 700), 1, 256), ((97, 18), 3, 1), ((20,), 1, 35), ((513,), 1, 67)],
    )
    def test_any_length_features_and_scale(
        self, module: Any, lengths: tuple[int, ...], heads: int, features: int, scale: float
    ) -> None:
        """Keys in several pieces, features of no whole vector, the least product as the greatest score."""
        inputs = Spec("any", lengths, heads, features, 0.2).inputs()
        qkv = inputs["qkv_T3HD"].detach()
        rest = (inputs["cu_seqlens"], max(lengths), scale, 0.2, inputs["rng_state"], inputs["stream"])
        out, lse = module.attention(qkv, *rest)
        wanted_out, wanted_lse = reference.attention(qkv, *rest)
        torch.testing.assert_close((out, lse), (wanted_out, wanted_lse), rtol=1e-5, atol=4e-6)
        grad = cotangent(out, 0)
        got = module.attention_backward(grad, qkv, out, lse, *rest)
        wanted = reference.attention_backward(grad, qkv, wanted_out, wanted_lse, *rest)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("which", [0, 1, 2])
    @pytest.mark.parametrize("length", [5, 600])
    def test_special_values(self, which: int, value: float, length: int) -> None:
        """NaN and infinity reach what they reach in the reference, and no other head or sequence."""
        inputs = Spec("special", (length, 3), 2, 8, 0.0).inputs()
        inputs["qkv_T3HD"].detach()[4, which, 1, 2] = value
        got, wanted = (
            differentiate(partial(attention, implementation=name), inputs) for name in ("cpp", "reference")
        )
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5, equal_nan=True)

    def test_greatly_different_scores(self, module: Any) -> None:
        """Probabilities that underflow are zeros; a piece of keys far below an earlier or a later one adds
        nothing."""
        inputs = Spec("great", (1200,), 1, 8, 0.0).inputs()
        qkv = inputs["qkv_T3HD"].detach() * 30
        qkv[400:500, 1] *= 20
        rest = (inputs["cu_seqlens"], 1200, 8**-0.5, 0.0, None, 0)
        out, lse = module.attention(qkv, *rest)
        wanted = reference.attention(qkv.double(), *rest)
        torch.testing.assert_close((out.double(), lse.double()), wanted, rtol=1e-4, atol=0.3)

    def test_sequences_that_do_not_cover_the_rows_are_refused(self, module: Any) -> None:
        qkv = torch.zeros(4, 3, 1, 8)
        for ends in ((0, 5), (0, 3), (1, 4), (0, 3, 2, 4)):
            cu_seqlens = torch.tensor(ends, dtype=torch.int32)
            with pytest.raises(RuntimeError, match="cu_seqlens do not rise from 0 to the 4 rows"):
                module.attention(qkv, cu_seqlens, 4, 1.0, 0.0, None, 0)
