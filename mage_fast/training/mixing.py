"""Mixup and CutMix: images mixed in pairs, and the soft targets that go with them.

What is random is drawn on the host, so nothing waits for the device where the images are. Shape suffixes:
B images, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mage_fast.errors import InputError


class Mix(NamedTuple):
    """What was drawn for a batch: each image keeps this share of itself, and gives the rest to the one that
    stands as far from the end as it does from the start. With a ``box`` (left, top, right, bottom) that rest
    is a rectangle, else every pixel is a weighted mean.
    """

    share: float = 1.0
    box: tuple[int, int, int, int] | None = None

    def images(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """The mixed images; what was given stays as it is."""
        if self.box is not None:
            left, top, right, bottom = self.box
            mixed = images_BCHW.clone()
            mixed[..., top:bottom, left:right] = images_BCHW[..., top:bottom, left:right].flip(0)
            return mixed
        if self.share == 1.0:
            return images_BCHW
        return images_BCHW * self.share + images_BCHW.flip(0) * (1 - self.share)

    def targets(
        self, labels_B: Int[Tensor, "B"], num_classes: int, label_smoothing: float
    ) -> Float[Tensor, "B K"]:
        """Probabilities of the classes: mixed as the images are, with a part spread over all classes."""
        one_hot_BK = F.one_hot(labels_B.long(), num_classes).float()
        mixed_BK = one_hot_BK * self.share + one_hot_BK.flip(0) * (1 - self.share)
        return mixed_BK * (1 - label_smoothing) + label_smoothing / num_classes


@dataclass(frozen=True)
class Mixing:
    """The law of :class:`Mix`: Mixup or CutMix, each every other time where both are wanted.

    Raises:
        InputError: numbers that are negative or not finite.

    Source: Zhang et al. 2018 (mixup), section 2; Yun et al. 2019 (CutMix), section 3.1; one draw a batch, as
    MAE's and BEiT's fine-tuning has it.
    """

    #: The share's law is Beta(mixup, mixup); 0 mixes no pixels.
    mixup: float = 0.8
    #: The share's law is Beta(cutmix, cutmix); 0 cuts nothing out.
    cutmix: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.mixup < math.inf and 0 <= self.cutmix < math.inf):
            raise InputError(f"mixup is {self.mixup} and cutmix {self.cutmix}, wanted 0 or more")

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def drawn(self, height: int, width: int, generator: np.random.Generator) -> Mix:
        """A mix of images of this size."""
        if not self:
            return Mix()
        cuts = self.cutmix > 0 and (self.mixup == 0 or generator.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(generator.beta(alpha, alpha))
        if not cuts:
            return Mix(share)
        # a rectangle of that part of the area about any pixel; what lies outside of the image is not cut
        cut_height, cut_width = (int(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = (int(generator.integers(side)) for side in (height, width))
        top, left = max(y - cut_height // 2, 0), max(x - cut_width // 2, 0)
        bottom, right = min(y + (cut_height + 1) // 2, height), min(x + (cut_width + 1) // 2, width)
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (left, top, right, bottom))


def soft_cross_entropy(
    logits_BK: Float[Tensor, "B K"], targets_BK: Float[Tensor, "B K"]
) -> Float[Tensor, ""]:
    """Mean over the batch of ``-sum(targets * log_softmax(logits))``, in float32 or wider."""
    dtype = torch.promote_types(logits_BK.dtype, torch.float32)
    return F.cross_entropy(logits_BK.to(dtype), targets_BK.to(dtype))
