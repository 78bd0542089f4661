"""``nearest_code`` against the whole distance matrix in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels.ops.nearest_code import reference
from mage_fast.kernels.ops.nearest_code.specs import Spec
from tests.kernels.suite import OpSuite, Target, few, results_by_threads


def distances(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x_ND.double(), codebook_KD.double(), compute_mode=exact).square()


class TestNearestCode(OpSuite):
    op = "nearest_code"
    bad = {  # noqa: RUF012
        "x's rank": ({"x_ND": torch.ones(6)}, r"x has shape \(6,\), wanted \(\*, \*\)"),
        "no channels": ({"x_ND": torch.ones(7, 0)}, r"x has shape \(7, 0\), wanted"),
        "codebook's channels": (
            {"codebook_KD": torch.ones(5, 4)},
            r"codebook has shape \(5, 4\), wanted \(\*, 6\)",
        ),
        "empty codebook": ({"codebook_KD": torch.ones(0, 6)}, "codebook has 0 entries, wanted at least 1"),
        "integer x": ({"x_ND": torch.ones(7, 6).int()}, "x is int32, wanted float64"),
        "integer codebook": ({"codebook_KD": torch.ones(5, 6).int()}, "codebook is int32, wanted float64"),
        "device": ({"codebook_KD": torch.ones(5, 6, device="meta")}, "codebook is on meta, wanted cpu"),
    }

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """The chosen code is as near as the nearest, to the rounding of |c|^2 - 2 x.c in float32 or wider."""
        index = function(**inputs)
        x_ND, codebook_KD = inputs["x_ND"], inputs["codebook_KD"]
        assert (index.dtype, index.shape) == (torch.int64, x_ND.shape[:1])
        some = slice(None, None, 1 + x_ND.shape[0] // 512)
        distance = distances(x_ND[some], codebook_KD)
        excess = distance.gather(1, index[some, None])[:, 0] - distance.amin(1)
        size = codebook_KD.double().square().sum(1).max() + x_ND[some].double().square().sum(1)
        eps = torch.finfo(torch.promote_types(x_ND.dtype, torch.float32)).eps
        assert (excess <= 8 * eps * size).all(), excess.max()

    @few
    @given(rows=st.integers(0, 9), codes=st.integers(1, 40), channels=st.integers(1, 20))
    @example(rows=0, codes=3, channels=2)
    @example(rows=1, codes=1, channels=1)
    def test_shapes(self, target: Target, rows: int, codes: int, channels: int) -> None:
        self.check(
            self.function(target), Spec("drawn", rows, codes, channels).inputs(target.widest, target.device)
        )

    def test_agrees_with_float64_argmin(self, target: Target) -> None:
        """On random features ties are absent, so float32 gives the very index."""
        inputs = Spec("agree", 300, 64, 16).inputs(torch.float32, target.device)
        assert torch.equal(self.function(target)(**inputs), distances(**inputs).argmin(1))

    def test_autocast_does_not_narrow_the_distances(self, target: Target) -> None:
        """In bfloat16 some of these indices would differ."""
        inputs = Spec("agree", 300, 64, 16).inputs(torch.float32, target.device)
        wanted = distances(**inputs).argmin(1)
        narrow = {name: x.bfloat16() for name, x in inputs.items()}
        assert not torch.equal(distances(**narrow).argmin(1), wanted)
        with torch.autocast(target.device, torch.bfloat16):
            assert torch.equal(self.function(target)(**inputs), wanted)

    def test_ties_go_to_the_lowest_index(self, target: Target) -> None:
        """Small integers: every distance is exact, and many are equal."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-2, 3, (200, 3), generator=generator).float()
        codebook = torch.randint(-2, 3, (70, 3), generator=generator).float()
        distance = (x[:, None] - codebook[None]).square().sum(-1)
        wanted = [row.tolist().index(row.min()) for row in distance]
        assert any(row.eq(row.min()).sum() > 1 for row in distance)
        got = self.function(target)(x_ND=x.to(target.device), codebook_KD=codebook.to(target.device))
        assert got.tolist() == wanted

    def test_codebook_entries_find_themselves(self, target: Target) -> None:
        inputs = Spec("self", 1, 128, 8).inputs(torch.float32, target.device)
        got = self.function(target)(x_ND=inputs["codebook_KD"], codebook_KD=inputs["codebook_KD"])
        assert got.tolist() == list(range(128))

    def test_narrow_features_with_float32_codebook(self, target: Target) -> None:
        inputs = Spec("mixed", 50, 32, 8).inputs(torch.float32, target.device)
        inputs["x_ND"] = inputs["x_ND"].bfloat16()
        assert torch.equal(self.function(target)(**inputs), distances(**inputs).argmin(1))

    def test_nan_is_least(self, target: Target) -> None:
        """As in torch's argmin: the first code whose distance is NaN; infinite features stay in the range."""
        if target.implementation != "cpp":
            pytest.skip("the order of NaN is the CPU's")
        inputs = Spec("nan", 30, 70, 6).inputs(torch.float32, target.device)
        inputs["x_ND"][3], inputs["x_ND"][5, 2], inputs["x_ND"][7, 1] = torch.nan, torch.inf, -torch.inf
        assert torch.equal(self.function(target)(**inputs), reference.nearest_code(*inputs.values()))
        inputs["codebook_KD"][50:60, 4] = torch.nan
        assert torch.equal(self.function(target)(**inputs)[10:], torch.full((20,), 50))

    def test_threads_change_nothing(self, target: Target) -> None:
        """Even where rounding decides: codes that are nearly equal."""
        if target.implementation != "cpp":
            pytest.skip("the order of sums is fixed in our kernels only")
        inputs = Spec("threads", 500, 300, 40).inputs(torch.float32, target.device)
        inputs["codebook_KD"] = 1 + 1e-6 * inputs["codebook_KD"]
        one, *others = results_by_threads(lambda: self.function(target)(**inputs))
        assert all(torch.equal(other, one) for other in others)

    def test_no_gradient(self, target: Target) -> None:
        inputs = Spec("grad", 4, 5, 3).inputs(torch.float32, target.device)
        got = self.function(target)(**{name: x.requires_grad_() for name, x in inputs.items()})
        assert not got.requires_grad


def test_reference_holds_a_bounded_part_of_the_distances() -> None:
    """Rows beyond one chunk give the same indices as row by row; the last chunk is short."""
    codes = reference._CHUNK // 8  # eight rows a chunk
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(21, 1, generator=generator), torch.randn(codes, 1, generator=generator)
    whole = reference.nearest_code(x, codebook)
    assert torch.equal(whole, torch.cat([reference.nearest_code(row[None], codebook) for row in x]))
