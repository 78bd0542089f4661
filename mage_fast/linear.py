"""The linear layer of every block: parameters of ``nn.Linear``, one call of the op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mage_fast.kernels.ops.linear.api import linear


def project(
    x: Float[Tensor, "*rows D"], weight_FD: Float[Tensor, "F D"], bias_F: Float[Tensor, " F"] | None = None
) -> Float[Tensor, "*rows F"]:
    """``F.linear``; within autocast x is cast, and the weight goes to the product as it is."""
    dtype = _autocast_dtype(x.device.type)
    return linear(x if dtype is None else x.to(dtype), weight_FD, bias_F)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on the device, None where it is off or there is none."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


class Linear(nn.Linear):
    """``nn.Linear`` that makes no copy of its weight in another dtype."""

    #: The weight in another dtype while :class:`RoundedWeights` lends it.
    rounded_FD: Tensor | None = None

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        return project(x, self._factor, self.bias)

    def product(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """Without the bias, which an op behind it adds."""
        return project(x, self._factor)

    @property
    def _factor(self) -> Tensor:
        return self.weight if self.rounded_FD is None else self.rounded_FD


class RoundedWeights:
    """Copies of a model's linear weights in autocast's dtype, for work that reads the same ones many times.

    The copies keep their memory from one use to the next, as CUDA graphs want it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, Linear)]
        self._copies: list[Tensor] = []

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, products read copies of the weights as they are now; without autocast, the weights."""
        weights = [layer.weight.detach() for layer in self._layers]
        device = weights[0].device if weights else torch.device("cpu")
        dtype = _autocast_dtype(device.type)
        if dtype is None or not weights:
            yield
            return
        if [(copy.dtype, copy.device) for copy in self._copies[:1]] != [(dtype, device)]:
            self._copies = [weight.to(dtype) for weight in weights]
        else:
            torch._foreach_copy_(self._copies, weights)
        try:
            for layer, copy in zip(self._layers, self._copies, strict=True):
                layer.rounded_FD = copy
            yield
        finally:
            for layer in self._layers:
                layer.rounded_FD = None
