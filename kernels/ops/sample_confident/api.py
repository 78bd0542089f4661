"""``sample_confident``: one step of iterative decoding.

Shape suffixes: B samples, L tokens, C codes, N rows of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def sample_confident(
    logits_NC: Float[Tensor, "*rows C"],
    ids_BL: Int[Tensor, "B L"],
    num_masked_B: Int[Tensor, "B"],
    *,
    mask_token_id: int,
    choice_temperature: float,
    rng_state: Int64[Tensor, "2"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_logits_NC: Float[Tensor, "*rows C"] | None = None,
    guidance_scale: float = 0.0,
    rows_BL: Int[Tensor, "B L"] | None = None,
    samples_B: Int64[Tensor, "B"] | None = None,
    stream: int = 0,
    implementation: str = "auto",
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Sample every unknown token, then mask the least confident ones again.

    Equivalent PyTorch::

        logits = (1 + guidance_scale) * logits - guidance_scale * guidance_logits
        p = torch.softmax(top_k_top_p(logits / temperature), -1)
        drawn = torch.distributions.Categorical(p).sample()
        sampled = torch.where(ids == mask_token_id, drawn, ids)
        confidence = log(p[sampled]) + choice_temperature * gumbel_noise     # +inf where known
        count = num_masked.minimum(unknown.sum(1) - 1).clamp(min=1)          # per sample
        next_ids = sampled, with mask_token_id at the count lowest confidences

    Args:
        logits_NC: scores of the codebook's ids, ``[B, L, C]``; or, with ``rows_BL``, any rows ``[N, C]``.
        ids_BL: current ids; ``mask_token_id`` where unknown. Known ids are frozen.
        num_masked_B: how many tokens of each sample the schedule wants masked after this step.
        mask_token_id: id of [M].
        choice_temperature: weight of the Gumbel noise on the confidence.
        rng_state: int64 ``(seed, step)``.
        temperature: divides the logits.
        top_k: sample among the k most probable ids; 0 is all.
        top_p: sample within the smallest set of ids whose mass reaches p; 1 is all.
        guidance_logits_NC: logits of the unconditional pass (classifier-free guidance), shaped as the others.
        guidance_scale: weight of ``logits - guidance_logits``.
        rows_BL: row of the logits that each unknown token reads; it is not looked at where a token is known,
            and tokens of the same law may share a row.
        samples_B: int64, index of each sample in the whole run, 0, 1, ... by default; noise belongs to a
            sample, not to its batch.
        stream: random stream of this call.
        implementation: ``"auto"`` or the name of one.

    Returns:
        ``(sampled, next_ids)`` in the dtype of ``ids``: all tokens decided, and the next step's input.

    Raises:
        ValueError: shapes that disagree; temperature or choice_temperature out of range; top_k over C;
            top_p outside (0, 1]; (read on the CPU or in ``device_values``) an id neither in the
            codebook nor [M], a row that is not there.
        Unsupported: the forced implementation cannot run here.

    Source: MAGE section 3.2 (iterative decoding), after MaskGIT.
    """
    check.shape("sample_confident", "logits", logits_NC, (None,) * (3 if rows_BL is None else 2))
    check.features("sample_confident", "logits", logits_NC)
    check.floating("sample_confident", "logits", logits_NC)
    codes = logits_NC.shape[-1]
    if rows_BL is None:
        check.shape("sample_confident", "ids", ids_BL, tuple(logits_NC.shape[:2]))
    else:
        check.shape("sample_confident", "ids", ids_BL, (None, None))
        check.shape("sample_confident", "rows", rows_BL, tuple(ids_BL.shape))
        check.integer("sample_confident", "rows", rows_BL)
    batch = ids_BL.shape[0]
    check.integer("sample_confident", "ids", ids_BL)
    check.shape("sample_confident", "num_masked", num_masked_B, (batch,))
    check.integer("sample_confident", "num_masked", num_masked_B)
    check.state("sample_confident", rng_state)
    if samples_B is None:
        samples_B = torch.arange(batch, device=logits_NC.device)
    check.shape("sample_confident", "samples", samples_B, (batch,))
    check.dtype("sample_confident", "samples", samples_B, (torch.int64,))
    others = {"ids": ids_BL, "num_masked": num_masked_B, "rows": rows_BL, "samples": samples_B}
    check.same_device("sample_confident", logits_NC, rng_state=rng_state, **others)
    if guidance_logits_NC is not None:
        check.shape("sample_confident", "guidance_logits", guidance_logits_NC, tuple(logits_NC.shape))
    if not temperature > 0:
        raise ValueError(f"sample_confident: temperature is {temperature}, wanted more than 0")
    if not choice_temperature >= 0:
        raise ValueError(f"sample_confident: choice_temperature is {choice_temperature}, wanted 0 or more")
    if not 0 <= top_k <= codes:
        raise ValueError(f"sample_confident: top_k is {top_k}, wanted 0 <= top_k <= {codes} codes")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"sample_confident: top_p is {top_p}, wanted 0 < top_p <= 1")
    if check.readable(ids_BL):
        is_known_BL = ids_BL != mask_token_id
        check.values("sample_confident", "ids", ids_BL[is_known_BL], 0, codes)
        if rows_BL is not None:
            check.values("sample_confident", "rows", rows_BL[~is_known_BL], 0, logits_NC.shape[0])
    sampled_BL, next_BL = _sample_confident(
        logits_NC, ids_BL, num_masked_B, rows_BL, guidance_logits_NC, guidance_scale, mask_token_id,
        choice_temperature, temperature, top_k, top_p, samples_B, rng_state, stream,
        dispatch.requested("sample_confident", implementation),
    )  # fmt: skip
    return sampled_BL, next_BL


def _fake(logits: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape), ids.new_empty(ids.shape)


_sample_confident = library.define(
    "sample_confident(Tensor logits, Tensor ids, Tensor num_masked, Tensor? rows, Tensor? guidance_logits, "
    "float guidance_scale, SymInt mask_token_id, float choice_temperature, float temperature, SymInt top_k, "
    "float top_p, Tensor samples, Tensor rng_state, SymInt stream, str implementation) -> (Tensor, Tensor)",
    fake=_fake,
)
