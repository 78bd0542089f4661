"""attention against scaled_dot_product_attention sequence by sequence."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.attention.api import attention
from mage_fast.kernels.ops.attention.specs import SPECS, Spec

SMALL = [spec for spec in SPECS if sum(spec.lengths) < 64]


def oracle(qkv: Tensor, cu_seqlens: Tensor, dropout: float, state: Tensor | None, stream: int) -> Tensor:
    """One sequence at a time, in the input's dtype; the keep mask read off the documented layout."""
    total, _, heads, features = qkv.shape
    bounds = cu_seqlens.tolist()
    outputs = []
    for start, end in pairwise(bounds):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        p = torch.softmax(q @ k.transpose(1, 2) * features**-0.5, -1)
        if dropout:
            assert state is not None
            keep = rng.keep_mask_attention(state, stream, total * heads, end - start, dropout)
            keep = keep.view(total, heads, end - start)[start:end].transpose(0, 1)
            p = p * keep / (1 - round(dropout * 256) / 256)
        outputs.append((p @ v).transpose(0, 1))
    return torch.cat(outputs)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
)
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_equal_a_loop_over_sequences(
    lengths: list[int], heads: int, dropout: float
) -> None:
    arguments = Spec("drawn", tuple(lengths), heads, 8, dropout).inputs(torch.float64)
    qkv, state, stream = (arguments[name] for name in ("qkv_T3HD", "rng_state", "stream"))
    out = attention(**arguments)
    wanted = oracle(qkv, arguments["cu_seqlens"], dropout, state, stream)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, grad)[0],
        torch.autograd.grad(wanted, qkv, grad)[0],
        rtol=1e-11,
        atol=1e-11,
    )


def test_equals_sdpa_without_dropout() -> None:
    arguments = Spec("even", (17, 17), 3, 16, 0.0).inputs(torch.float32)
    q, k, v = arguments["qkv_T3HD"].view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(34, 3, 16)
    torch.testing.assert_close(attention(**arguments), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    arguments = Spec("even", (33, 20), 2, 32, 0.1).inputs(dtype)
    qkv, rest = (
        arguments["qkv_T3HD"],
        (arguments["cu_seqlens"], 0.1, arguments["rng_state"], arguments["stream"]),
    )
    exact = oracle(qkv.detach().double(), *rest)
    plain = (oracle(qkv.detach(), *rest).double() - exact).abs().max()
    ours = (attention(**arguments).double() - exact).abs().max()
    assert ours <= plain + 2e-6 + 2 * torch.finfo(dtype).eps


def test_a_non_contiguous_view_and_gradient() -> None:
    base = torch.randn(2, 3, 6, 4, 8, dtype=torch.float64)  # head-major storage, as some models keep it
    qkv = (
        base.permute(0, 2, 1, 3, 4)
        .flatten(0, 1)[..., :8]
        .clone()
        .transpose(0, 1)
        .contiguous()
        .transpose(0, 1)
    )
    assert not qkv.is_contiguous()
    qkv.requires_grad_()
    cu_seqlens = torch.tensor([0, 6, 12], dtype=torch.int32)
    out = attention(qkv, cu_seqlens, max_seqlen=6)
    wanted = oracle(qkv, cu_seqlens, 0.0, None, 0)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(8, 4, 12, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, grad)[0], torch.autograd.grad(wanted, qkv, grad)[0]
    )


def test_no_rows() -> None:
    qkv = torch.zeros(0, 3, 2, 8, requires_grad=True)
    out = attention(qkv, torch.zeros(1, dtype=torch.int32), max_seqlen=0)
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert qkv.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_T3HD": torch.zeros(8, 2, 2, 8)}, r"qkv has shape \(8, 2, 2, 8\), wanted \(\*, 3, \*, \*\)"),
        ({"qkv_T3HD": torch.zeros(8, 3, 2, 20)}, "head dimension is 20, wanted a multiple of 8"),
        ({"qkv_T3HD": torch.zeros(8, 3, 2, 8, dtype=torch.int64)}, "qkv is int64"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens is int64, wanted int32"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32)},
            r"runs over \(0, 7\), wanted from 0 to the 8",
        ),
        ({"cu_seqlens": torch.tensor([0, 9, 8], dtype=torch.int32)}, "falls by 1"),
        ({"max_seqlen": 3}, "max_seqlen is 3, wanted at least the longest sequence, 4"),
        ({"dropout": 1.0}, "dropout is 1.0, wanted 0 <= dropout < 1"),
        ({"dropout": 0.1}, "rng_state is None"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "qkv_T3HD": torch.zeros(8, 3, 2, 8),
        "cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32),
        "max_seqlen": 4,
    }
    with pytest.raises(ValueError, match=message):
        attention(**(arguments | change))
