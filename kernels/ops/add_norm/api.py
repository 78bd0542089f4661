"""``add_norm``: dropout, residual addition and LayerNorm in one pass.

Shape suffixes: T rows (packed tokens), D features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def add_norm(
    branch_TD: Float[Tensor, "*rows D"],
    residual_TD: Float[Tensor, "*rows D"],
    weight_D: Float[Tensor, " D"],
    bias_D: Float[Tensor, " D"],
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
    rng_state: Int64[Tensor, " 2"] | None = None,
    stream: int = 0,
    implementation: str = "auto",
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]]:
    """Add a dropped-out branch to the residual stream and normalise the sum.

    Equivalent PyTorch::

        out = residual + F.dropout(branch, dropout)
        normed = F.layer_norm(out, (D,), weight, bias, eps)

    Args:
        branch_TD: output of attention or MLP; float64, float32, bfloat16 or float16.
        residual_TD: the residual stream; its dtype may be wider than the branch's.
        weight_D: LayerNorm scale.
        bias_D: LayerNorm shift, in the scale's dtype.
        eps: added to the variance.
        dropout: drop probability, realised as a multiple of 2**-16; the scale uses the realised value.
        rng_state: int64 ``(seed, step)``; wanted when ``dropout > 0``.
        stream: random stream of this call, see :func:`mage_fast.kernels.rng.stream`.
        implementation: ``"auto"`` or the name of one.

    Returns:
        ``(out, normed)``: the sum in the residual's dtype, the normalised rows in the branch's dtype.
        Sum and statistics accumulate in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, a dtype that is not floating, ``dropout`` outside [0, 1).
        Unsupported: the forced implementation cannot run here.

    Source: pre-norm transformer block of the MAGE paper's encoder and decoder (section 3.1).
    """
    check.features("add_norm", "branch", branch_TD)
    features = branch_TD.shape[-1:]
    check.floating("add_norm", "branch", branch_TD)
    check.floating("add_norm", "residual", residual_TD)
    check.shape("add_norm", "residual", residual_TD, tuple(branch_TD.shape))
    check.floating("add_norm", "weight", weight_D)
    check.dtype("add_norm", "bias", bias_D, (weight_D.dtype,))
    check.shape("add_norm", "weight", weight_D, tuple(features))
    check.shape("add_norm", "bias", bias_D, tuple(features))
    check.dropout("add_norm", dropout, rng_state)
    check.same_device(
        "add_norm", branch_TD, residual=residual_TD, weight=weight_D, bias=bias_D, rng_state=rng_state
    )
    implementation = dispatch.requested("add_norm", implementation)
    flat = (-1, branch_TD.shape[-1])
    out_TD, normed_TD, _, _ = _add_norm(
        branch_TD.reshape(flat), residual_TD.reshape(flat), weight_D, bias_D,
        eps, dropout, rng_state, stream, implementation,
    )  # fmt: skip
    return out_TD.view(residual_TD.shape), normed_TD.view(branch_TD.shape)


def _fake(branch: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistic = residual.new_empty(
        (residual.shape[0], 1), dtype=torch.promote_types(residual.dtype, torch.float32)
    )
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        torch.empty_like(branch, memory_format=torch.contiguous_format),
        statistic,
        torch.empty_like(statistic),
    )


def _fake_backward(
    grad_out: Tensor, grad_normed: Tensor, out: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(grad_normed, memory_format=contiguous),
        torch.empty_like(out, memory_format=contiguous),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, weight, _, _, ctx.dropout, rng_state, ctx.stream, ctx.implementation = inputs
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(out, mean, rstd, weight, rng_state)


def _backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor, *_: Any) -> tuple:
    out, mean, rstd, weight, rng_state = ctx.saved_tensors
    grads = _add_norm_backward(
        grad_out, grad_normed, out, mean, rstd, weight, ctx.dropout, rng_state, ctx.stream, ctx.implementation
    )
    return (*grads, None, None, None, None, None)


_add_norm = library.define(
    "add_norm(Tensor branch, Tensor residual, Tensor weight, Tensor bias, float eps, float dropout, "
    "Tensor? rng_state, SymInt stream, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_add_norm_backward = library.define(
    "add_norm_backward(Tensor grad_out, Tensor grad_normed, Tensor out, Tensor mean, Tensor rstd, "
    "Tensor weight, float dropout, Tensor? rng_state, SymInt stream, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
