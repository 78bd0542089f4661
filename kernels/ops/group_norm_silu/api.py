"""``group_norm_silu``: GroupNorm and SiLU in one pass, the tokenizer's activation.

Shape suffixes: N images, C channels, H rows, W columns, G groups of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mage_fast.kernels import check, dispatch, library
from mage_fast.kernels.ops.group_norm_silu.reference import memory_format


def group_norm_silu(
    x_NCHW: Float[Tensor, "N C H W"],
    weight_C: Float[Tensor, " C"],
    bias_C: Float[Tensor, " C"],
    *,
    num_groups: int = 32,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Float[Tensor, "N C H W"]:
    """Normalise groups of channels and apply SiLU.

    Equivalent PyTorch::

        F.silu(F.group_norm(x, num_groups, weight, bias, eps))

    Args:
        x_NCHW: feature maps, channels_last or contiguous; float64, float32, bfloat16 or float16.
        weight_C: GroupNorm scale.
        bias_C: GroupNorm shift, in the scale's dtype.
        num_groups: groups that the channels split into, evenly.
        eps: added to the variance.
        implementation: ``"auto"`` or the name of one.

    Returns:
        The activations in x's dtype and memory format (contiguous if x has neither); computed in float32
        (float64 for float64).

    Raises:
        ValueError: shapes that disagree, a dtype that is not floating, ``num_groups`` that does not divide
            the channels.
        Unsupported: the forced implementation cannot run here.

    Source: residual blocks of the VQGAN tokenizer (Esser et al., "Taming transformers", 2021).
    """
    op = "group_norm_silu"
    check.shape(op, "x", x_NCHW, (None, None, None, None))
    check.floating(op, "x", x_NCHW)
    channels = x_NCHW.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}, wanted a divisor of x's {channels} channels")
    check.shape(op, "weight", weight_C, (channels,))
    check.shape(op, "bias", bias_C, (channels,))
    check.floating(op, "weight", weight_C)
    check.dtype(op, "bias", bias_C, (weight_C.dtype,))
    check.same_device(op, x_NCHW, weight=weight_C, bias=bias_C)
    implementation = dispatch.requested(op, implementation)
    return _group_norm_silu(x_NCHW, weight_C, bias_C, num_groups, eps, implementation)[0]


def _fake(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty((x.shape[0], num_groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=memory_format(x)), statistic, torch.empty_like(statistic)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=memory_format(x)),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.num_groups, _, ctx.implementation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    grads = _group_norm_silu_backward(grad, *ctx.saved_tensors, ctx.num_groups, ctx.implementation)
    return (*grads, None, None, None)


_group_norm_silu = library.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, SymInt num_groups, float eps, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_group_norm_silu_backward = library.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "SymInt num_groups, str implementation) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
