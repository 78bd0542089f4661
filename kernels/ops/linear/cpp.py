"""Linear layers in C++ (``csrc/linear.cpp``), on processors with AVX-512.

Weights stay as they are, float32 say: they are rounded to bfloat16 on the way to the product, and their
gradient is the product's float32 sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import cpp_support
from mage_fast.kernels.cpp_support import DEVICES, wide
from mage_fast.kernels.dispatch import Unsupported
from mage_fast.kernels.library import load_extension

__all__ = ["DEVICES", "linear", "linear_backward", "unsupported"]

if load_extension() != "avx512":
    raise Unsupported("without AVX-512 it is not faster than torch's products")
_HAS_BFLOAT16_DOT = torch.cpu.get_capabilities().get("avx512_bf16", False)


def unsupported(function: str, *args: Any) -> str | None:
    x_TD, weight_FD = args[:2] if function == "linear" else args[1:3]
    if x_TD.dtype == torch.bfloat16:
        if not _HAS_BFLOAT16_DOT:
            return "the processor has no dot product of bfloat16 (AVX512-BF16)"
        if weight_FD.shape[0] % 2 or weight_FD.shape[1] % 2:
            return f"bfloat16 is multiplied two by two, got a weight of {tuple(weight_FD.shape)}"
    elif weight_FD.dtype == torch.bfloat16:
        return "float32 activations want a float32 weight, got bfloat16"
    return cpp_support.unsupported(function, *args)


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    y_TF = x_TD.new_empty(x_TD.shape[0], weight_FD.shape[0])
    if y_TF.numel():
        bias_F = None if bias_F is None else wide(bias_F)
        torch.ops.mage_fast_cpu.linear.default(x_TD.contiguous(), weight_FD.contiguous(), bias_F, y_TF)
    return y_TF


def linear_backward(
    grad_TF: Tensor,
    x_TD: Tensor,
    weight_FD: Tensor,
    with_input_gradient: bool,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, grad_TF, weight_FD = x_TD.contiguous(), grad_TF.to(x_TD.dtype).contiguous(), weight_FD.contiguous()
    has_rows = grad_TF.numel() > 0
    make = torch.empty if has_rows else torch.zeros
    grad_x = torch.empty(x_TD.shape if with_input_gradient else 0, dtype=x_TD.dtype)
    grad_weight = make(weight_FD.shape if with_weight_gradient else 0, dtype=torch.float32)
    grad_bias = make(weight_FD.shape[0] if with_bias_gradient else 0, dtype=torch.float32)
    if has_rows:
        if with_input_gradient:
            torch.ops.mage_fast_cpu.linear_grad_input.default(grad_TF, weight_FD, grad_x)
        if with_weight_gradient or with_bias_gradient:
            torch.ops.mage_fast_cpu.linear_grad_weight.default(
                grad_TF,
                x_TD,
                grad_weight if with_weight_gradient else None,
                grad_bias if with_bias_gradient else None,
            )
    return grad_x, grad_weight.to(weight_FD.dtype), grad_bias.to(weight_FD.dtype)
