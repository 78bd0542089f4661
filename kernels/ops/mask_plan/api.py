"""``mask_plan``: which tokens of each sample are masked and dropped, as packed indices.

Shape suffixes: B samples, L tokens a sample, S = L + 1 positions (0 is the class token), T packed encoder
rows, V visible rows (those of class tokens and unmasked tokens), N masked tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Int32, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library
from mage_fast.kernels.ops.mask_plan.reference import plan_tensors


class MaskPlan(NamedTuple):
    """Indices that drive the encoder, the decoder's padding and the loss."""

    #: Flat index ``b * S + p`` of each packed encoder row; a sample's class token first, then ascending.
    positions_T: Int32[Tensor, "T"]
    #: Packed rows of sample b: ``cu_seqlens[b] : cu_seqlens[b + 1]``.
    cu_seqlens: Int32[Tensor, "B+1"]
    #: Flat index ``b * L + l`` of each masked token, ascending; -1 fills up to ``total_masked``.
    masked_index_N: Int32[Tensor, "N"]
    #: Visible row that feeds each decoder position; -1 where the token is masked.
    source_BS: Int32[Tensor, "B S"]
    is_masked_BL: Bool[Tensor, "B L"]
    #: Packed row of each visible row, ascending; row 0 fills up to ``total_visible``. None: all are visible.
    visible_V: Int32[Tensor, "V"] | None
    #: First visible row of each sample, which is its class token's, and their number.
    visible_cu_seqlens: Int32[Tensor, "B+1"]
    #: Rows of the longest packed sequence, known on the host.
    max_seqlen: int


def mask_plan(
    rng_state: Int64[Tensor, "2"],
    num_masked_B: Int[Tensor, "B"],
    num_dropped_B: Int[Tensor, "B"],
    length: int,
    *,
    total_masked: int,
    total_kept: int,
    total_visible: int | None,
    max_seqlen: int,
    stream: int = 0,
    implementation: str = "auto",
) -> MaskPlan:
    """Mask ``num_masked`` tokens of each sample at random and drop the first ``num_dropped`` of them.

    Equivalent PyTorch::

        rank = torch.rand(B, L).argsort(1).argsort(1)
        is_masked, is_dropped = rank < num_masked[:, None], rank < num_dropped[:, None]
        positions = torch.cat([ones(B, 1), ~is_dropped], 1).flatten().nonzero()
        masked_index = is_masked.flatten().nonzero()
        visible = torch.cat([ones(B, 1), ~is_masked], 1).flatten()[positions].nonzero()

    Args:
        rng_state: int64 ``(seed, step)``.
        num_masked_B: int32 or int64, masked tokens of each sample.
        num_dropped_B: likewise; the encoder does not see these. ``0 <= dropped <= masked <= length``.
        length: L, tokens a sample.
        total_masked: size of ``masked_index_N``: the sum of ``num_masked``, or more (-1 fills up).
        total_kept: T, the sum over samples of ``1 + length - num_dropped``. Given by the caller, who
            knows the counts on the host, so that nothing waits for the device.
        total_visible: V, size of ``visible_V``: the sum of ``1 + length - num_masked``, or more (row 0 fills
            up). None where all masked tokens are dropped: then packed rows and visible rows are the same.
        max_seqlen: the largest ``1 + length - num_dropped``.
        stream: random stream; row of the counter is the sample.
        implementation: ``"auto"`` or the name of one.

    Returns:
        A :class:`MaskPlan`, int32 indices. Counts are exact: ties of the random words are broken by position.

    Raises:
        ValueError: counts of another shape, or (read on the CPU or in ``device_values``) out of range or not
            the totals given.
        Unsupported: the forced implementation cannot run here.

    Source: MAGE section 3.1, "Pre-training"; masking of spec "Masking (per training step)".
    """
    check.state("mask_plan", rng_state)
    check.shape("mask_plan", "num_masked", num_masked_B, (None,))
    check.shape("mask_plan", "num_dropped", num_dropped_B, tuple(num_masked_B.shape))
    check.integer("mask_plan", "num_masked", num_masked_B)
    check.integer("mask_plan", "num_dropped", num_dropped_B)
    check.same_device("mask_plan", rng_state, num_masked=num_masked_B, num_dropped=num_dropped_B)
    if length < 1:
        raise ValueError(f"mask_plan: length is {length}, wanted at least 1")
    if check.readable(num_masked_B) and check.readable(num_dropped_B):
        masked_B, dropped_B = num_masked_B.tolist(), num_dropped_B.tolist()
        check.numbers("mask_plan", "num_masked", masked_B, 0, length + 1)
        check.numbers("mask_plan", "num_dropped", dropped_B, 0, length + 1)
        if any(dropped > masked for masked, dropped in zip(masked_B, dropped_B, strict=True)):
            raise ValueError(
                "mask_plan: num_dropped is over num_masked in a sample, wanted at most num_masked"
            )
        kept = (length + 1) * len(dropped_B) - sum(dropped_B)
        masked = sum(masked_B)
        visible = (length + 1) * len(masked_B) - masked
        longest = length + 1 - min(dropped_B, default=length + 1)
        all_visible = total_visible is None and kept == visible
        if (
            total_kept != kept
            or total_masked < masked
            or not (all_visible or (total_visible is not None and total_visible >= visible))
            or max_seqlen < longest
        ):
            raise ValueError(
                "mask_plan: (total_kept, total_masked, total_visible, max_seqlen) is "
                f"{(total_kept, total_masked, total_visible, max_seqlen)}, the counts give "
                f"{(kept, masked, visible, longest)}"
            )
    tensors = _mask_plan(
        rng_state, num_masked_B, num_dropped_B, length, total_masked, total_kept, total_visible or 0, stream,
        dispatch.requested("mask_plan", implementation),
    )  # fmt: skip
    return _plan(tensors, total_visible is None, max_seqlen)


def _plan(tensors: tuple[Tensor, ...], all_visible: bool, max_seqlen: int) -> MaskPlan:
    positions, cu_seqlens, masked_index, source, is_masked, visible, visible_cu_seqlens = tensors
    return MaskPlan(
        positions,
        cu_seqlens,
        masked_index,
        source,
        is_masked,
        None if all_visible else visible,
        visible_cu_seqlens,
        max_seqlen,
    )


def plan_of_mask(
    is_masked_BL: Bool[Tensor, "B L"],
    num_masked: Sequence[int],
    is_dropped_BL: Bool[Tensor, "B L"] | None = None,
    num_dropped: Sequence[int] | None = None,
) -> MaskPlan:
    """The plan of given masks (decoding, probing); nothing waits for the device.

    Args:
        is_masked_BL: bool mask on any device.
        num_masked: its row sums.
        is_dropped_BL: masked tokens that the encoder does not see at all, not even as [M]; none by default.
        num_dropped: its row sums.

    Raises:
        ValueError: masks that are not bool ``[B, L]``, or another number of counts than samples.
    """
    check.shape("plan_of_mask", "is_masked", is_masked_BL, (None, None))
    check.dtype("plan_of_mask", "is_masked", is_masked_BL, (torch.bool,))
    batch, length = is_masked_BL.shape
    if is_dropped_BL is None:
        is_dropped_BL, num_dropped = torch.zeros_like(is_masked_BL), [0] * batch
    check.shape("plan_of_mask", "is_dropped", is_dropped_BL, (batch, length))
    check.dtype("plan_of_mask", "is_dropped", is_dropped_BL, (torch.bool,))
    if num_dropped is None or not len(num_masked) == len(num_dropped) == batch:
        raise ValueError(
            f"plan_of_mask: num_masked is {num_masked} and num_dropped {num_dropped}, wanted {batch} counts"
        )
    kept = [length + 1 - count for count in num_dropped]
    total_masked, all_visible = sum(num_masked), list(num_dropped) == list(num_masked)
    total_visible = 0 if all_visible else batch * (length + 1) - total_masked
    tensors = plan_tensors(is_masked_BL, is_dropped_BL, total_masked, sum(kept), total_visible)
    return _plan(tensors, all_visible, max(kept, default=0))


def _fake(
    state: Tensor,
    masked: Tensor,
    dropped: Tensor,
    length: int,
    total_masked: int,
    total_kept: int,
    total_visible: int,
    *_: Any,
) -> tuple[Tensor, ...]:
    batch = masked.shape[0]
    return (
        state.new_empty(total_kept, dtype=torch.int32),
        state.new_empty(batch + 1, dtype=torch.int32),
        state.new_empty(total_masked, dtype=torch.int32),
        state.new_empty((batch, length + 1), dtype=torch.int32),
        state.new_empty((batch, length), dtype=torch.bool),
        state.new_empty(total_visible, dtype=torch.int32),
        state.new_empty(batch + 1, dtype=torch.int32),
    )


_mask_plan = library.define(
    "mask_plan(Tensor rng_state, Tensor num_masked, Tensor num_dropped, SymInt length, SymInt total_masked, "
    "SymInt total_kept, SymInt total_visible, SymInt stream, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
