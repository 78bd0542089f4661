"""A patch discriminator for tokenizer training: its loss, and the weight of the generator's.

Source: Esser et al., "Taming transformers for high-resolution image synthesis", equations 6 and 7; the
discriminator is that of Isola et al., "Image-to-image translation with conditional adversarial networks".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mage_fast.errors import InputError

#: Smallest image for which a patch is left after one halving and the two last convolutions.
SMALLEST_IMAGE = 8


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches of images: high for real ones, low for reconstructions.

    Up to three 4x4 convolutions of stride 2, as many as leave 4 or more pixels a side, then two of stride 1;
    the published 70-pixel patches from 32-pixel images on. GroupNorm stands where the paper has BatchNorm:
    a score depends on its own image only, so real and reconstructed images share no statistics.

    Args:
        image_size: pixels a side.
        base_width: channels of the first layer.

    Raises:
        InputError: images under 8 pixels a side.
    """

    def __init__(self, image_size: int, base_width: int = 64) -> None:
        super().__init__()
        if image_size < SMALLEST_IMAGE:
            raise InputError(
                f"discriminator: image_size is {image_size}, wanted {SMALLEST_IMAGE} or more: train smaller "
                "images with adversarial_weight 0"
            )
        halvings = min(3, image_size.bit_length() - 3)
        widths = [base_width * min(2**level, 8) for level in range(halvings + 1)]
        layers: list[nn.Module] = [_conv4x4(3, base_width, stride=2), nn.LeakyReLU(0.2)]
        for level in range(1, halvings + 1):
            stride = 2 if level < halvings else 1
            layers += [
                _conv4x4(widths[level - 1], widths[level], stride=stride, bias=False),
                nn.GroupNorm(min(32, base_width), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, _conv4x4(widths[-1], 1, stride=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """The score of each patch of images in [0, 1]."""
        return self.layers(images_B3HW * 2 - 1)


def _conv4x4(inputs: int, outputs: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1, bias=bias)


def hinge_loss(real: Float[Tensor, "*any"], fake: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
    """The discriminator's loss, ``(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2``."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    adversarial_loss: Float[Tensor, ""],
    last_weight: Float[Tensor, "*any"],
    *,
    epsilon: float = 1e-6,
    largest: float = 1e4,
) -> Float[Tensor, ""]:
    """``|grad reconstruction| / (|grad adversarial| + epsilon)`` at the decoder's last weight, no gradient.

    With it both losses pull equally hard on the decoder. The graph stays for the backward that follows.
    """
    norms = [
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + epsilon)).clamp(max=largest)
