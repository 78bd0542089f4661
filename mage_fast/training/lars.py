"""LARS, the optimizer of the published linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mage_fast.errors import InputError


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: a step of a matrix is in proportion to the matrix's own norm.

    For a tensor w of two or more dimensions with gradient g, norms over the whole tensor::

        trust = trust_coefficient * |w| / (|g| + weight_decay * |w|)      # 1 where |w| or |g| is 0
        m = momentum * m + trust * (g + weight_decay * w)
        w = w - lr * m

    Of 1-D tensors (biases) ``trust`` is 1 and there is no weight decay: SGD with momentum. As in
    ``torch.optim.SGD``, and unlike algorithm 1 of the source, ``lr`` multiplies the sum and not what goes
    into it; the two differ where lr changes. Norms and sums are in the tensors' dtype, all tensors of a group
    are updated in a few fused calls, and nothing is read on the host.

    Args:
        parameters: tensors or groups, as any optimizer of torch takes them.
        lr: learning rate, the same for all layers.
        momentum: of the sum m, in [0, 1).
        weight_decay: beta of the source.
        trust_coefficient: eta of the source.

    Raises:
        InputError: a number out of range.

    Source: You, Gitman and Ginsburg 2017, Large Batch Training of Convolutional Networks, equation 6 and
    algorithm 1.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and trust_coefficient > 0):
            raise InputError(
                f"Lars: lr {lr}, momentum {momentum}, weight_decay {weight_decay}, trust_coefficient "
                f"{trust_coefficient}: wanted lr and weight_decay 0 or more, 0 <= momentum < 1 and a "
                "trust_coefficient above 0"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults | {"trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all tensors that have a gradient; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            matrices, vectors = ([p for p in found if (p.ndim > 1) == wide] for wide in (True, False))
            if matrices:
                self._apply(group, matrices, _scaled_gradients(group, matrices))
            if vectors:
                self._apply(group, vectors, [p.grad for p in vectors if p.grad is not None])
        return loss

    def _apply(self, group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor]) -> None:
        sums = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            sums.append(state["momentum_buffer"])
        torch._foreach_mul_(sums, group["momentum"])
        torch._foreach_add_(sums, updates)
        torch._foreach_add_(parameters, sums, alpha=-group["lr"])


def _scaled_gradients(group: dict[str, Any], matrices: list[Tensor]) -> list[Tensor]:
    """``trust * (g + weight_decay * w)`` of each."""
    gradients = [p.grad for p in matrices if p.grad is not None]
    sizes, gradient_sizes = torch._foreach_norm(matrices), torch._foreach_norm(gradients)
    denominators = torch._foreach_add(gradient_sizes, sizes, alpha=group["weight_decay"])
    ratios = torch._foreach_div(torch._foreach_mul(sizes, group["trust_coefficient"]), denominators)
    found = zip(ratios, sizes, gradient_sizes, strict=True)
    trusts = [ratio.where((w > 0) & (g > 0), 1.0) for ratio, w, g in found]
    updates = torch._foreach_add(gradients, matrices, alpha=group["weight_decay"])
    torch._foreach_mul_(updates, trusts)
    return list(updates)
