"""``linear_cross_entropy`` against torch's linear layer and cross-entropy on the rows that have a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.linear_cross_entropy.api import linear_cross_entropy
from mage_fast.kernels.ops.linear_cross_entropy.specs import Spec
from tests.kernels.suite import (
    TOLERANCE,
    OpSuite,
    Target,
    assert_as_good,
    assert_equal,
    cast,
    differentiate,
    few,
    tensors,
)


def oracle(
    hidden_ND: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    targets_N: Tensor,
    *,
    label_smoothing: float = 0.1,
) -> Tensor:
    valid = targets_N >= 0
    if not valid.any():
        return F.linear(hidden_ND, weight_CD, bias_C).sum() * 0.0
    logits_NC = F.linear(hidden_ND[valid], weight_CD, bias_C)
    return F.cross_entropy(logits_NC, targets_N[valid].long(), label_smoothing=label_smoothing)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor of a floating dtype that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = func.is_view or (kwargs or {}).get("out") is not None
        for x in [] if views else tensors(result if isinstance(result, (tuple, list)) else [result]):
            self.elements = max(self.elements, x.numel() * x.is_floating_point())
        return result


@pytest.fixture
def triton_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton implementation with chunks of 4 rows of 11 float32 logits."""
    module = dispatch._find("linear_cross_entropy", "triton")
    if isinstance(module, str):
        pytest.skip(module)
    if "cpu" not in module.DEVICES:
        pytest.skip("Triton is not interpreted")
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 11 * 4)
    return module


class TestLinearCrossEntropy(OpSuite):
    op = "linear_cross_entropy"
    oracle = staticmethod(oracle)
    #: as for masked_cross_entropy
    units = 4
    bad = {  # noqa: RUF012
        "hidden's rank": ({"hidden_ND": torch.ones(8)}, r"hidden has shape \(8,\), wanted \(\*, \*\)"),
        "integer hidden": ({"hidden_ND": torch.ones(6, 8).int()}, "hidden is int32, wanted float64"),
        "weight's features": (
            {"weight_CD": torch.ones(11, 7)},
            r"weight has shape \(11, 7\), wanted \(\*, 8\)",
        ),
        "weight's dtype": ({"weight_CD": torch.ones(11, 8).half()}, "weight is float16, wanted float32"),
        "no class": ({"weight_CD": torch.ones(0, 8)}, r"weight has shape \(0, 8\), wanted at least 1 class"),
        "bias's classes": ({"bias_C": torch.ones(10)}, r"bias has shape \(10,\), wanted \(11,\)"),
        "integer bias": ({"bias_C": torch.ones(11).int()}, "bias is int32, wanted float64"),
        "targets' rows": ({"targets_N": torch.zeros(5).long()}, r"targets has shape \(5,\), wanted \(6,\)"),
        "float targets": ({"targets_N": torch.zeros(6)}, "targets is float32, wanted int64 or int32"),
        "label_smoothing": ({"label_smoothing": 1.5}, r"label_smoothing is 1\.5, wanted 0 <= label"),
        "target too large": (
            {"targets_N": torch.tensor([0, 1, 2, 3, 4, 11])},
            "targets holds 11, wanted -1 <= targets < 11",
        ),
        "device": ({"weight_CD": torch.zeros(11, 8, device="meta")}, "weight is on meta, wanted cpu"),
    }

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """As the suite's, with twice the plain error: the loss and the gradients end in sums of
        products over classes or rows, whose rounding depends on their order, which is the library's.
        """
        dtype = inputs["hidden_ND"].dtype
        actual = differentiate(function, inputs, layout)
        plain = differentiate(self.oracle, cast(inputs, dtype), layout)
        wanted = differentiate(self.oracle, cast(inputs, torch.float64), layout)
        doubled = {name: x + 2 * (plain[name].double() - x) for name, x in wanted.items()}
        assert_as_good(actual, doubled, wanted, self.units * TOLERANCE[dtype])

    @few
    @given(
        rows=st.integers(0, 9),
        features=st.integers(1, 20),
        classes=st.integers(2, 40),
        share=st.floats(0, 1),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        weight_learns=st.booleans(),
    )
    @example(rows=0, features=3, classes=2, share=0.0, label_smoothing=0.1, weight_learns=True)
    @example(rows=4, features=1, classes=5, share=1.0, label_smoothing=0.0, weight_learns=True)
    def test_shapes(self, target: Target, share: float, rows: int, **drawn: Any) -> None:
        spec = Spec("drawn", rows, padding=round(share * rows), **drawn)
        self.check(self.function(target), spec.inputs(target.widest, target.device))

    def test_autocast_changes_nothing(self, target: Target, tiny: Any) -> None:
        """But the dtype of the products, as for ``F.linear``; the gradients keep the inputs' dtypes."""
        narrow = torch.float16 if target.interpreted else torch.bfloat16
        inputs = tiny.inputs(torch.float32, target.device)
        narrowed = {
            name: x.detach().to(narrow).requires_grad_(x.requires_grad)
            for name, x in inputs.items()
            if name in ("hidden_ND", "weight_CD")
        }
        wanted = differentiate(self.function(target), inputs | narrowed)
        with torch.autocast(target.device, narrow):
            got = differentiate(self.function(target), inputs)
        assert all(x.dtype == torch.float32 for x in got.values())
        assert_equal(got, {name: x.float() for name, x in wanted.items()})

    def test_without_bias(self, target: Target) -> None:
        inputs = Spec("bare", 5, 6, 9, weight_learns=True).inputs(target.widest, target.device)
        self.check(self.function(target), inputs | {"bias_C": None})

    def test_float32_bias_of_narrow_products(self, target: Target) -> None:
        """Parameters keep float32 under autocast."""
        inputs = Spec("mixed", 5, 6, 9).inputs(torch.float16, target.device)
        inputs["bias_C"] = inputs["bias_C"].detach().float().requires_grad_()
        loss = self.function(target)(**inputs)
        grads = torch.autograd.grad(loss, [inputs["hidden_ND"], inputs["bias_C"]])
        assert [x.dtype for x in (loss, *grads)] == [torch.float32, torch.float16, torch.float32]

    def test_losses_alone(self, target: Target) -> None:
        """Without gradient, by mode or because nothing wants one, the loss is the same."""
        inputs = Spec("loss", 7, 6, 9, padding=2).inputs(torch.float32, target.device)
        wanted = self.function(target)(**inputs)
        assert wanted.requires_grad
        with torch.no_grad():
            assert torch.equal(self.function(target)(**inputs), wanted)
        plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        loss = self.function(target)(**plain)
        assert torch.equal(loss, wanted)
        assert not loss.requires_grad

    @pytest.mark.parametrize("garbage", [math.nan, math.inf])
    def test_padding_rows_may_hold_anything(self, target: Target, garbage: float) -> None:
        inputs = Spec("padded", 5, 6, 7, padding=2).inputs(torch.float32, target.device)
        hidden = inputs["hidden_ND"].detach().clone()
        hidden[3:] = garbage
        wanted = differentiate(self.function(target), inputs)
        got = differentiate(self.function(target), inputs | {"hidden_ND": hidden.requires_grad_()})
        assert_equal(got, wanted)

    def test_small_gradients_survive_a_loss_scale_in_float16(self, target: Target) -> None:
        """A mean over many rows: each row's gradient times 1/N lies below float16, the scaled loss's not."""
        rows, scale = 4096, 65536.0
        inputs = Spec("scaled", 64 if target.interpreted else rows, 8, 16).inputs(
            torch.float32, target.device
        )
        hidden = 1e-3 * inputs["hidden_ND"].detach()
        weight = 1e-3 * inputs["weight_CD"]
        results = []
        for dtype in (torch.float32, torch.float16):
            x = hidden.to(dtype).requires_grad_()
            loss = self.function(target)(**inputs | {"hidden_ND": x, "weight_CD": weight.to(dtype)})
            (grad,) = torch.autograd.grad(scale / rows * loss, x)
            results.append(grad.float())
        torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2 * results[0].abs().max())


@pytest.mark.parametrize("weight_learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_give_the_gradients_of_the_whole(
    triton_module: Any, weight_learns: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Spec("chunks", 9, 2, 11, 2, weight_learns=weight_learns).inputs(dtype)
    whole = differentiate(lambda **x: linear_cross_entropy(**x, implementation="reference"), inputs)
    chunks = differentiate(lambda **x: linear_cross_entropy(**x, implementation="triton"), inputs)
    torch.testing.assert_close(chunks, whole)


def test_no_more_logits_than_a_chunk(triton_module: Any) -> None:
    inputs = Spec("memory", 40, 2, 11).inputs()
    arguments = (inputs["hidden_ND"], inputs["weight_CD"], inputs["bias_C"], inputs["targets_N"], 0.1)
    for wanted in ((True, False, True), (False, False, False)):
        with _Largest() as largest, torch.no_grad():
            triton_module.linear_cross_entropy(*arguments, *wanted)
        assert largest.elements <= max(4 * 11, 40 * 2)
        assert triton_module.chunk_rows(40, 11, 2, 4, with_weight_gradient=False) == 4


def test_chunks_are_bounded_and_even() -> None:
    module = dispatch._find("linear_cross_entropy", "triton")
    if isinstance(module, str):
        pytest.skip(module)
    # the head of a batch of 128 images: 32 MiB are 16,384 rows of bfloat16
    assert module.chunk_rows(128 * 178, 1024, 768, 2, False) == 11392
    assert module.chunk_rows(4, 1024, 768, 2, False) == 128
    assert module.chunk_rows(8192, 65536, 1024, 2, False) == 256
    # its weight's gradient holds 256 MiB of float32: so may the logits
    assert module.chunk_rows(8192, 65536, 1024, 2, True) == 2048
    assert module.chunk_rows(100, 2**27, 1, 2, False) == 1
    assert module.chunk_rows(0, 1024, 768, 2, False) == 0
