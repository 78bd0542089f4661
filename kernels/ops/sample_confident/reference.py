"""One step of iterative decoding: sample every unknown token, keep the confident ones.

id         ~ categorical(softmax(logits / temperature))           (Gumbel-max)
confidence = log p(id) + choice_temperature * Gumbel(0, 1)        (+inf at known tokens)
the n least confident unknown tokens become [M] again
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.rng import Stream


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
    batch, length, codes = logits_BLC.shape
    logits_BLC = logits_BLC.to(torch.promote_types(logits_BLC.dtype, torch.float32))
    if guidance_logits_BLC is not None:
        logits_BLC = logits_BLC + guidance_scale * (logits_BLC - guidance_logits_BLC.to(logits_BLC.dtype))
    logits_BLC = _filter(logits_BLC / temperature, top_k, top_p)
    is_unknown_BL = ids_BL == mask_token_id

    id_stream = rng.stream(Stream.SAMPLE_ID, stream)
    noise_BLC = rng.gumbel(rng_state, id_stream, batch, length * codes, first_sample).view_as(logits_BLC)
    drawn_BL = (logits_BLC + noise_BLC).argmax(2).to(ids_BL.dtype)
    sampled_BL = torch.where(is_unknown_BL, drawn_BL, ids_BL).contiguous()

    log_p_BL = logits_BLC.log_softmax(2).gather(2, drawn_BL[..., None].long()).squeeze(2)
    confidence_stream = rng.stream(Stream.SAMPLE_CONFIDENCE, stream)
    noise_BL = rng.gumbel(rng_state, confidence_stream, batch, length, first_sample)
    confidence_BL = (log_p_BL + choice_temperature * noise_BL).masked_fill(~is_unknown_BL, float("inf"))

    count_B = num_masked_B.minimum(is_unknown_BL.sum(1) - 1).clamp(min=1)
    rank_BL = confidence_BL.argsort(dim=1, stable=True).argsort(dim=1)
    is_masked_BL = (rank_BL < count_B[:, None]) & is_unknown_BL
    return sampled_BL, sampled_BL.masked_fill(is_masked_BL, mask_token_id)


def _filter(logits_BLC: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k largest logits, then outside the nucleus of mass top_p."""
    if 0 < top_k < logits_BLC.shape[2]:
        least = logits_BLC.topk(top_k, 2).values[..., -1:]
        logits_BLC = logits_BLC.masked_fill(logits_BLC < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits_BLC.sort(dim=2, descending=True, stable=True)
        p = ordered.softmax(2)
        outside = p.cumsum(2) - p >= top_p  # mass before this code; the most probable one always stays
        logits_BLC = logits_BLC.masked_fill(
            torch.zeros_like(outside).scatter(2, order, outside), float("-inf")
        )
    return logits_BLC
