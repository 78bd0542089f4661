"""attention against a loop over sequences and against scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.attention.api import attention
from mage_fast.kernels.ops.attention.specs import Spec
from tests.kernels.suite import TOLERANCE, OpSuite, Target, assert_as_good, cast, differentiate, few


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
        "device": (
            {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
            "cu_seqlens is on meta, wanted cpu",
        ),
    }

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """The suite's rule; gradients in float32 as if they were of the size of the terms that cancel in
        them. Those are sums over features of grad v and of grad out, and kernels recompute probabilities
        from a logarithm of their total that is itself rounded.
        """
        dtype = inputs["qkv_T3HD"].dtype
        results = (
            differentiate(function, inputs, layout),
            differentiate(self.oracle, cast(inputs, dtype), layout),
            differentiate(self.oracle, cast(inputs, torch.float64), layout),
        )
        outputs, gradients = (
            [{k: x for k, x in r.items() if k.startswith(kind)} for r in results] for kind in ("out", "grad")
        )
        assert_as_good(*outputs, TOLERANCE[dtype])
        assert_as_good(*gradients, TOLERANCE[dtype], 16.0 if dtype == torch.float32 else 0.0)

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

    def test_softmax_scale(self, target: Target) -> None:
        inputs = Spec("scaled", (4, 3), 2, 8).inputs(target.widest, target.device)
        self.check(self.function(target), inputs | {"softmax_scale": 0.7})

    def test_sequences_do_not_meet(self, target: Target) -> None:
        """Scores across sequences would overflow; they must reach neither values nor gradients."""
        inputs = Spec("apart", (3, 1, 6), 1, 8, 0.0).inputs(torch.float32, target.device)
        qkv = inputs["qkv_T3HD"].detach()
        qkv[:3, 1] *= 1e-3  # small keys in the first sequence, great queries and keys in the last
        qkv[:3, 0] *= 200
        qkv[3:, :2] *= 40
        inputs["qkv_T3HD"] = qkv.requires_grad_()
        self.check(self.function(target), inputs)


def test_equals_sdpa_without_dropout() -> None:
    arguments = Spec("even", (17, 17), 3, 16, 0.0).inputs(torch.float32)
    q, k, v = arguments["qkv_T3HD"].view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(34, 3, 16)
    torch.testing.assert_close(attention(**arguments), wanted, rtol=1e-5, atol=1e-6)
