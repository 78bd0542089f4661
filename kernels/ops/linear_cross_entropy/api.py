"""``linear_cross_entropy``: a linear layer onto classes and its loss, without ever holding all logits.

Shape suffixes: N rows, D features, C classes (the codebook).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def linear_cross_entropy(
    hidden_ND: Float[Tensor, "N D"],
    weight_CD: Float[Tensor, "C D"],
    bias_C: Float[Tensor, " C"] | None,
    targets_N: Int[Tensor, " N"],
    *,
    label_smoothing: float = 0.1,
    implementation: str = "auto",
) -> Float[Tensor, ""]:
    """Average the label-smoothed cross-entropy of a linear layer's logits over the rows with a target.

    Equivalent PyTorch, but 0 where no row has a target::

        logits = F.linear(hidden, weight, bias)
        F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=label_smoothing)

    Where a gradient is wanted (decided by ``requires_grad`` and grad mode at the call) it is made in the
    forward, chunk of rows by chunk of rows, and scaled in the backward: no logits are kept, and a weight
    that is detached costs nothing.

    Args:
        hidden_ND: float64, float32, bfloat16 or float16. Under autocast it and the weight are cast first,
            as for ``F.linear``.
        weight_CD: in hidden's dtype.
        bias_C: floating, or None.
        targets_N: int32 or int64 class of each row; -1: a padding row, which counts neither in the sum nor
            in the mean and gets no gradient. Its hidden row must be finite where the weight's gradient is
            wanted (0 times inf is NaN in a matrix product).
        label_smoothing: weight of the mean over classes of -log p; the target's -log p weighs the rest.
        implementation: ``"auto"`` or the name of one.

    Returns:
        The mean loss in nats, in float32 (float64 for float64). Logits and their gradients are rounded to
        hidden's dtype; the losses, and the weight's and bias's gradients over chunks, add up in float32.

    Raises:
        ValueError: shapes or dtypes that disagree, no class, ``label_smoothing`` outside [0, 1], a target
            outside [-1, C) (looked for on the CPU only).
        Unsupported: the forced implementation cannot run here.

    Source: MAGE paper, equation 1, with the head's last product.
    """
    op = "linear_cross_entropy"
    check.shape(op, "hidden", hidden_ND, (None, None))
    check.floating(op, "hidden", hidden_ND)
    check.shape(op, "weight", weight_CD, (None, hidden_ND.shape[1]))
    if weight_CD.shape[0] == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight_CD.shape)}, wanted at least 1 class")
    check.shape(op, "targets", targets_N, (hidden_ND.shape[0],))
    check.integer(op, "targets", targets_N)
    if bias_C is not None:
        check.shape(op, "bias", bias_C, (weight_CD.shape[0],))
        check.floating(op, "bias", bias_C)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, wanted 0 <= label_smoothing <= 1")
    check.same_device(op, hidden_ND, weight=weight_CD, bias=bias_C, targets=targets_N)
    check.values(op, "targets", targets_N, -1, weight_CD.shape[0])
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(device)
        hidden_ND, weight_CD = hidden_ND.to(narrow), weight_CD.to(narrow)
    check.dtype(op, "weight", weight_CD, (hidden_ND.dtype,))
    wanted = [
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_ND, weight_CD, bias_C)
    ]
    implementation = dispatch.requested(op, implementation)
    return _linear_cross_entropy(
        hidden_ND, weight_CD, bias_C, targets_N, label_smoothing, *wanted, implementation
    )[0]


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float,
    with_hidden_gradient: bool, with_weight_gradient: bool, with_bias_gradient: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The mean, the number of rows that have a target, at least 1, and the sum's gradients or no element."""
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (
        loss,
        torch.empty_like(loss),
        hidden.new_empty(hidden.shape if with_hidden_gradient else 0),
        loss.new_empty(weight.shape if with_weight_gradient else 0),
        loss.new_empty(weight.shape[:1] if with_bias_gradient else 0),
    )


def _fake_backward(
    grad: Tensor, count: Tensor, grad_of_sum: Tensor, dtype: torch.dtype, implementation: str
) -> Tensor:
    return torch.empty_like(grad_of_sum, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, _, _, *wanted, ctx.implementation = inputs
    ctx.dtypes = [x.dtype if w else None for x, w in zip((hidden, weight, bias), wanted, strict=True)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    count, *sums = ctx.saved_tensors
    grads = [
        None if dtype is None else _linear_cross_entropy_backward(grad, count, x, dtype, ctx.implementation)
        for x, dtype in zip(sums, ctx.dtypes, strict=True)
    ]
    return (*grads, *[None] * 6)


_linear_cross_entropy = library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float label_smoothing, "
    "bool with_hidden_gradient, bool with_weight_gradient, bool with_bias_gradient, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_linear_cross_entropy_backward = library.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor count, Tensor grad_of_sum, ScalarType dtype, "
    "str implementation) -> Tensor",
    fake=_fake_backward,
)
