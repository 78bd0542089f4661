"""The decoder's input from packed encoder rows in C++ (``csrc/pad_decoder.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import cpp_support
from mage_fast.kernels.cpp_support import DEVICES, DTYPES, wide

__all__ = ["DEVICES", "pad_decoder", "pad_decoder_backward", "unsupported"]


def unsupported(function: str, *args: Any) -> str | None:
    dtypes = [x for x in args if isinstance(x, torch.dtype)]
    if not set(dtypes) <= set(DTYPES):
        return "the kernels take float32 and bfloat16"
    return cpp_support.unsupported(function, *args)


def pad_decoder(
    encoded_TD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    position_weight_SD: Tensor,
    mask_token_D: Tensor | None,
) -> Tensor:
    dtype = torch.promote_types(encoded_TD.dtype, position_weight_SD.dtype)
    out_BSD = encoded_TD.new_empty((*source_BS.shape, encoded_TD.shape[1]), dtype=dtype)
    torch.ops.mage_fast_cpu.pad_decoder.default(
        encoded_TD.contiguous(), source_BS.contiguous(), cu_seqlens.contiguous(),
        position_weight_SD.contiguous(), None if mask_token_D is None else wide(mask_token_D), out_BSD,
    )  # fmt: skip
    return out_BSD


def pad_decoder_backward(
    grad_BSD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    rows: int,
    with_mask_token: bool,
    encoded_dtype: torch.dtype,
    position_dtype: torch.dtype,
    mask_token_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    _, positions, features = grad_BSD.shape
    grad_encoded_TD = grad_BSD.new_empty((rows, features), dtype=encoded_dtype)
    grad_position_SD = grad_BSD.new_empty((positions, features), dtype=position_dtype)
    grad_mask_token_D = grad_BSD.new_zeros(features, dtype=torch.float32)
    torch.ops.mage_fast_cpu.pad_decoder_backward.default(
        grad_BSD.contiguous(), source_BS.contiguous(), cu_seqlens.contiguous(),
        grad_encoded_TD, grad_position_SD, grad_mask_token_D if with_mask_token else None,
    )  # fmt: skip
    return grad_encoded_TD, grad_position_SD, grad_mask_token_D.to(mask_token_dtype)
