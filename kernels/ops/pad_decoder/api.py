"""``pad_decoder``: scatter packed encoder rows into full sequences, pad the rest, add positions.

Shape suffixes: T packed encoder rows, D features, B images, S positions (class token first).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def pad_decoder(
    encoded_TD: Float[Tensor, "T D"],
    source_BS: Int[Tensor, "B S"],
    cu_seqlens: Int[Tensor, " B+1"],
    position_weight_SD: Float[Tensor, "S D"],
    *,
    mask_token_D: Float[Tensor, " D"] | None = None,
    implementation: str = "auto",
) -> Float[Tensor, "B S D"]:
    """Build the decoder's input from packed encoder rows: full sequences, padded, with positions added.

    Equivalent PyTorch::

        padding_BD = encoded[cu_seqlens[:-1]] if mask_token is None else mask_token.expand(B, D)
        rows_BSD = torch.where(source[..., None] < 0, padding_BD[:, None], encoded[source.clamp(min=0)])
        rows_BSD + position_weight

    Args:
        encoded_TD: encoder output after the decoder's input projection, images packed one after another,
            each image's class row first; float64, float32, bfloat16 or float16.
        source_BS: int32 or int64 row of ``encoded_TD`` that feeds each position; -1: padded.
        cu_seqlens: int32 or int64 first row of each image, and T.
        position_weight_SD: decoder position embedding.
        mask_token_D: what stands at padded positions; None: the image's own class row.
        implementation: ``"auto"`` or the name of one.

    Returns:
        The decoder's input in the promoted dtype of ``encoded_TD`` and ``position_weight_SD``. The
        backward accumulates in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, a dtype of the wrong kind, a row outside ``encoded_TD`` (read
            on the CPU or in ``device_values``).
        Unsupported: the forced implementation cannot run here.

    Source: MAGE paper section 3.1, encoder-decoder design (padding with the class token feature), and its
    appendix's ablation (mask token).
    """
    op = "pad_decoder"
    rows, features = (*encoded_TD.shape, None, None)[:2]
    check.shape(op, "encoded", encoded_TD, (None, None))
    check.features(op, "encoded", encoded_TD)
    check.shape(op, "source", source_BS, (None, None))
    check.shape(op, "cu_seqlens", cu_seqlens, (source_BS.shape[0] + 1,))
    check.shape(op, "position_weight", position_weight_SD, (source_BS.shape[1], features))
    check.floating(op, "encoded", encoded_TD)
    check.floating(op, "position_weight", position_weight_SD)
    check.integer(op, "source", source_BS)
    check.integer(op, "cu_seqlens", cu_seqlens)
    if mask_token_D is not None:
        check.shape(op, "mask_token", mask_token_D, (features,))
        check.floating(op, "mask_token", mask_token_D)
    else:
        check.values(op, "cu_seqlens[:-1]", cu_seqlens.narrow(0, 0, source_BS.shape[0]), 0, rows)
    check.values(op, "source", source_BS, -1, rows)
    check.same_device(
        op,
        encoded_TD,
        source=source_BS,
        cu_seqlens=cu_seqlens,
        position_weight=position_weight_SD,
        mask_token=mask_token_D,
    )
    implementation = dispatch.requested(op, implementation)
    return _pad_decoder(encoded_TD, source_BS, cu_seqlens, position_weight_SD, mask_token_D, implementation)


def _fake(encoded: Tensor, source: Tensor, cu_seqlens: Tensor, position_weight: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(encoded.dtype, position_weight.dtype)
    return encoded.new_empty((*source.shape, encoded.shape[1]), dtype=dtype)


def _fake_backward(
    grad: Tensor,
    source: Tensor,
    cu_seqlens: Tensor,
    rows: int,
    with_mask_token: bool,
    encoded_dtype: torch.dtype,
    position_dtype: torch.dtype,
    mask_token_dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _, positions, features = grad.shape
    return (
        grad.new_empty((rows, features), dtype=encoded_dtype),
        grad.new_empty((positions, features), dtype=position_dtype),
        grad.new_empty((features,), dtype=mask_token_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    encoded, source, cu_seqlens, position_weight, mask_token, ctx.implementation = inputs
    ctx.rows, ctx.with_mask_token = encoded.shape[0], mask_token is not None
    ctx.dtypes = (encoded.dtype, position_weight.dtype, (encoded if mask_token is None else mask_token).dtype)
    ctx.save_for_backward(source, cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    source, cu_seqlens = ctx.saved_tensors
    grad_encoded, grad_position, grad_mask_token = _pad_decoder_backward(
        grad, source, cu_seqlens, ctx.rows, ctx.with_mask_token, *ctx.dtypes, ctx.implementation
    )
    return grad_encoded, None, None, grad_position, grad_mask_token if ctx.with_mask_token else None, None


_pad_decoder = library.define(
    "pad_decoder(Tensor encoded, Tensor source, Tensor cu_seqlens, Tensor position_weight, "
    "Tensor? mask_token, str implementation) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_pad_decoder_backward = library.define(
    "pad_decoder_backward(Tensor grad, Tensor source, Tensor cu_seqlens, SymInt rows, bool with_mask_token, "
    "ScalarType encoded_dtype, ScalarType position_dtype, ScalarType mask_token_dtype, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
