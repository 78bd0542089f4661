"""``masked_cross_entropy`` against torch's cross-entropy on the rows that have a target."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.masked_cross_entropy.api import masked_cross_entropy
from mage_fast.kernels.ops.masked_cross_entropy.specs import Spec
from tests.kernels.suite import (
    OpSuite,
    Target,
    assert_equal,
    cotangent,
    differentiate,
    few,
    results_by_threads,
)


def oracle(logits_NC: Tensor, targets_N: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    valid = targets_N >= 0
    if not valid.any():
        return logits_NC.sum() * 0.0
    return F.cross_entropy(logits_NC[valid], targets_N[valid].long(), label_smoothing=label_smoothing)


class TestMaskedCrossEntropy(OpSuite):
    op = "masked_cross_entropy"
    oracle = staticmethod(oracle)
    #: p = exp(logit - lse): half a unit of an lse of 8 is 4 units of p
    units = 4
    bad = {  # noqa: RUF012
        "logits' rank": (
            {"logits_NC": torch.ones(2, 3, 11)},
            r"logits has shape \(2, 3, 11\), wanted \(\*, \*\)",
        ),
        "no class": ({"logits_NC": torch.ones(6, 0)}, r"logits has shape \(6, 0\), wanted"),
        "integer logits": ({"logits_NC": torch.ones(6, 11).int()}, "logits is int32, wanted float64"),
        "targets' rows": ({"targets_N": torch.zeros(5).long()}, r"targets has shape \(5,\), wanted \(6,\)"),
        "float targets": ({"targets_N": torch.zeros(6)}, "targets is float32, wanted int64 or int32"),
        "label_smoothing over 1": ({"label_smoothing": 1.5}, r"label_smoothing is 1\.5, wanted 0 <= label"),
        "negative label_smoothing": (
            {"label_smoothing": -0.1},
            r"label_smoothing is -0\.1, wanted 0 <= label",
        ),
        "target too large": (
            {"targets_N": torch.tensor([0, 1, 2, 3, 4, 11])},
            "targets holds 11, wanted -1 <= targets < 11",
        ),
        "target too small": (
            {"targets_N": torch.tensor([0, 1, -100, 3, 4, 5])},
            "targets holds -100, wanted -1 <= targets < 11",
        ),
        "device": ({"targets_N": torch.zeros(6, device="meta").long()}, "targets is on meta, wanted cpu"),
    }

    @few
    @given(
        rows=st.integers(0, 9),
        classes=st.integers(1, 40),
        share=st.floats(0, 1),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    )
    @example(rows=0, classes=3, share=0.0, label_smoothing=0.1)
    @example(rows=1, classes=1, share=0.0, label_smoothing=0.1)
    @example(rows=4, classes=5, share=1.0, label_smoothing=0.0)
    def test_shapes(
        self, target: Target, rows: int, classes: int, share: float, label_smoothing: float
    ) -> None:
        spec = Spec("drawn", rows, classes, round(share * rows), label_smoothing)
        inputs = spec.inputs(target.widest, target.device)
        if classes > 1:  # one class: the loss is 0 but for rounding
            self.check(self.function(target), inputs)
        else:
            assert abs(self.function(target)(**inputs).item()) < 1e-12

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_label_smoothing_by_hand(self, target: Target, label_smoothing: float) -> None:
        logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, device=target.device)
        got = self.function(target)(
            logits_NC=logits,
            targets_N=torch.tensor([2], device=target.device),
            label_smoothing=label_smoothing,
        )
        lse = math.log(math.exp(2) + 1 + math.exp(-1))
        wanted = (1 - label_smoothing) * (lse + 1) + label_smoothing * (lse - 1 / 3)
        assert got.item() == pytest.approx(wanted, rel=1e-13)

    @pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
    def test_padding_rows_may_hold_anything(self, target: Target, garbage: float) -> None:
        inputs = Spec("padded", 5, 7, padding=2).inputs(torch.float32, target.device)
        logits = inputs["logits_NC"].detach().clone()
        logits[3:] = garbage
        logits.requires_grad_()
        loss = self.function(target)(**inputs | {"logits_NC": logits})
        assert torch.equal(loss, self.function(target)(**inputs))
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad[3:] == 0).all()
        assert grad[:3].isfinite().all()

    def test_no_target_at_all(self, target: Target) -> None:
        inputs = Spec("padding", 4, 7, padding=4).inputs(torch.float32, target.device)
        loss = self.function(target)(**inputs)
        (grad,) = torch.autograd.grad(loss, inputs["logits_NC"])
        assert loss.item() == 0
        assert (grad == 0).all()

    def test_excluded_class_without_smoothing(self, target: Target) -> None:
        """A logit of -inf is a class that cannot occur."""
        logits = torch.tensor([[0.0, -math.inf, 1.0]], device=target.device, requires_grad=True)
        loss = self.function(target)(
            logits_NC=logits, targets_N=torch.tensor([0], device=target.device), label_smoothing=0.0
        )
        assert loss.item() == pytest.approx(math.log(1 + math.e), rel=1e-6)
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad[0, 1] == 0

    def test_large_logits(self, target: Target) -> None:
        logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], device=target.device, requires_grad=True)
        targets = torch.tensor([0, 0], device=target.device)
        loss = self.function(target)(logits_NC=logits, targets_N=targets, label_smoothing=0.0)
        assert loss.item() == 5e3
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.tolist() == [[0.0, 0.0], [-0.5, 0.5]]

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_dtype_of_loss_and_gradient(self, target: Target, narrow: torch.dtype) -> None:
        inputs = Spec("narrow", 5, 7).inputs(narrow, target.device)
        loss = self.function(target)(**inputs | {"targets_N": inputs["targets_N"].int()})
        (grad,) = torch.autograd.grad(loss, inputs["logits_NC"])
        assert (loss.dtype, grad.dtype) == (torch.float32, narrow)
        assert torch.equal(loss, self.function(target)(**inputs))

    def test_rows_of_a_wider_buffer(self, target: Target) -> None:
        """The codebook's columns of the whole vocabulary's logits: no copy is needed, no neighbour read."""
        inputs = Spec("sliced", 5, 16, padding=1).inputs(target.widest, target.device)
        wide = torch.full((5, 21), math.nan, dtype=target.widest, device=target.device)
        wide[:, :16] = inputs["logits_NC"].detach()
        self.check(self.function(target), inputs | {"logits_NC": wide[:, :16].requires_grad_()})

    def test_float16_at_the_tiles_of_the_real_shapes(self, target: Target) -> None:
        for spec in (Spec("row", 3, 1024, padding=1), Spec("long", 2, 16384 + 9)):
            self.check(self.function(target), spec.inputs(torch.float16, target.device))


def cpp() -> Any:
    module = dispatch._find("masked_cross_entropy", "cpp")
    if isinstance(module, str):
        pytest.skip(module)
    return module


def test_threads_change_nothing_in_cpp() -> None:
    cpp()
    inputs = Spec("threads", 300, 1031, padding=40).inputs()
    call = partial(masked_cross_entropy, implementation="cpp")
    one, *others = results_by_threads(partial(differentiate, call, inputs))
    for other in others:
        assert_equal(other, one)


@pytest.mark.parametrize("first", [-1e30, -200.0, -20.0, 0.0, 20.0, 1e30, -math.inf])
def test_first_logits_far_from_the_largest_in_cpp(first: float) -> None:
    """The first vector's largest logit shifts the exponentials, unless it is far from the largest of all."""
    cpp()
    inputs = Spec("far", 3, 100, label_smoothing=0.0).inputs()
    logits = inputs["logits_NC"].detach()
    logits[:, :16] += first
    inputs |= {"logits_NC": logits.requires_grad_(), "targets_N": torch.tensor([40, 50, 60])}
    got, wanted = (
        differentiate(lambda **x: masked_cross_entropy(**x, implementation=name), inputs)  # noqa: B023
        for name in ("cpp", "reference")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_targets_beyond_the_classes_are_no_address_in_cpp() -> None:
    """The values are not looked at in a compiled graph."""
    module = cpp()
    with pytest.raises(RuntimeError, match="target 11 of 11 classes"):
        module.masked_cross_entropy(torch.zeros(2, 11), torch.tensor([3, 11]), 0.1)


def test_addresses_past_2_to_the_31_elements() -> None:
    """Rows 2**30 elements apart in a buffer of which only the rows are ever touched."""
    module = dispatch._find("masked_cross_entropy", "triton")
    if isinstance(module, str):
        pytest.skip(module)
    if "cpu" not in module.DEVICES:
        pytest.skip("Triton is not interpreted")
    spec = Spec("far", 3, 64)
    near = spec.inputs(torch.float16)
    far = torch.empty_strided((3, 64), (2**30, 1), dtype=torch.float16)
    far.copy_(near["logits_NC"].detach())

    def function(**inputs: Tensor) -> Tensor:
        return masked_cross_entropy(**inputs, implementation="triton")  # type: ignore[arg-type]

    wanted = differentiate(function, near)
    assert_equal(differentiate(function, near | {"logits_NC": far.requires_grad_()}), wanted)
    losses = torch.empty(3)
    module.row_losses(far.detach(), near["targets_N"], 0.1, losses, None)  # gradients in place
    torch.testing.assert_close(
        far.detach().float(),
        3 * wanted["gradient of logits_NC"].float() / cotangent(losses[0], 0),
        rtol=1e-2,
        atol=1e-4,
    )
