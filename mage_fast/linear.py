"""The linear layer of every block: parameters of ``nn.Linear``, one call of the op."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mage_fast.kernels.ops.linear.api import linear


def project(
    x: Float[Tensor, "*rows D"], weight_FD: Float[Tensor, "F D"], bias_F: Float[Tensor, " F"] | None = None
) -> Float[Tensor, "*rows F"]:
    """``F.linear``; within autocast x is cast, and the weight goes to the product as it is."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return linear(x, weight_FD, bias_F)


class Linear(nn.Linear):
    """``nn.Linear`` that makes no copy of its weight in another dtype."""

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        return project(x, self.weight, self.bias)

    def product(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """Without the bias, which an op behind it adds."""
        return project(x, self.weight)
