"""Label-smoothed cross-entropy as Triton kernels: the forward reads the logits once, the backward reads
and writes once.

A program owns a row. A row that fits the registers is one tile; a longer one is walked over in tiles with a
running maximum and sum. The number of classes is a constant of the kernel, as a codebook has one size and
its masks then vanish. :func:`row_losses` can also turn the logits into their gradient where they lie,
which :mod:`~mage_fast.kernels.ops.linear_cross_entropy.triton` does to its chunks. The mean is a sum in a
fixed order by one program: equal at each run, and its count never leaves the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mage_fast.kernels.triton_support import DEVICES, unit_stride, unsupported

__all__ = ["DEVICES", "masked_cross_entropy", "masked_cross_entropy_backward", "unsupported"]
#: Elements that a warp holds, 32 a lane; rows of up to _ONE_TILE classes stay in registers (16 warps).
_A_WARP, _ONE_TILE = 1024, 16384
#: Tile of longer rows, 8 elements a lane as each has a running sum or two, and of the backward.
_TILE, _TILE_WARPS = 4096, 16
#: Row losses that the mean reads at a time.
_LOSSES = 4096


@triton.jit
def _gradient(p, column, target, smoothing, CLASSES: tl.constexpr, SMOOTHING: tl.constexpr):
    """d row loss / d logits of probabilities ``p``."""
    if SMOOTHING:
        p -= smoothing / CLASSES
    return tl.where(column == target, p - (1.0 - smoothing), p)


@triton.jit
def _rows(
    logits, targets, losses, lse, stride, smoothing,
    SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int32)
    logits += row * stride
    columns = tl.arange(0, TILE)
    if target < 0:
        # no valid row's loss can be -inf, so the mean knows by it that the row does not count
        tl.store(losses + row, float("-inf"))
        if GRADIENT:
            for start in range(0, CLASSES, TILE):
                column = start + columns
                zeros = tl.zeros([TILE], logits.dtype.element_ty)
                tl.store(logits + column, zeros, mask=column < CLASSES)
        else:
            tl.store(lse + row, 0.0)
    else:
        hit = tl.load(logits + target).to(tl.float32)
        if CLASSES <= TILE:
            x = tl.load(logits + columns, mask=columns < CLASSES, other=float("-inf")).to(tl.float32)
            maximum = tl.max(x, 0)
            e = tl.exp(x - maximum)
            total = tl.sum(e, 0)
            if SMOOTHING:
                sum_x = tl.sum(tl.where(columns < CLASSES, x, 0.0), 0)
        else:
            maximum = float("-inf")
            sums = tl.zeros([TILE], tl.float32)
            sums_x = tl.zeros([TILE], tl.float32)
            for start in range(0, CLASSES, TILE):
                inside = start + columns < CLASSES
                x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
                higher = tl.maximum(maximum, tl.max(x, 0))
                # while all that was seen is -inf, any finite shift will do
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                sums = sums * tl.exp(maximum - shift) + tl.exp(x - shift)
                maximum = higher
                if SMOOTHING:
                    sums_x += tl.where(inside, x, 0.0)
            total = tl.sum(sums, 0)
            sum_x = tl.sum(sums_x, 0)
        log_sum = maximum + tl.log(total)
        loss = log_sum - hit
        if SMOOTHING:
            loss = (1.0 - smoothing) * loss + smoothing * (log_sum - sum_x / CLASSES)
        tl.store(losses + row, loss)
        if not GRADIENT:
            tl.store(lse + row, log_sum)
        elif CLASSES <= TILE:
            grad = _gradient(e * (1.0 / total), columns, target, smoothing, CLASSES, SMOOTHING)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < CLASSES)
        else:
            for start in range(0, CLASSES, TILE):
                column = start + columns
                x = tl.load(logits + column, mask=column < CLASSES, other=0.0).to(tl.float32)
                grad = _gradient(tl.exp(x - log_sum), column, target, smoothing, CLASSES, SMOOTHING)
                tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < CLASSES)


@triton.jit
def _mean(losses, loss, count, rows, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        x = tl.load(losses + row, mask=row < rows, other=float("-inf"))
        counts_here = x != float("-inf")
        sums += tl.where(counts_here, x, 0.0)
        counts += counts_here.to(tl.int32)
    valid = tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    tl.store(loss, tl.sum(sums, 0) / valid)
    tl.store(count, valid)


@triton.jit
def _backward(
    grad, logits, lse, count, targets, grad_logits, stride, smoothing,
    SMOOTHING: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < CLASSES
    target = tl.load(targets + row).to(tl.int32)
    # rows without a target are not read: whatever stands in them, their gradient is 0
    x = tl.load(logits + row * stride + column, mask=inside & (target >= 0), other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(lse + row))
    scale = tl.load(grad).to(tl.float32) / tl.load(count)
    grad_x = _gradient(p, column, target, smoothing, CLASSES, SMOOTHING) * scale
    grad_x = tl.where(target >= 0, grad_x, 0.0).to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + row * CLASSES + column, grad_x, mask=inside)


def row_losses(
    logits_NC: Tensor, targets_N: Tensor, label_smoothing: float, losses_N: Tensor, lse_N: Tensor | None
) -> None:
    """Write each row's loss, -inf where it has no target, and its log-sum-exp.

    Without ``lse_N`` the logits become d loss / d logits of their row instead, in place.
    """
    rows, classes = logits_NC.shape
    if rows:
        assert 1 in (logits_NC.stride(1), classes)
        tile, warps = _TILE, _TILE_WARPS
        if classes <= _ONE_TILE:
            tile = triton.next_power_of_2(classes)
            warps = _warps(tile)
        _rows[(rows,)](
            logits_NC, targets_N, losses_N, losses_N if lse_N is None else lse_N, logits_NC.stride(0),
            label_smoothing, label_smoothing > 0.0, lse_N is None, classes, tile, num_warps=warps,
        )  # fmt: skip


def mean(losses_N: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the rows that have a target, and their number, at least 1; both float32."""
    loss, count = losses_N.new_empty(()), losses_N.new_empty(())
    _mean[(1,)](losses_N, loss, count, losses_N.shape[0], BLOCK=_LOSSES, num_warps=16)
    return loss, count


def masked_cross_entropy(
    logits_NC: Tensor, targets_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NC, targets_N = unit_stride(logits_NC), targets_N.contiguous()
    losses_N = torch.empty(targets_N.shape, dtype=torch.float32, device=targets_N.device)
    lse_N = torch.empty_like(losses_N)
    row_losses(logits_NC, targets_N, label_smoothing, losses_N, lse_N)
    loss, count = mean(losses_N)
    return loss, lse_N, count


def masked_cross_entropy_backward(
    grad: Tensor, logits_NC: Tensor, lse_N: Tensor, count: Tensor, targets_N: Tensor, label_smoothing: float
) -> Tensor:
    logits_NC, targets_N = unit_stride(logits_NC), targets_N.contiguous()
    rows, classes = logits_NC.shape
    grad_NC = torch.empty_like(logits_NC, memory_format=torch.contiguous_format)
    if rows:
        tile = min(triton.next_power_of_2(classes), _TILE)
        _backward[(rows, triton.cdiv(classes, tile))](
            grad, logits_NC, lse_N.contiguous(), count, targets_N, grad_NC, logits_NC.stride(0),
            label_smoothing, label_smoothing > 0.0, classes, tile, num_warps=_warps(tile),
        )  # fmt: skip
    return grad_NC


def _warps(tile: int) -> int:
    return max(1, tile // _A_WARP)
