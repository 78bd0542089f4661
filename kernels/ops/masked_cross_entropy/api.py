"""``masked_cross_entropy``: label-smoothed cross-entropy over the masked rows.

Shape suffixes: N masked rows, C classes (the codebook).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def masked_cross_entropy(
    logits_NC: Float[Tensor, "N C"],
    targets_N: Int[Tensor, " N"],
    *,
    label_smoothing: float = 0.1,
    implementation: str = "auto",
) -> Float[Tensor, ""]:
    """Average the label-smoothed cross-entropy over the rows that have a target.

    Equivalent PyTorch, but 0 where no row has a target::

        F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=label_smoothing)

    Args:
        logits_NC: float64, float32, bfloat16 or float16.
        targets_N: int32 or int64 class of each row; -1: a padding row, which counts neither in the sum nor
            in the mean and gets no gradient, whatever its logits are.
        label_smoothing: weight of the mean over classes of -log p; the target's -log p weighs the rest.
        implementation: ``"auto"`` or the name of one.

    Returns:
        The mean loss in nats, computed and returned in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, no class, a dtype of the wrong kind, ``label_smoothing`` outside
            [0, 1], a target outside [-1, C) (read on the CPU or in ``device_values``).
        Unsupported: the forced implementation cannot run here.

    Source: MAGE paper, equation 1; label smoothing 0.1 as in the published recipe.
    """
    op = "masked_cross_entropy"
    check.shape(op, "logits", logits_NC, (None, None))
    check.features(op, "logits", logits_NC)
    check.floating(op, "logits", logits_NC)
    check.shape(op, "targets", targets_N, (logits_NC.shape[0],))
    check.integer(op, "targets", targets_N)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, wanted 0 <= label_smoothing <= 1")
    check.same_device(op, logits_NC, targets=targets_N)
    check.values(op, "targets", targets_N, -1, logits_NC.shape[1])
    implementation = dispatch.requested(op, implementation)
    return _masked_cross_entropy(logits_NC, targets_N, label_smoothing, implementation)[0]


def _fake(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, each row's log-sum-exp and the number of rows that have a target, at least 1."""
    loss = logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, loss.new_empty(targets.shape), torch.empty_like(loss)


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, ctx.label_smoothing, ctx.implementation = inputs
    _, lse, count = output
    ctx.mark_non_differentiable(lse, count)
    ctx.save_for_backward(logits, lse, count, targets)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    grad_logits = _masked_cross_entropy_backward(
        grad, *ctx.saved_tensors, ctx.label_smoothing, ctx.implementation
    )
    return grad_logits, None, None, None


_masked_cross_entropy = library.define(
    "masked_cross_entropy(Tensor logits, Tensor targets, float label_smoothing, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_masked_cross_entropy_backward = library.define(
    "masked_cross_entropy_backward(Tensor grad, Tensor logits, Tensor lse, Tensor count, Tensor targets, "
    "float label_smoothing, str implementation) -> Tensor",
    fake=_fake_backward,
)
