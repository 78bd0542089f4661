"""A step of iterative decoding in C++ (``csrc/sample_confident.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import cpp_support, rng
from mage_fast.kernels.cpp_support import DEVICES
from mage_fast.kernels.rng import Stream

__all__ = ["DEVICES", "sample_confident", "unsupported"]
#: They are counted in float32, which holds no larger integers exactly.
_MOST_CODES = 2**24


def unsupported(function: str, logits: Tensor, *args: Any) -> str | None:
    if logits.shape[2] > _MOST_CODES:
        return f"codes are counted in float32: at most {_MOST_CODES}, got {logits.shape[2]}"
    return cpp_support.unsupported(function, logits, *args)


def sample_confident(
    logits_BLC: Tensor,
    ids_BL: Tensor,
    num_masked_B: Tensor,
    guidance_logits_BLC: Tensor | None,
    guidance_scale: float,
    mask_token_id: int,
    choice_temperature: float,
    temperature: float,
    top_k: int,
    top_p: float,
    rng_state: Tensor,
    stream: int,
    first_sample: int,
) -> tuple[Tensor, Tensor]:
    if guidance_logits_BLC is not None:
        dtype = torch.promote_types(logits_BLC.dtype, guidance_logits_BLC.dtype)
        logits_BLC, guidance_logits_BLC = logits_BLC.to(dtype), guidance_logits_BLC.to(dtype).contiguous()
    tokens_BL = ids_BL.long().contiguous()
    sampled_BL, next_BL = torch.empty_like(tokens_BL), torch.empty_like(tokens_BL)
    torch.ops.mage_fast_cpu.sample_confident.default(
        logits_BLC.contiguous(), tokens_BL, num_masked_B.long().contiguous(), guidance_logits_BLC,
        guidance_scale, mask_token_id, choice_temperature, temperature, top_k, top_p,
        rng_state.contiguous(), rng.stream(Stream.SAMPLE_ID, stream),
        rng.stream(Stream.SAMPLE_CONFIDENCE, stream), first_sample, sampled_BL, next_BL,
    )  # fmt: skip
    return sampled_BL.to(ids_BL.dtype), next_BL.to(ids_BL.dtype)
