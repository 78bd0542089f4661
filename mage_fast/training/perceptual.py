"""The LPIPS distance of the optional package ``lpips``."""

from __future__ import annotations

import importlib

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mage_fast.errors import InputError


class PerceptualDistance(nn.Module):
    """LPIPS between images in [0, 1], mean over the batch; frozen, in float32.

    Args:
        net: the backbone, "vgg" as for the published tokenizers, "alex" or "squeeze". The first use
            downloads its weights through torchvision.

    Raises:
        InputError: the package is missing or does not load here, or the weights cannot be fetched.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric".
    """

    def __init__(self, net: str = "vgg") -> None:
        super().__init__()
        try:
            lpips = importlib.import_module("lpips")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            raise InputError(
                "perceptual_weight needs the lpips package: pip install mage-fast[lpips], or give 0 "
                f"({error})"
            ) from error
        try:
            self.distance: nn.Module = lpips.LPIPS(net=net, verbose=False)
        except OSError as error:
            raise InputError(
                f"perceptual_weight: the weights of {net!r} cannot be fetched ({error})"
            ) from error
        self.requires_grad_(False).eval()

    def forward(
        self, images_B3HW: Float[Tensor, "B 3 H W"], wanted_B3HW: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, ""]:
        """The gradient flows to both arguments."""
        with torch.autocast(images_B3HW.device.type, enabled=False):
            distance: Tensor = self.distance(images_B3HW.float() * 2 - 1, wanted_B3HW.float() * 2 - 1)
        return distance.mean()
