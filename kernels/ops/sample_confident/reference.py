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
    length, codes = ids_BL.shape[1], logits_NC.shape[-1]
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    if guidance_logits_NC is not None:
        logits_NC = logits_NC + guidance_scale * (logits_NC - guidance_logits_NC.to(logits_NC.dtype))
    logits_NC = _filter(logits_NC / temperature, top_k, top_p)
    is_unknown_BL = ids_BL == mask_token_id
    logits_BLC = logits_NC if rows_BL is None else _rows(logits_NC, rows_BL, is_unknown_BL)

    id_stream = rng.stream(Stream.SAMPLE_ID, stream)
    noise_BLC = rng.gumbel(rng_state, id_stream, samples_B, length * codes).view_as(logits_BLC)
    drawn_BL = (logits_BLC + noise_BLC).argmax(2).to(ids_BL.dtype)
    sampled_BL = torch.where(is_unknown_BL, drawn_BL, ids_BL).contiguous()

    log_p_BL = logits_BLC.log_softmax(2).gather(2, drawn_BL[..., None].long()).squeeze(2)
    confidence_stream = rng.stream(Stream.SAMPLE_CONFIDENCE, stream)
    noise_BL = rng.gumbel(rng_state, confidence_stream, samples_B, length)
    confidence_BL = (log_p_BL + choice_temperature * noise_BL).masked_fill(~is_unknown_BL, float("inf"))

    count_B = num_masked_B.minimum(is_unknown_BL.sum(1) - 1).clamp(min=1)
    rank_BL = confidence_BL.argsort(dim=1, stable=True).argsort(dim=1)
    is_masked_BL = (rank_BL < count_B[:, None]) & is_unknown_BL
    return sampled_BL, sampled_BL.masked_fill(is_masked_BL, mask_token_id)


def _rows(logits_NC: Tensor, rows_BL: Tensor, is_unknown_BL: Tensor) -> Tensor:
    """Every token's row; any numbers where a token is known."""
    if not len(logits_NC):
        return logits_NC.new_zeros(*rows_BL.shape, logits_NC.shape[1])
    return logits_NC[rows_BL.masked_fill(~is_unknown_BL, 0)]


def _filter(logits_NC: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k largest logits, then outside the nucleus of mass top_p."""
    if 0 < top_k < logits_NC.shape[-1]:
        least = logits_NC.topk(top_k, -1).values[..., -1:]
        logits_NC = logits_NC.masked_fill(logits_NC < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits_NC.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # mass before this code; the most probable one always stays
        logits_NC = logits_NC.masked_fill(
            torch.zeros_like(outside).scatter(-1, order, outside), float("-inf")
        )
    return logits_NC
