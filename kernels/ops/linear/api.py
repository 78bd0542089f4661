"""``linear``: a matrix product with a weight that stays in float32, and its gradients.

Shape suffixes: T rows (packed tokens), D features in, F features out.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def linear(
    x_TD: Float[Tensor, "*rows D"],
    weight_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"] | None = None,
    *,
    implementation: str = "auto",
) -> Float[Tensor, "*rows F"]:
    """Multiply rows with a weight and add a bias, in the activations' dtype.

    Equivalent PyTorch::

        F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    which it is on any device but the CPU: there the library behind torch is as fast as a product can be, and
    torch.compile knows it.

    Args:
        x_TD: activations; float64, float32, bfloat16 or float16.
        weight_FD: of the activations' dtype or a wider one.
        bias_F: likewise.
        implementation: ``"auto"`` or the name of one.

    Returns:
        The products in the activations' dtype, accumulated in float32 (float64 for float64). The gradients of
        weight and bias come in their own dtypes.

    Raises:
        ValueError: shapes that disagree, a dtype that is not floating.
        Unsupported: the forced implementation cannot run here.

    Source: the projections of the transformer block, MAGE paper section 3.1 (ViT).
    """
    check.features("linear", "x", x_TD)
    check.floating("linear", "x", x_TD)
    check.floating("linear", "weight", weight_FD)
    check.shape("linear", "weight", weight_FD, (None, x_TD.shape[-1]))
    if bias_F is not None:
        check.floating("linear", "bias", bias_F)
        check.shape("linear", "bias", bias_F, tuple(weight_FD.shape[:1]))
    check.same_device("linear", x_TD, weight=weight_FD, bias=bias_F)
    if x_TD.device.type != "cpu":
        dtype = x_TD.dtype
        return F.linear(x_TD, weight_FD.to(dtype), None if bias_F is None else bias_F.to(dtype))
    implementation = dispatch.requested("linear", implementation)
    flat_TD = x_TD.reshape(-1, x_TD.shape[-1])
    return _linear(flat_TD, weight_FD, bias_F, implementation).view(*x_TD.shape[:-1], weight_FD.shape[0])


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_input: bool, with_weight: bool, with_bias: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if with_input else 0),
        weight.new_empty(weight.shape if with_weight else 0),
        weight.new_empty(weight.shape[0] if with_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.implementation = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    wanted = tuple(ctx.needs_input_grad[:3])
    grads = _linear_backward(grad, x, weight, *wanted, ctx.implementation)
    grad_x, grad_weight, grad_bias = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(ctx.bias_dtype), None


_linear = library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str implementation) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_linear_backward = library.define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool with_input, bool with_weight, "
    "bool with_bias, str implementation) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
