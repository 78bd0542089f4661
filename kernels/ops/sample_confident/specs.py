"""Shapes of ``sample_confident`` in decoding, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.roofline import PHILOX_BLOCK, Direction, Work


@dataclass(frozen=True)
class Spec:
    """Batch, tokens, codes, how many tokens are unknown, and what is on."""

    name: str
    batch: int
    length: int
    codes: int
    unknown: int
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 0.0
    #: Logits of the unknown tokens only.
    packed: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        mask_token_id = self.codes + 5
        ids = torch.randint(self.codes, (self.batch, self.length), generator=generator)
        ids[:, : self.unknown] = mask_token_id
        logits = 3 * torch.randn(self.batch, self.length, self.codes, generator=generator)
        arguments = {
            "logits_NC": logits.to(device, dtype),
            "ids_BL": ids.to(device),
            "num_masked_B": torch.full((self.batch,), self.unknown // 2, device=device),
            "mask_token_id": mask_token_id,
            "choice_temperature": 3.0,
            "rng_state": rng.new_state(0, device=device),
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        if self.guidance_scale:
            guidance = 3 * torch.randn(logits.shape, generator=generator)
            arguments |= {
                "guidance_logits_NC": guidance.to(device, dtype),
                "guidance_scale": self.guidance_scale,
            }
        return packed(arguments) if self.packed else arguments

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        assert direction == "fwd"
        scores, tokens = self.batch * self.unknown * self.codes, self.batch * self.length
        # logits of the unknown tokens, once more where guided, int64 ids and counts -> sampled and next ids
        logits = scores * dtype.itemsize * (2 if self.guidance_scale else 1)
        # a code: a random word, its noise -log -log u (6), the noisy argmax (2), the softmax's sum (4)
        flops = round(scores * (PHILOX_BLOCK / 4 + 12))
        return Work(logits + 8 * (tokens + self.batch), 2 * 8 * tokens, flops)


def packed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same step from the unknown tokens' rows of logits, one after the other."""
    is_unknown_BL = arguments["ids_BL"] == arguments["mask_token_id"]
    rows_BL = (is_unknown_BL.flatten().cumsum(0) - 1).view_as(is_unknown_BL)
    names = {"logits_NC", "guidance_logits_NC"} & arguments.keys()
    return arguments | {name: arguments[name][is_unknown_BL] for name in names} | {"rows_BL": rows_BL}


def baseline(
    logits_NC: Tensor,
    ids_BL: Tensor,
    num_masked_B: Tensor,
    *,
    mask_token_id: int,
    choice_temperature: float,
    rng_state: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_logits_NC: Tensor | None = None,
    guidance_scale: float = 0.0,
    rows_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The eager chain, on torch's own random numbers."""
    is_unknown_BL = ids_BL == mask_token_id
    logits_NC = logits_NC.float()
    if guidance_logits_NC is not None:
        logits_NC = logits_NC + guidance_scale * (logits_NC - guidance_logits_NC.float())
    logits_BLC = logits_NC if rows_BL is None else logits_NC[rows_BL.clamp(min=0)]
    if top_k:
        least_BL1 = logits_BLC.topk(top_k, 2).values[..., -1:]
        logits_BLC = logits_BLC.masked_fill(logits_BLC < least_BL1, float("-inf"))
    p_BLC = logits_BLC.softmax(2)
    if top_p < 1.0:
        ordered_BLC, order_BLC = p_BLC.sort(2, descending=True)
        ordered_BLC = ordered_BLC.masked_fill(ordered_BLC.cumsum(2) - ordered_BLC >= top_p, 0.0)
        p_BLC = torch.zeros_like(p_BLC).scatter(2, order_BLC, ordered_BLC)
        p_BLC = p_BLC / p_BLC.sum(2, keepdim=True)
    # a categorical draw as torch.multinomial makes it, without its wait for the device
    drawn_BL = (p_BLC / torch.empty_like(p_BLC).exponential_()).argmax(2)
    sampled_BL = torch.where(is_unknown_BL, drawn_BL, ids_BL)
    log_p_BL = p_BLC.gather(2, drawn_BL[..., None]).squeeze(2).log()
    noise_BL = torch.empty_like(log_p_BL).exponential_().log_().neg_()
    confidence_BL = (log_p_BL + choice_temperature * noise_BL).masked_fill(~is_unknown_BL, float("inf"))
    count_B = num_masked_B.minimum(is_unknown_BL.sum(1) - 1).clamp(min=1)
    rank_BL = confidence_BL.argsort(1).argsort(1)
    is_masked_BL = (rank_BL < count_B[:, None]) & is_unknown_BL
    return sampled_BL, sampled_BL.masked_fill(is_masked_BL, mask_token_id)


def invariant(inputs: dict[str, Any], outputs: list[Tensor]) -> list[Tensor]:
    """What right steps have in common whatever numbers they draw: frozen ids, counts, kept ids."""
    (sampled_BL, next_BL), mask_token_id = outputs, inputs["mask_token_id"]
    is_known_BL, is_masked_BL = inputs["ids_BL"] != mask_token_id, next_BL == mask_token_id
    forgotten, changed = is_masked_BL & is_known_BL, (next_BL != sampled_BL) & ~is_masked_BL
    return [sampled_BL * is_known_BL, is_masked_BL.sum(1), forgotten.sum(), changed.sum()]


SPECS = (
    Spec("tiny", 2, 6, 11, 4),
    Spec("tiny_one_unknown", 3, 4, 8, 1),
    Spec("tiny_filtered", 2, 5, 12, 5, top_k=6, top_p=0.8, guidance_scale=1.5),
    Spec("tiny_packed", 3, 5, 12, 3, guidance_scale=1.5, packed=True),
    # the tiles of the real shapes, few tokens
    Spec("small_codebook", 2, 12, 1024, 9),
    Spec("small_filtered", 1, 9, 1024, 7, top_k=100, top_p=0.9),
    Spec("small_odd", 1, 9, 1023, 7),
    Spec("first_step_batch8", 8, 256, 1024, 256),
    Spec("middle_step_batch8", 8, 256, 1024, 128, packed=True),
)
#: A step of 64 samples: nothing known, half known, and with each option on.
GPU_SPECS = (
    Spec("first_step_batch64", 64, 256, 1024, 256),
    Spec("middle_step_batch64", 64, 256, 1024, 128, packed=True),
    Spec("top_k_batch64", 64, 256, 1024, 256, top_k=100),
    Spec("filtered_batch64", 64, 256, 1024, 256, top_k=100, top_p=0.9),
    Spec("guided_batch64", 64, 256, 1024, 256, guidance_scale=1.5),
    Spec("codebook_16384", 8, 1024, 16384, 1024),
    Spec("codebook_16384_filtered", 8, 1024, 16384, 1024, top_k=100, top_p=0.9),
)
