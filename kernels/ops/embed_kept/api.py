"""``embed_kept``: embeddings of the tokens the encoder sees, and of no others.

Shape suffixes: B samples, L tokens, S = L + 1 positions, T packed rows, V vocabulary, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def embed_kept(
    ids_BL: Int[Tensor, "B L"],
    class_ids_B: Int[Tensor, "B"],
    positions_T: Int[Tensor, "T"],
    is_masked_BL: Bool[Tensor, "B L"],
    word_weight_VD: Float[Tensor, "V D"],
    position_weight_SD: Float[Tensor, "S D"],
    norm_weight_D: Float[Tensor, "D"],
    norm_bias_D: Float[Tensor, "D"],
    *,
    mask_token_id: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    rng_state: Int64[Tensor, "2"] | None = None,
    stream: int = 0,
    implementation: str = "auto",
) -> Float[Tensor, "T D"]:
    """Gather word and position embeddings of the kept positions, normalise, drop out.

    Equivalent PyTorch::

        ids = torch.cat([class_ids[:, None], ids.masked_fill(is_masked, mask_token_id)], 1)
        x = F.embedding(ids, word_weight) + position_weight
        x = F.dropout(F.layer_norm(x, (D,), norm_weight, norm_bias, eps), dropout)
        x = x.flatten(0, 1)[positions]

    Args:
        ids_BL: int32 or int64 codebook ids.
        class_ids_B: id that stands at position 0 of each sample.
        positions_T: flat index ``b * S + p`` of each packed row, see :class:`MaskPlan`.
        is_masked_BL: tokens that enter as ``mask_token_id``.
        word_weight_VD: word embeddings; their dtype is the output's.
        position_weight_SD: position embeddings.
        norm_weight_D: LayerNorm scale.
        norm_bias_D: LayerNorm shift.
        mask_token_id: id of [M].
        eps: added to the variance.
        dropout: drop probability, realised as a multiple of 2**-16; element ``t * D + d`` of the output.
        rng_state: int64 ``(seed, step)``; wanted when ``dropout > 0``.
        stream: random stream of this call.
        implementation: ``"auto"`` or the name of one.

    Returns:
        Packed rows. Sum and statistics accumulate in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree; an id outside the vocabulary (read on the CPU or in
            ``device_values``).
        Unsupported: the forced implementation cannot run here.

    Source: MAGE section 3.1, tokenization and masking.
    """
    batch, length = ids_BL.shape if ids_BL.dim() == 2 else (None, None)
    vocabulary, features = word_weight_VD.shape if word_weight_VD.dim() == 2 else (None, None)
    for name, x in (("ids", ids_BL), ("class_ids", class_ids_B), ("positions", positions_T)):
        check.integer("embed_kept", name, x)
    check.shape("embed_kept", "ids", ids_BL, (None, None))
    check.shape("embed_kept", "word_weight", word_weight_VD, (None, None))
    assert length is not None
    assert vocabulary is not None
    check.shape("embed_kept", "class_ids", class_ids_B, (batch,))
    check.shape("embed_kept", "is_masked", is_masked_BL, (batch, length))
    check.shape("embed_kept", "position_weight", position_weight_SD, (length + 1, features))
    check.shape("embed_kept", "norm_weight", norm_weight_D, (features,))
    check.shape("embed_kept", "norm_bias", norm_bias_D, (features,))
    check.shape("embed_kept", "positions", positions_T, (None,))
    check.dtype("embed_kept", "is_masked", is_masked_BL, (torch.bool,))
    check.floating("embed_kept", "word_weight", word_weight_VD)
    check.dropout("embed_kept", dropout, rng_state)
    check.same_device(
        "embed_kept",
        ids_BL,
        class_ids=class_ids_B,
        positions=positions_T,
        is_masked=is_masked_BL,
        word_weight=word_weight_VD,
        position_weight=position_weight_SD,
        norm_weight=norm_weight_D,
        norm_bias=norm_bias_D,
        rng_state=rng_state,
    )
    if not 0 <= mask_token_id < vocabulary:
        raise ValueError(
            f"embed_kept: mask_token_id is {mask_token_id}, wanted 0 <= mask_token_id < {vocabulary}"
        )
    check.values("embed_kept", "ids", ids_BL, 0, vocabulary)
    check.values("embed_kept", "class_ids", class_ids_B, 0, vocabulary)
    check.values("embed_kept", "positions", positions_T, 0, ids_BL.shape[0] * (length + 1))
    x_TD, _, _, _ = _embed_kept(
        ids_BL, class_ids_B, positions_T, is_masked_BL, word_weight_VD, position_weight_SD, norm_weight_D,
        norm_bias_D, mask_token_id, eps, dropout, rng_state, stream,
        dispatch.requested("embed_kept", implementation),
    )  # fmt: skip
    return x_TD


def _fake(
    ids: Tensor, class_ids: Tensor, positions: Tensor, is_masked: Tensor, word: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    rows = positions.shape[0]
    statistic = word.new_empty((rows, 1), dtype=torch.promote_types(word.dtype, torch.float32))
    return (
        word.new_empty((rows, word.shape[1])),
        positions.new_empty(rows, dtype=torch.int32),
        statistic,
        torch.empty_like(statistic),
    )


def _fake_backward(
    grad: Tensor, ids: Tensor, positions: Tensor, mean: Tensor, rstd: Tensor, word: Tensor, position: Tensor,
    norm_weight: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (word, position, norm_weight, norm_weight))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, positions, _, word, position, norm_weight, _, _, _, ctx.dropout, rng_state = inputs[:12]
    ctx.stream, ctx.implementation = inputs[12:]
    _, ids_T, mean, rstd = output
    ctx.mark_non_differentiable(ids_T, mean, rstd)
    ctx.save_for_backward(ids_T, positions, mean, rstd, word, position, norm_weight, rng_state)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    *saved, rng_state = ctx.saved_tensors
    grads = _embed_kept_backward(grad, *saved, ctx.dropout, rng_state, ctx.stream, ctx.implementation)
    return (None, None, None, None, *grads, None, None, None, None, None, None)


_embed_kept = library.define(
    "embed_kept(Tensor ids, Tensor class_ids, Tensor positions, Tensor is_masked, Tensor word_weight, "
    "Tensor position_weight, Tensor norm_weight, Tensor norm_bias, SymInt mask_token_id, float eps, "
    "float dropout, Tensor? rng_state, SymInt stream, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_embed_kept_backward = library.define(
    "embed_kept_backward(Tensor grad, Tensor ids, Tensor positions, Tensor mean, Tensor rstd, "
    "Tensor word_weight, Tensor position_weight, Tensor norm_weight, float dropout, Tensor? rng_state, "
    "SymInt stream, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
