"""``bias_gelu``: bias, erf GELU and dropout in one pass, between the two linear layers of an MLP.

Shape suffixes: T rows (packed tokens), F features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def bias_gelu(
    x_TF: Float[Tensor, "*rows F"],
    bias_F: Float[Tensor, " F"],
    *,
    dropout: float = 0.0,
    rng_state: Int64[Tensor, " 2"] | None = None,
    stream: int = 0,
    implementation: str = "auto",
) -> Float[Tensor, "*rows F"]:
    """Add a bias and apply the erf GELU, then dropout.

    Equivalent PyTorch::

        F.dropout(F.gelu(x + bias), dropout)

    Args:
        x_TF: output of a linear layer without its bias; float64, float32, bfloat16 or float16.
        bias_F: the layer's bias; its dtype may differ from x's.
        dropout: drop probability, realised as a multiple of 2**-16; the scale uses the realised value.
        rng_state: int64 ``(seed, step)``; wanted when ``dropout > 0``.
        stream: random stream of this call, see :func:`mage_fast.kernels.rng.stream`.
        implementation: ``"auto"`` or the name of one.

    Returns:
        The activations in x's dtype; computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, a dtype that is not floating, ``dropout`` outside [0, 1).
        Unsupported: the forced implementation cannot run here.

    Source: the MLP of the transformer block, MAGE paper section 3.1 (ViT).
    """
    check.features("bias_gelu", "x", x_TF)
    check.floating("bias_gelu", "x", x_TF)
    check.floating("bias_gelu", "bias", bias_F)
    check.shape("bias_gelu", "bias", bias_F, tuple(x_TF.shape[-1:]))
    check.dropout("bias_gelu", dropout, rng_state)
    check.same_device("bias_gelu", x_TF, bias=bias_F, rng_state=rng_state)
    implementation = dispatch.requested("bias_gelu", implementation)
    flat_TF = x_TF.reshape(-1, x_TF.shape[-1])
    return _bias_gelu(flat_TF, bias_F, dropout, rng_state, stream, implementation).view(x_TF.shape)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.dropout, rng_state, ctx.stream, ctx.implementation = inputs
    ctx.save_for_backward(x, bias, rng_state)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, bias, rng_state = ctx.saved_tensors
    grads = _bias_gelu_backward(grad, x, bias, ctx.dropout, rng_state, ctx.stream, ctx.implementation)
    return (*grads, None, None, None, None)


_bias_gelu = library.define(
    "bias_gelu(Tensor x, Tensor bias, float dropout, Tensor? rng_state, SymInt stream, str implementation) "
    "-> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_bias_gelu_backward = library.define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, float dropout, Tensor? rng_state, "
    "SymInt stream, str implementation) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
