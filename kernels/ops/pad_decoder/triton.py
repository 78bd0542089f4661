"""The decoder's input as Triton kernels: gather and add forward, one pass over the gradient backward.

Backward: a program reads ``IMAGES x ROWS`` positions of the gradient once. It copies each row that one
position shows, sums over images what is the positions' gradient and over positions what is the padding's;
smaller kernels add these partial sums in a fixed order. A row's uses are counted in integers, whose sum does
not depend on the order; only rows of several uses, which no mask plan makes, are searched for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels.triton_sums import sum_partials
from mage_fast.kernels.triton_support import DEVICES, unsupported

__all__ = ["DEVICES", "pad_decoder", "pad_decoder_backward", "unsupported"]
#: What a program of the backward sums over: images one after another, positions side by side.
_IMAGES, _ROWS = 16, 8
_COLUMNS = 256
#: A row's uses are one int64: their number above these bits, the sum of their positions below.
_NUMBER = tl.constexpr(40)


@triton.jit
def _forward(
    encoded, source, cu_seqlens, position_weight, mask_token, out, positions, features,
    MASK_TOKEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < features
    row = tl.load(source + entry).to(tl.int64)
    shift = tl.load(position_weight + (entry % positions) * features + column, mask=inside, other=0.0)
    if MASK_TOKEN:
        own = tl.load(encoded + row * features + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        padding = tl.load(mask_token + column, mask=inside & (row < 0), other=0.0).to(tl.float32)
        x = tl.where(row < 0, padding, own)
    else:
        row = tl.where(row < 0, tl.load(cu_seqlens + entry // positions).to(tl.int64), row)
        x = tl.load(encoded + row * features + column, mask=inside, other=0.0).to(tl.float32)
    x += shift.to(tl.float32)
    tl.store(out + entry * features + column, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _count_uses(source, uses, entries, ENTRIES: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.load(source + entry, mask=entry < entries, other=-1).to(tl.int64)
    one = tl.full([ENTRIES], 1, tl.int64) << _NUMBER
    tl.atomic_add(uses + row, one + entry, mask=row >= 0, sem="relaxed")


@triton.jit
def _backward(
    grad, source, uses, grad_encoded, partial_position, partial_padding, batch, positions, features,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * IMAGES
    position = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (position < positions)[:, None] & (column < features)
    element = position[:, None].to(tl.int64) * features + column
    sum_position = tl.zeros([ROWS, COLUMNS], tl.float32)
    for image in range(first, min(first + IMAGES, batch)):
        entry = tl.cast(image, tl.int64) * positions
        g = tl.load(grad + entry * features + element, mask=inside, other=0.0)
        row = tl.load(source + entry + position, mask=position < positions, other=0).to(tl.int64)
        shown = row >= 0
        number = tl.load(uses + row, mask=shown & (position < positions), other=0) >> _NUMBER
        tl.store(
            grad_encoded + row[:, None] * features + column,
            g.to(grad_encoded.dtype.element_ty),
            mask=inside & (number == 1)[:, None],
        )
        g = g.to(tl.float32)
        sum_position += g
        padding = tl.sum(tl.where(shown[:, None], 0.0, g), 0)[None, :]
        partial = tl.cast(tl.program_id(1), tl.int64) * batch + image
        tl.store(partial_padding + partial * features + column, padding, mask=column < features)
    partial_position += tl.program_id(0).to(tl.int64) * positions * features
    tl.store(partial_position + element, sum_position, mask=inside)


@triton.jit
def _sum_of_uses(grad, source, use, row, entries, features, column, inside, ENTRIES: tl.constexpr):
    """The gradient of a row from the positions that show it, in their order, whatever their number."""
    number = use >> _NUMBER
    only = use & ((tl.full([], 1, tl.int64) << _NUMBER) - 1)
    total = tl.load(grad + only * features + column, mask=inside & (number == 1), other=0.0).to(tl.float32)
    if number > 1:
        for start in range(0, entries, ENTRIES):
            entry = start + tl.arange(0, ENTRIES)
            found = tl.load(source + entry, mask=entry < entries, other=-1) == row
            if tl.max(found.to(tl.int32), 0) > 0:
                for e in range(start, min(start + ENTRIES, entries)):
                    shown = tl.load(source + e) == row
                    address = grad + tl.cast(e, tl.int64) * features + column
                    total += tl.load(address, mask=inside & shown, other=0.0).to(tl.float32)
    return total


@triton.jit
def _rows_not_copied(
    grad, source, uses, grad_encoded, entries, features, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    use = tl.load(uses + row)
    if (use >> _NUMBER) != 1:
        column = tl.arange(0, COLUMNS)
        inside = column < features
        total = _sum_of_uses(grad, source, use, row, entries, features, column, inside, ENTRIES)
        total = total.to(grad_encoded.dtype.element_ty)
        tl.store(grad_encoded + row * features + column, total, mask=inside)


@triton.jit
def _class_rows(
    grad, source, uses, cu_seqlens, partial_padding, grad_encoded, batch, partials, entries, features,
    ENTRIES: tl.constexpr, PARTIALS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < features
    row = tl.load(cu_seqlens + image).to(tl.int64)
    before = tl.load(cu_seqlens + image - 1, mask=image > 0, other=-1).to(tl.int64)
    # images without a row of their own share the next image's class row: the first of them adds for all
    if before != row:
        use = tl.load(uses + row)
        total = _sum_of_uses(grad, source, use, row, entries, features, column, inside, ENTRIES)
        same = row == row
        while same:
            for start in range(0, partials, PARTIALS):
                partial = start + tl.arange(0, PARTIALS)[:, None]
                address = (
                    partial_padding + (partial.to(tl.int64) * batch + image) * features + column[None, :]
                )
                some = tl.load(address, mask=(partial < partials) & inside[None, :], other=0.0)
                total += tl.sum(some, 0)
            image += 1
            same = tl.load(cu_seqlens + image, mask=image < batch, other=-1).to(tl.int64) == row
        total = total.to(grad_encoded.dtype.element_ty)
        tl.store(grad_encoded + row * features + column, total, mask=inside)


def pad_decoder(
    encoded_TD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    position_weight_SD: Tensor,
    mask_token_D: Tensor | None,
) -> Tensor:
    features = encoded_TD.shape[1]
    dtype = torch.promote_types(encoded_TD.dtype, position_weight_SD.dtype)
    out_BSD = encoded_TD.new_empty((*source_BS.shape, features), dtype=dtype)
    if out_BSD.numel():
        encoded_TD = encoded_TD.contiguous()
        mask_token = encoded_TD if mask_token_D is None else mask_token_D.contiguous()
        columns = max(16, triton.next_power_of_2(features))
        _forward[(source_BS.numel(),)](
            encoded_TD, source_BS.contiguous(), cu_seqlens.contiguous(), position_weight_SD.contiguous(),
            mask_token, out_BSD, source_BS.shape[1], features, mask_token_D is not None, columns,
            num_warps=min(32, max(1, columns // 1024)),
        )  # fmt: skip
    return out_BSD


def pad_decoder_backward(
    grad_BSD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    rows: int,
    with_mask_token: bool,
    encoded_dtype: torch.dtype,
    position_dtype: torch.dtype,
    mask_token_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_BSD, source_BS = grad_BSD.contiguous(), source_BS.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    batch, positions, features = grad_BSD.shape
    new = grad_BSD.new_empty if grad_BSD.numel() else grad_BSD.new_zeros
    grad_encoded_TD = new((rows, features), dtype=encoded_dtype)
    grad_position_SD = new((positions, features), dtype=position_dtype)
    grad_mask_token_D = (new if with_mask_token else grad_BSD.new_zeros)((features,), dtype=mask_token_dtype)
    if not grad_BSD.numel():
        return grad_encoded_TD, grad_position_SD, grad_mask_token_D

    entries = batch * positions
    uses_T = source_BS.new_zeros(max(1, rows), dtype=torch.int64)
    _count_uses[(triton.cdiv(entries, 1024),)](source_BS, uses_T, entries, 1024)
    grid = (triton.cdiv(batch, _IMAGES), triton.cdiv(positions, _ROWS), triton.cdiv(features, _COLUMNS))
    position_PSD = grad_BSD.new_empty((grid[0], positions, features), dtype=torch.float32)
    padding_PBD = grad_BSD.new_empty((grid[1], batch, features), dtype=torch.float32)
    # a thread reads 16 bytes of each row
    _backward[grid](
        grad_BSD, source_BS, uses_T, grad_encoded_TD, position_PSD, padding_PBD, batch, positions, features,
        _IMAGES, _ROWS, _COLUMNS, num_warps=1 if grad_BSD.element_size() == 2 else 2,
    )  # fmt: skip
    sum_partials(position_PSD.view(1, grid[0], -1), grad_position_SD)
    if rows:
        columns = max(16, triton.next_power_of_2(features))
        _rows_not_copied[(rows,)](
            grad_BSD, source_BS, uses_T, grad_encoded_TD, entries, features, 256, columns,
            num_warps=min(32, max(1, columns // 1024)),
        )  # fmt: skip
    if with_mask_token:
        sum_partials(padding_PBD.view(1, -1, features), grad_mask_token_D)
    else:
        _class_rows[(batch, grid[2])](
            grad_BSD, source_BS, uses_T, cu_seqlens, padding_PBD, grad_encoded_TD, batch, grid[1], entries,
            features, 256, 16, _COLUMNS,
        )  # fmt: skip
    return grad_encoded_TD, grad_position_SD, grad_mask_token_D
