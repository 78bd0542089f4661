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
    if logits.shape[-1] > _MOST_CODES:
        return f"codes are counted in float32: at most {_MOST_CODES}, got {logits.shape[-1]}"
    return cpp_support.unsupported(function, logits, *args)


def sample_confident(
    logits_NC: Tensor,
    ids_BL: Tensor,
    num_masked_B: Tensor,
    rows_BL: Tensor | None,
    guidance_logits_NC: Tensor | None,
    guidance_scale: float,
    mask_token_id: int,
    choice_temperature: float,
    temperature: float,
    top_k: int,
    top_p: float,
    samples_B: Tensor,
    rng_state: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:
    if guidance_logits_NC is not None:
        dtype = torch.promote_types(logits_NC.dtype, guidance_logits_NC.dtype)
        logits_NC, guidance_logits_NC = logits_NC.to(dtype), guidance_logits_NC.to(dtype).contiguous()
    tokens_BL = ids_BL.long().contiguous()
    sampled_BL, next_BL = torch.empty_like(tokens_BL), torch.empty_like(tokens_BL)
    torch.ops.mage_fast_cpu.sample_confident.default(
        logits_NC.contiguous(), tokens_BL, num_masked_B.long().contiguous(),
        None if rows_BL is None else rows_BL.long().contiguous(), guidance_logits_NC, guidance_scale,
        mask_token_id, choice_temperature, temperature, top_k, top_p, samples_B.contiguous(),
        rng_state.contiguous(), rng.stream(Stream.SAMPLE_ID, stream),
        rng.stream(Stream.SAMPLE_CONFIDENCE, stream), sampled_BL, next_BL,
    )  # fmt: skip
    return sampled_BL.to(ids_BL.dtype), next_BL.to(ids_BL.dtype)
