"""``group_norm_silu`` against torch's group norm and SiLU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.group_norm_silu.specs import Spec
from tests.kernels.suite import (
    TOLERANCE,
    OpSuite,
    Target,
    assert_as_good,
    assert_equal,
    cast,
    differentiate,
    few,
    results_by_threads,
)


def oracle(
    x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, *, num_groups: int = 32, eps: float = 1e-6
) -> Tensor:
    return F.silu(torch.group_norm(x_NCHW, num_groups, weight_C, bias_C, eps))


class TestGroupNormSilu(OpSuite):
    op = "group_norm_silu"
    oracle = staticmethod(oracle)
    floor = 1.0  # a group less its mean: exactly 0 for one element, then scaled by 1 / sqrt(eps)
    bad = {  # noqa: RUF012
        "x's rank": ({"x_NCHW": torch.ones(2, 6, 3)}, r"x has shape \(2, 6, 3\), wanted \(\*, \*, \*, \*\)"),
        "no pixel": (
            {"x_NCHW": torch.ones(2, 6, 3, 0)},
            r"x has shape \(2, 6, 3, 0\), wanted at least one pixel",
        ),
        "integer x": ({"x_NCHW": torch.ones(2, 6, 3, 3).int()}, "x is int32, wanted float64"),
        "groups": ({"num_groups": 4}, "num_groups is 4, wanted a divisor of x's 6 channels"),
        "no groups": ({"num_groups": 0}, "num_groups is 0, wanted a divisor of x's 6 channels"),
        "negative groups": ({"num_groups": -3}, "num_groups is -3, wanted a divisor of x's 6 channels"),
        "no channels": ({"x_NCHW": torch.ones(2, 0, 3, 3)}, "wanted a divisor of x's 0 channels"),
        "weight's channels": ({"weight_C": torch.ones(5)}, r"weight has shape \(5,\), wanted \(6,\)"),
        "bias's channels": ({"bias_C": torch.ones(7)}, r"bias has shape \(7,\), wanted \(6,\)"),
        "integer weight": ({"weight_C": torch.ones(6).int()}, "weight is int32, wanted float64"),
        "bias's dtype": ({"bias_C": torch.ones(6).double()}, "bias is float64, wanted float32"),
        "device": ({"weight_C": torch.ones(6, device="meta")}, "weight is on meta, wanted cpu"),
    }

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """The suite's rule, in float32 with 8 units in the last place: the sums over pixels are of
        thousands of elements, which torch adds in a cascade on the CPU and the interpreter one by one.
        """
        dtype = inputs["x_NCHW"].dtype
        tolerance = TOLERANCE[dtype] * (8 if dtype == torch.float32 else 1)
        actual = differentiate(function, inputs, layout)
        plain = differentiate(self.oracle, cast(inputs, dtype), layout)
        wanted = differentiate(self.oracle, cast(inputs, torch.float64), layout)
        assert_as_good(actual, plain, wanted, tolerance, self.floor)

    @few
    @given(
        images=st.integers(0, 3),
        groups=st.integers(1, 4),
        width=st.integers(1, 3),
        size=st.integers(1, 5),
        channels_last=st.booleans(),
    )
    @example(images=0, groups=2, width=2, size=3, channels_last=True)
    @example(images=1, groups=1, width=1, size=1, channels_last=True)
    @example(images=2, groups=3, width=2, size=1, channels_last=True)
    def test_shapes(
        self, target: Target, images: int, groups: int, width: int, size: int, channels_last: bool
    ) -> None:
        spec = Spec("drawn", images, groups * width, size, groups, channels_last)
        self.check(self.function(target), spec.inputs(target.widest, target.device))

    def test_maps_that_no_program_holds(
        self, target: Target, tiny: Spec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Large maps take another way through the kernels; on these each step of it is one program."""
        if target.implementation == "triton":
            monkeypatch.setattr(dispatch._find("group_norm_silu", "triton"), "_WHOLE", 0)
        self.check(self.function(target), tiny.inputs(target.widest, target.device))
        inputs = Spec("odd", 2, 15, 9, 3, tiny.channels_last).inputs(target.widest, target.device)
        self.check(self.function(target), inputs)

    def test_rectangles(self, target: Target) -> None:
        inputs = Spec("square", 2, 4, 6, 2).inputs(target.widest, target.device)
        inputs["x_NCHW"] = inputs["x_NCHW"].detach()[:, :, :5, 1:4].requires_grad_()
        self.check(self.function(target), inputs)

    @pytest.mark.parametrize("dtype_", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("grad_format", [torch.channels_last, torch.contiguous_format])
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_memory_format_is_kept(
        self, target: Target, channels_last: bool, grad_format: torch.memory_format, dtype_: torch.dtype
    ) -> None:
        """Output and gradient have x's format, whatever the incoming gradient's."""
        format = torch.channels_last if channels_last else torch.contiguous_format
        inputs = Spec("format", 2, 8, 4, 4, channels_last).inputs(dtype_, target.device)
        out = self.function(target)(**inputs)
        assert out.is_contiguous(memory_format=format)
        assert not out.is_contiguous() or not channels_last
        grad_out = torch.randn(out.shape, device=target.device, dtype=dtype_).contiguous(
            memory_format=grad_format
        )
        (grad,) = torch.autograd.grad(out, inputs["x_NCHW"], grad_out)
        assert grad.stride() == inputs["x_NCHW"].stride()
        assert grad.dtype == out.dtype == dtype_

    def test_neither_format_comes_out_contiguous(self, target: Target) -> None:
        inputs = Spec("format", 2, 8, 4, 4).inputs(torch.float32, target.device)
        inputs["x_NCHW"] = inputs["x_NCHW"].detach().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
        assert self.function(target)(**inputs).is_contiguous()

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_narrow_activations_with_float32_parameters(self, target: Target, narrow: torch.dtype) -> None:
        """As under autocast: statistics in float32, one rounding at the end."""
        inputs = Spec("mixed", 2, 8, 5, 4).inputs(torch.float32, target.device)
        inputs["x_NCHW"] = inputs["x_NCHW"].detach().to(narrow).requires_grad_()
        wide = {n: x.detach().double().requires_grad_() for n, x in inputs.items() if isinstance(x, Tensor)}
        wanted = differentiate(oracle, inputs | wide)
        got = differentiate(self.function(target), inputs)
        assert [x.dtype for x in got.values()] == [narrow, narrow, torch.float32, torch.float32]
        rounded = {name: x.to(got[name].dtype) for name, x in wanted.items()}
        assert_as_good(got, rounded, wanted, 2e-6)

    def test_offset_does_not_cancel(self, target: Target) -> None:
        """A mean far from 0: E[x^2] - E[x]^2 in float32 would lose the variance."""
        inputs = Spec("offset", 2, 8, 8, 4).inputs(torch.float32, target.device)
        inputs["x_NCHW"] = (inputs["x_NCHW"].detach() + 300).requires_grad_()
        self.check(self.function(target), inputs)

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_threads_change_nothing(self, target: Target, channels_last: bool) -> None:
        if target.implementation != "cpp":
            pytest.skip("the order of sums is fixed in our kernels only")
        inputs = Spec("threads", 2, 40, 33, 10, channels_last).inputs(torch.float32, target.device)
        one, *others = results_by_threads(lambda: differentiate(self.function(target), inputs))
        for other in others:
            assert_equal(other, one)


@pytest.mark.parametrize("channels_last", [True, False])
def test_addresses_are_wide(channels_last: bool) -> None:
    """Maps of more than 2**31 elements: images far apart, and a pixel far into one."""
    pytest.importorskip("triton")
    from tests.kernels.toy_kernels import corners

    pixels, channels = 2**21 + 3, 2**11
    strides = (channels, 1) if channels_last else (1, pixels)
    out = torch.empty(3, 2, dtype=torch.int64, device="cuda" if torch.cuda.is_available() else "cpu")
    corners[1, 2, 3](out, pixels - 1, pixels, channels, *strides)
    image, block = torch.arange(3)[:, None], torch.arange(2)[None, :]
    wanted = image * pixels * channels + (pixels - 1) * strides[0] + block * 8 * strides[1]
    assert out.tolist() == wanted.tolist()
    assert out.max() > 2**32
