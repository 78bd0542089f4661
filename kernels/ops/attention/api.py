"""``attention``: self-attention within the sequences of a packed batch.

Shape suffixes: T packed rows, H heads, D head features, B sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library

MAX_HEAD_FEATURES = 256


def attention(
    qkv_T3HD: Float[Tensor, "T 3 H D"],
    cu_seqlens: Int32[Tensor, "B+1"],
    *,
    max_seqlen: int,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
    rng_state: Int64[Tensor, "2"] | None = None,
    stream: int = 0,
    implementation: str = "auto",
) -> Float[Tensor, "T H D"]:
    """Softmax attention, not causal, each sequence attending to itself.

    Equivalent PyTorch, for each sequence's rows ``q, k, v`` as ``[H, length, D]``::

        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=softmax_scale)

    Args:
        qkv_T3HD: packed queries, keys and values, as one linear layer returns them.
        cu_seqlens: int32, rows of sequence b are ``cu_seqlens[b] : cu_seqlens[b + 1]``.
        max_seqlen: length of the longest sequence, known on the host.
        softmax_scale: factor of the scores; ``D ** -0.5`` by default.
        dropout: drop probability of attention probabilities, realised as a multiple of 2**-8; the scale
            uses the realised value.
        rng_state: int64 ``(seed, step)``; wanted when ``dropout > 0``.
        stream: random stream of this call.
        implementation: ``"auto"`` or the name of one.

    Returns:
        ``[T, H, D]`` in the input's dtype; softmax and sums accumulate in float32 (float64 for float64).

    Raises:
        ValueError: another shape, D not a multiple of 8 or over 256, or (read on the CPU or in
            ``device_values``) cu_seqlens that do not rise from 0 to T or a sequence longer than
            ``max_seqlen``.
        Unsupported: the forced implementation cannot run here.

    Source: transformer blocks of MAGE section 3.1; dropout as the published release trains.
    """
    check.floating("attention", "qkv", qkv_T3HD)
    check.shape("attention", "qkv", qkv_T3HD, (None, 3, None, None))
    check.shape("attention", "cu_seqlens", cu_seqlens, (None,))
    check.dtype("attention", "cu_seqlens", cu_seqlens, (torch.int32,))
    check.dropout("attention", dropout, rng_state)
    check.same_device("attention", qkv_T3HD, cu_seqlens=cu_seqlens, rng_state=rng_state)
    total, _, _, features = qkv_T3HD.shape
    if features % 8 or not 0 < features <= MAX_HEAD_FEATURES:
        raise ValueError(
            f"attention: head dimension is {features}, wanted a multiple of 8 up to {MAX_HEAD_FEATURES}"
        )
    if check.readable(cu_seqlens):
        _check_sequences(cu_seqlens, total, max_seqlen)
    if softmax_scale is None:
        softmax_scale = features**-0.5
    out_THD, _ = _attention(
        qkv_T3HD, cu_seqlens, max_seqlen, softmax_scale, dropout, rng_state, stream,
        dispatch.requested("attention", implementation),
    )  # fmt: skip
    return out_THD


def _check_sequences(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    starts = cu_seqlens.tolist()
    ends = (starts[0], starts[-1]) if starts else ()
    if ends != (0, total):
        raise ValueError(f"attention: cu_seqlens runs over {ends}, wanted from 0 to the {total} rows of qkv")
    lengths = [end - start for start, end in pairwise(starts)]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest < 0:
        raise ValueError(f"attention: cu_seqlens falls by {-shortest}, wanted it not to decrease")
    if longest > max_seqlen:
        raise ValueError(
            f"attention: max_seqlen is {max_seqlen}, wanted at least the longest sequence, {longest}"
        )


def _fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    total, _three, heads, features = qkv.shape
    statistic = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty((total, heads, features)), qkv.new_empty((total, heads), dtype=statistic)


def _fake_backward(grad: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_seqlens, *ctx.numbers, rng_state, ctx.stream, ctx.implementation = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, rng_state)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    qkv, out, lse, cu_seqlens, rng_state = ctx.saved_tensors
    grad_qkv = _attention_backward(
        grad, qkv, out, lse, cu_seqlens, *ctx.numbers, rng_state, ctx.stream, ctx.implementation
    )
    return (grad_qkv, *[None] * 7)


_attention = library.define(
    "attention(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, float dropout, "
    "Tensor? rng_state, SymInt stream, str implementation) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_attention_backward = library.define(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "SymInt max_seqlen, float softmax_scale, float dropout, Tensor? rng_state, SymInt stream, "
    "str implementation) -> Tensor",
    fake=_fake_backward,
)
