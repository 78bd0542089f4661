"""attention against a loop over sequences and against scaled_dot_product_attention."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import dispatch, rng
from mage_fast.kernels.ops.attention import _peers, reference
from mage_fast.kernels.ops.attention.api import attention
from mage_fast.kernels.ops.attention.specs import Spec
from tests.kernels.suite import (
    TOLERANCE,
    OpSuite,
    Target,
    assert_as_good,
    cast,
    cotangent,
    differentiate,
    few,
)


def oracle(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
    rng_state: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """One sequence at a time, in the input's dtype; the keep mask read off the documented layout."""
    total, _, heads, features = qkv_T3HD.shape
    scale = features**-0.5 if softmax_scale is None else softmax_scale
    outputs = [qkv_T3HD[:0, 0]]
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = qkv_T3HD[start:end].permute(1, 2, 0, 3)
        p = torch.softmax(q @ k.transpose(1, 2) * scale, -1)
        if dropout:
            assert rng_state is not None
            keep = rng.keep_mask_attention(rng_state, stream, total * heads, end - start, dropout)
            keep = keep.view(total, heads, end - start)[start:end].transpose(0, 1)
            p = p * keep / (1 - round(dropout * 256) / 256)
        outputs.append((p @ v).transpose(0, 1))
    return torch.cat(outputs)


def _ends(*values: int) -> dict:
    return {"cu_seqlens": torch.tensor(values, dtype=torch.int32)}


class TestAttention(OpSuite):
    op = "attention"
    oracle = staticmethod(oracle)
    bad = {  # noqa: RUF012
        "shape": (
            {"qkv_T3HD": torch.zeros(10, 2, 2, 8)},
            r"qkv has shape \(10, 2, 2, 8\), wanted \(\*, 3, \*, \*\)",
        ),
        "head dimension": (
            {"qkv_T3HD": torch.zeros(10, 3, 2, 20)},
            "head dimension is 20, wanted a multiple of 8",
        ),
        "dtype": ({"qkv_T3HD": torch.zeros(10, 3, 2, 8).long()}, "qkv is int64, wanted float64 or"),
        "cu_seqlens' dtype": ({"cu_seqlens": torch.tensor([0, 5, 10])}, "cu_seqlens is int64, wanted int32"),
        "rows left": (_ends(0, 5, 9), r"runs over \(0, 9\), wanted from 0 to the 10 rows"),
        "late start": (_ends(1, 5, 10), r"runs over \(1, 10\), wanted from 0 to the 10 rows"),
        "no sequence": (_ends(), r"runs over \(\), wanted from 0 to the 10 rows"),
        "falling": (_ends(0, 11, 10), "cu_seqlens falls by 1, wanted it not to decrease"),
        "longest": ({"max_seqlen": 4}, "max_seqlen is 4, wanted at least the longest sequence, 5"),
        "dropout": ({"dropout": 1.0}, r"dropout is 1\.0, wanted 0 <= dropout < 1"),
        "no state": ({"rng_state": None}, "dropout is 0.1 but rng_state is None"),
        "state's dtype": ({"rng_state": torch.zeros(2)}, "rng_state is float32, wanted int64"),
        "device": (
            {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
            "cu_seqlens is on meta, wanted cpu",
        ),
    }

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """The suite's rule; float32 gradients of kernels as if they were of the size of the terms that cancel
        in them: sums over features of grad v and of grad out. Kernels rebuild probabilities from the
        logarithm of their total, whose own rounding is that of a number of about this size.
        """
        dtype = inputs["qkv_T3HD"].dtype
        floor = 16.0 if self.rebuilds and dtype == torch.float32 else 0.0
        results = (
            differentiate(function, inputs, layout),
            differentiate(self.oracle, cast(inputs, dtype), layout),
            differentiate(self.oracle, cast(inputs, torch.float64), layout),
        )
        outputs, gradients = (
            [{k: x for k, x in r.items() if k.startswith(kind)} for r in results] for kind in ("out", "grad")
        )
        # a kernel scales its running sums anew at each tile of keys
        assert_as_good(*outputs, TOLERANCE[dtype] * (2 if self.rebuilds else 1))
        assert_as_good(*gradients, TOLERANCE[dtype], floor)

    rebuilds = True

    def function(self, target: Target) -> Callable:
        self.rebuilds = target.implementation != "reference"
        return super().function(target)

    @few
    @given(
        lengths=st.lists(st.integers(0, 9), max_size=4),
        heads=st.integers(1, 3),
        features=st.sampled_from([8, 24, 48]),
        dropout=st.sampled_from([0.0, 0.1, 0.5]),
        spare=st.integers(0, 3),
    )
    @example(lengths=[], heads=1, features=8, dropout=0.1, spare=0)
    @example(lengths=[0, 0], heads=2, features=8, dropout=0.1, spare=0)
    @example(lengths=[0, 0], heads=2, features=8, dropout=0.1, spare=2)
    @example(lengths=[1], heads=1, features=8, dropout=0.5, spare=0)
    def test_shapes(
        self, target: Target, lengths: list[int], heads: int, features: int, dropout: float, spare: int
    ) -> None:
        """Empty sequences, none at all, and a max_seqlen over the longest."""
        inputs = Spec("drawn", tuple(lengths), heads, features, dropout).inputs(target.widest, target.device)
        self.check(self.function(target), inputs | {"max_seqlen": inputs["max_seqlen"] + spare})

    def test_real_shapes_in_half(self, target: Target, spec: Spec) -> None:
        """Half precision has kernels of its own for short sequences."""
        if target.implementation == "reference":
            pytest.skip("the reference computes in float32")
        dtype = torch.bfloat16 if target.implementation == "cpp" else torch.float16
        self.check(self.function(target), spec.inputs(dtype, target.device))

    def test_softmax_scale(self, target: Target) -> None:
        inputs = Spec("scaled", (4, 3), 2, 8).inputs(target.widest, target.device)
        self.check(self.function(target), inputs | {"softmax_scale": 0.7})

    def test_sequences_do_not_meet(self, target: Target) -> None:
        """Scores across sequences would overflow; they must reach neither values nor gradients: each
        sequence comes out as by itself.
        """
        inputs = Spec("apart", (3, 1, 6), 1, 8, 0.0).inputs(torch.float32, target.device)
        qkv = inputs["qkv_T3HD"].detach()
        qkv[:3, 1] *= 1e-3  # small keys in the first sequence, great queries and keys in the last
        qkv[:3, 0] *= 200
        qkv[3:, :2] *= 40
        function = self.function(target)
        packed = differentiate(function, inputs | {"qkv_T3HD": qkv.requires_grad_()})
        for start, end in pairwise(inputs["cu_seqlens"].tolist()):
            alone = qkv.detach()[start:end].requires_grad_()
            ends = torch.tensor([0, end - start], dtype=torch.int32, device=target.device)
            outputs = function(**inputs | {"qkv_T3HD": alone, "cu_seqlens": ends})
            (grad,) = torch.autograd.grad(outputs, alone, cotangent(packed["output 0"], 0)[start:end])
            torch.testing.assert_close(packed["output 0"][start:end], outputs.detach())
            torch.testing.assert_close(packed["gradient of qkv_T3HD"][start:end], grad)

    @pytest.mark.parametrize(
        ("lengths", "half"),
        [((1, 257, 0, 17, 130), False), ((1, 257, 0, 17, 130), True), ((1, 129, 0, 66), True)],
    )
    def test_packed_is_the_loop_over_samples(
        self, target: Target, lengths: tuple[int, ...], half: bool
    ) -> None:
        """Lengths from 1 to 257 in one call, values and gradients."""
        dtype = torch.float16 if half else torch.float32
        inputs = Spec("mixed", lengths, 1, 48, 0.0).inputs(dtype, target.device)
        packed = differentiate(self.function(target), inputs)
        pieces = []
        for start, end in pairwise(inputs["cu_seqlens"].tolist()):
            qkv = inputs["qkv_T3HD"].detach()[start:end].requires_grad_()
            out = self.function(target)(
                qkv_T3HD=qkv,
                cu_seqlens=inputs["cu_seqlens"].new_tensor((0, end - start)),
                max_seqlen=end - start,
            )
            grad = cotangent(packed["output 0"], 0)[start:end]
            pieces.append((out.detach(), *torch.autograd.grad(out, qkv, grad)))
        for got, wanted in zip(packed.values(), map(torch.cat, zip(*pieces, strict=True)), strict=True):
            tolerance = {"rtol": 2e-3, "atol": 4e-3} if half else {"rtol": 1e-5, "atol": 5e-6}
            torch.testing.assert_close(got, wanted, **tolerance)

    def test_strided_rows(self, target: Target) -> None:
        """Rows of a larger buffer are read in place."""
        inputs = Spec("strided", (5, 9), 2, 16).inputs(torch.float32, target.device)
        buffer = torch.full((14, 5, 3, 16), torch.nan, device=target.device)
        buffer[:, 1:4, :2] = inputs["qkv_T3HD"].detach()
        self.check(self.function(target), inputs | {"qkv_T3HD": buffer[:, 1:4, :2].requires_grad_()})

    @pytest.mark.parametrize(
        ("length", "floating"),
        [(100, torch.float16), (130, torch.float16), (130, torch.float32), (130, torch.bfloat16)],
    )
    def test_dropout_bits(self, target: Target, length: int, floating: torch.dtype) -> None:
        """Equal scores and one-hot values: the output shows which probabilities were kept, exactly."""
        inputs = Spec("bits", (3, length), 2, 64, 0.3).inputs(floating, target.device)
        total = 3 + length
        mask = rng.keep_mask_attention(inputs["rng_state"], inputs["stream"], total * 2, length, 0.3)
        for first in range(0, length, 64):
            qkv = torch.zeros(total, 3, 2, 64, dtype=floating, device=target.device)
            some = min(64, length - first)
            qkv[3 + first : 3 + first + some, 2] = torch.eye(64, dtype=floating, device=target.device)[
                :some, None
            ]
            out = self.function(target)(**inputs | {"qkv_T3HD": qkv})[3:, :, :some]
            assert torch.equal(out != 0, mask.view(total, 2, length)[3:, :, first : first + some])


class TestTritonKernels:
    """What only the interpreter shows."""

    @pytest.fixture(autouse=True)
    def interpreter(self) -> None:
        pytest.importorskip("triton")
        from mage_fast.kernels import triton_support

        if not triton_support.INTERPRETED:
            pytest.skip("kernels are compiled here")

    @staticmethod
    def dots(lengths: tuple[int, ...], max_seqlen: int) -> tuple[int, int]:
        """Matrix products of the forward and of the backward."""
        from benchmarks.traffic import counted

        inputs = Spec("work", lengths, 1, 16, 0.0).inputs(torch.float16) | {"max_seqlen": max_seqlen}
        with counted() as forward:
            out = attention(**inputs, implementation="triton")
        with counted() as backward:
            out.sum().backward()
        return forward.products, backward.products

    def test_work_is_the_sum_over_sequences(self) -> None:
        """A sequence of n has ceil((n - 1) / 64) tiles of keys, in long kernels as many of queries: two
        products a pair of tiles forward and, with recomputation in two kernels, 3 + 4 backward.
        """
        lengths = (1, 17, 0, 65, 129, 2)
        tiles = [-(-max(n - 1, 0) // 64) for n in lengths]
        assert self.dots(lengths, 129) == (2 * sum(tiles), 5 * sum(tiles))
        lengths = (1, 258, 66)
        pairs = sum((-(-(n - 1) // 64)) ** 2 for n in lengths)
        assert self.dots(lengths, 258) == (2 * pairs, 7 * pairs)

    @pytest.mark.parametrize("length", [66, 130])
    def test_addresses_past_two_to_the_31(self, length: int) -> None:
        """Rows far apart: most of the buffer is memory that nobody touches."""
        inputs = Spec("far", (length,), 1, 16, 0.0).inputs(torch.float16)
        stride = 2**31 // (length - 2) // 8 * 8
        assert stride * (length - 1) > 2**31
        buffer = torch.empty((length - 1) * stride + 48, dtype=torch.float16)
        far = buffer.as_strided((length, 3, 1, 16), (stride, 16, 16, 1))
        far.copy_(inputs["qkv_T3HD"].detach())
        arguments = {"cu_seqlens": inputs["cu_seqlens"], "max_seqlen": length, "implementation": "triton"}
        near = inputs["qkv_T3HD"]
        wanted = attention(near, **arguments)
        far.requires_grad_()
        got = attention(far, **arguments)
        assert torch.equal(got, wanted)
        op = torch.ops.mage_fast.attention_backward
        lse = torch.zeros(length, 1)
        common = (inputs["cu_seqlens"], length, 0.25, 0.0, None, 0, "triton")
        assert torch.equal(
            op(torch.ones_like(wanted), far.detach(), wanted.detach(), lse, *common),
            op(torch.ones_like(wanted), near.detach(), wanted.detach(), lse, *common),
        )


def _plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, D]`` and log-sum-exp ``[H, T]``."""
    outputs, totals = [], []
    for q_L, k_L, v_L in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True):
        s = q_L @ k_L.transpose(1, 2) * scale
        outputs.append((s.softmax(-1) @ v_L).transpose(0, 1))
        totals.append(s.logsumexp(-1))
    return torch.cat(outputs), torch.cat(totals, 1)


def _stub(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def _flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for flash_attn 2.7: the documented arguments, computed by plain PyTorch."""

    def forward(
        qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False, window_size: tuple = (-1, -1),
        softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert qkv.shape[1:2] == (3,)
        assert cu_seqlens.dtype == torch.int32
        out, lse = _plain(*qkv.unbind(1), cu_seqlens.diff().tolist(), softmax_scale)
        return (out, lse.float(), None) if return_attn_probs else out

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Any, deterministic: bool, rng_state: Any = None,
    ) -> Tensor:  # fmt: skip
        assert softmax_lse.shape == (q.shape[1], q.shape[0])
        assert softmax_lse.is_contiguous()
        function = partial(_plain, lengths=cu_seqlens_q.diff().tolist(), scale=softmax_scale)
        _, pull = torch.func.vjp(lambda *qkv: function(*qkv)[0], q, k, v)
        for target, grad in zip((dq, dk, dv), pull(dout), strict=True):
            target.copy_(grad)
        return softmax_lse

    _stub(monkeypatch, "flash_attn", flash_attn_varlen_qkvpacked_func=forward)
    _stub(monkeypatch, "flash_attn.flash_attn_interface", _flash_attn_varlen_backward=backward)


def _xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for xformers.ops.fmha."""
    mask = SimpleNamespace(from_seqlens=lambda lengths: list(lengths))

    def forward(query: Tensor, key: Tensor, value: Tensor, attn_bias: list, p: float, scale: float) -> Any:
        assert query.shape[0] == 1
        assert query.dim() == 4
        assert p == 0.0
        out, lse = _plain(query[0], key[0], value[0], attn_bias, scale)
        return out[None], lse.float()[None]

    def backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
        attn_bias: list, p: float, scale: float,
    ) -> Any:  # fmt: skip
        assert lse.shape == (1, query.shape[2], query.shape[1])
        _, pull = torch.func.vjp(lambda *x: forward(*x, attn_bias, p, scale)[0], query, key, value)
        return pull(grad)

    fmha = SimpleNamespace(
        BlockDiagonalMask=mask,
        memory_efficient_attention=lambda *args, **kwargs: forward(*args, **kwargs)[0],
        memory_efficient_attention_forward_requires_grad=forward,
        memory_efficient_attention_backward=backward,
    )
    _stub(monkeypatch, "xformers")
    _stub(monkeypatch, "xformers.ops", fmha=fmha)


@pytest.mark.parametrize("package", [_flash_attn, _xformers], ids=lambda f: f.__name__.lstrip("_"))
def test_calls_of_other_packages(package: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arguments and results, by stand-ins with the documented signatures."""
    package(monkeypatch)
    name = package.__name__.lstrip("_")
    module = f"mage_fast.kernels.ops.attention.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    ours = importlib.import_module(module)
    sys.modules.pop(module)  # not by monkeypatch, which would put it back
    inputs = Spec("varying", (3, 1, 6), 2, 8, 0.0).inputs(torch.bfloat16)
    qkv, cu_seqlens = inputs["qkv_T3HD"].detach(), inputs["cu_seqlens"]
    arguments = (cu_seqlens, 6, 0.3, 0.0, None, 0)
    out, lse = ours.attention(qkv, *arguments)
    wanted_out, wanted_lse = reference.attention(qkv, *arguments)
    torch.testing.assert_close((out, lse), (wanted_out, wanted_lse), rtol=0.02, atol=0.02)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    grad = cotangent(out, 0)
    got = ours.attention_backward(grad, qkv, out, lse, *arguments)
    torch.testing.assert_close(
        got, reference.attention_backward(grad, qkv, out, lse, *arguments), rtol=0.02, atol=0.04
    )
    assert got.is_contiguous()
    torch.testing.assert_close(getattr(_peers, name)(qkv, cu_seqlens, 6, 0.3, 0.0), out)
    assert "other bits" in ours.unsupported("attention", qkv, cu_seqlens, 6, 0.3, 0.1, None, 0)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_absent_package(name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    assert dispatch._find("attention", name) == f"the package {name} is not installed"


def test_equals_sdpa_without_dropout() -> None:
    arguments = Spec("even", (17, 17), 3, 16, 0.0).inputs(torch.float32)
    q, k, v = arguments["qkv_T3HD"].view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(34, 3, 16)
    torch.testing.assert_close(attention(**arguments), wanted, rtol=1e-5, atol=1e-6)
