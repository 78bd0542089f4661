"""Iterative decoding in plain PyTorch, as the published release samples (paper, section 3.2).

Shape suffixes: B images, L tokens an image, C codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .model import MAGE


class Generated(NamedTuple):
    """What :func:`generate` returns; ``images`` is None for a model without a VQGAN."""

    ids: Int64[Tensor, "B L"]
    images: Float[Tensor, "B 3 H W"] | None


def num_remasked(step: int, steps: int, at_start: int, unknown: int) -> int:
    """Tokens masked again after ``step``: the cosine schedule, at least 1, fewer than are unknown."""
    scheduled = math.floor(at_start * math.cos(math.pi / 2 * (step + 1) / steps))
    return max(1, min(unknown - 1, scheduled))


@torch.no_grad()
def generate(
    model: MAGE,
    batch: int = 1,
    *,
    steps: int = 20,
    temperature: float = 6.0,
    ids: Int64[Tensor, "B L"] | None = None,
    class_ids: Int64[Tensor, " B"] | None = None,
) -> Generated:
    """Sample images from a model in eval mode, by the default random generators.

    Args:
        model: in eval mode, or dropout disturbs the samples.
        batch: images to sample; unused where ``ids`` is given.
        steps: decoding steps T.
        temperature: scale tau of the Gumbel noise on the confidence; it falls linearly to 0.
        ids: start, with ``model.mask_token_id`` at the tokens to sample; by default all of them.
        class_ids: vocabulary id of the class token; the unconditional one by default.

    Raises:
        ValueError: images with unequally many tokens to sample: one scheduled count serves the batch,
            that of its first image.
    """
    device = model.token_emb.word_embeddings.weight.device
    if ids is None:
        ids = torch.full((batch, model.num_tokens), model.mask_token_id, device=device)
    unknown_B = (ids == model.mask_token_id).sum(dim=1)
    at_start = int(unknown_B[0])
    if at_start == 0 or (unknown_B != at_start).any():
        raise ValueError(
            f"generate: ids have {unknown_B.tolist()} tokens to sample, wanted as many in each, at least 1"
        )
    drop_nothing_BL = torch.zeros_like(ids, dtype=torch.bool)
    for step in range(steps):
        unknown_BL = ids == model.mask_token_id
        x_BSD = model.forward_encoder(ids, drop_nothing_BL, unknown_BL, class_ids)
        logits_BSV = model.forward_decoder(x_BSD, drop_nothing_BL, unknown_BL)
        logits_BLC = logits_BSV[:, 1:, : model.codebook_size].float()
        sampled_BL = torch.distributions.Categorical(logits=logits_BLC).sample()
        sampled_BL = torch.where(unknown_BL, sampled_BL, ids)

        probability_BL = logits_BLC.softmax(dim=-1).gather(-1, sampled_BL[..., None])[..., 0]
        probability_BL = torch.where(unknown_BL, probability_BL, torch.inf)
        gumbel_BL = -torch.log(torch.empty(probability_BL.shape).exponential_())  # on the CPU, as the release
        noise_BL = temperature * (1 - (step + 1) / steps) * gumbel_BL.to(device)
        confidence_BL = probability_BL.log() + noise_BL
        count = num_remasked(step, steps, at_start, int(unknown_BL[0].sum()))
        cut_off_B1 = confidence_BL.sort(dim=-1).values[:, count - 1 : count]
        ids = torch.where(confidence_BL <= cut_off_B1, model.mask_token_id, sampled_BL)
    has_vqgan = hasattr(model, "vqgan")
    return Generated(sampled_BL, model.vqgan.decode_ids(sampled_BL) if has_vqgan else None)
