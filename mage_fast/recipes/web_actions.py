"""What the web page does, without the page: pixels and settings in, pictures out.

Images are uint8 [H, W, 3] of the model's size; pictures are images enlarged by whole pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.editing import edit, hide_tokens, reconstruct
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.recipes.inputs import evaluation_crop
from mage_fast.recipes.loading import Precision, image_size, precision_context
from mage_fast.sampler import generate
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.augment import applied
from mage_fast.training.data import batches
from mage_fast.training.images import UnreadableImage, read_rgb
from mage_fast.training.metrics import enlarged, to_uint8
from mage_fast.training.sources import Source

#: Held-out images that the page offers.
EXAMPLES = 18
#: Pixels along a side of a picture, about.
PICTURE_SIDE = 480

Pixels = UInt8[ndarray, "H W 3"]


@dataclass(frozen=True)
class Settings:
    """What the page's controls say, in their order; None is an empty field."""

    seed: int | None = 0
    variants: int = 4
    steps: int = SamplerConfig.steps
    choice_temperature: float = SamplerConfig.choice_temperature
    schedule: str = SamplerConfig.schedule
    #: Tokens by which an edit widens the paint on all sides.
    grow: int = 1
    #: Empty for none.
    label: str = ""
    guidance_scale: float = SamplerConfig.guidance_scale


class Result(NamedTuple):
    """The image as the model sees it, hidden tokens grey, and what the model makes of it."""

    seen: Pixels
    variants: list[Pixels]


class Actions:
    """A model, and the source whose images are the examples.

    Raises:
        InputError: a model without a tokenizer, a source of tokens, or one without a readable image.
        ValueError: a model that does not generate.
    """

    def __init__(self, model: MAGE, source: Source, precision: Precision = "fp32") -> None:
        self.side = image_size(model)
        if source.kind != "images":
            raise InputError(f"web: data {source.spec!r} holds tokens, wanted images as examples")
        Decoding(model)  # refuses a model that does not generate
        self.model, self.source, self.precision = model, source, precision
        self.device = model.head.bias.device
        self.zoom = max(1, round(PICTURE_SIDE / self.side))
        self.examples = self._examples()

    def _examples(self) -> list[Pixels]:
        """Some images of the source, spread over all of it and so over its classes."""
        count = min(EXAMPLES, len(self.source))
        items = range(0, len(self.source), len(self.source) // count)[:count]
        stream = batches(self.source, count, items=items, shuffle=False, drop_last=False, augment="eval")
        # rounded, as k / 255 * 255 may lie a little below k
        return [_pixels((image * 255).round().to(torch.uint8)) for image in next(stream).inputs]

    def read(self, path: Path | str) -> Pixels:
        """The image of a file, with the evaluation's crop unless it has the model's size.

        Raises:
            InputError: not an image, or a damaged one.
        """
        try:
            image = read_rgb(path)
        except UnreadableImage as error:
            raise InputError(f"{Path(path).name}: {error}") from error
        if image.size != (self.side, self.side):
            image = applied(
                image, evaluation_crop(image.size, self.side, self.source.resize_ratio), self.side
            )
        return np.array(image)

    def picture(self, image: Pixels) -> Pixels:
        """An image as the page shows it."""
        return image.repeat(self.zoom, 0).repeat(self.zoom, 1)

    def edit(self, image: Pixels, layers: Iterable[UInt8[ndarray, "h w 4"]], settings: Settings) -> Result:
        """Make anew what lies under the paint of RGBA layers of any size.

        Raises:
            InputError: nothing is painted, no seed, a label that is none of the model's, guidance alone.
        """
        mask_HW = painted(layers, self.side)
        if not mask_HW.any():
            raise InputError("nothing is painted over: paint over what shall change")
        image_13HW = self._batch(image)
        with precision_context(self.precision, self.device):
            edited = edit(
                self.model,
                image_13HW.expand(settings.variants, -1, -1, -1),
                mask_HW.expand(settings.variants, -1, -1),
                labels_B=self._labels(settings),
                config=self._sampler(settings, settings.guidance_scale),
                seed=_seed(settings),
                grow=settings.grow,
            )
        return self._result(image_13HW, edited.is_edited_BL[:1], edited.images_B3HW)

    def reconstruct(self, image: Pixels, settings: Settings) -> Result:
        """Hide 75% of the tokens at random and complete the image, without a class.

        Raises:
            InputError: no seed.
        """
        image_13HW = self._batch(image)
        with precision_context(self.precision, self.device):
            whole = reconstruct(
                self.model,
                image_13HW,
                tries=settings.variants,
                config=self._sampler(settings, guidance_scale=0.0),
                seed=_seed(settings),
            )
        return self._result(image_13HW, whole.is_masked_BL, whole.images_TB3HW[:, 0])

    def generate(self, settings: Settings) -> list[Pixels]:
        """Images from nothing.

        Raises:
            InputError: no seed, a label that is none of the model's, guidance alone.
        """
        with precision_context(self.precision, self.device):
            images_B3HW = generate(
                self.model,
                settings.variants,
                labels_B=self._labels(settings),
                config=self._sampler(settings, settings.guidance_scale),
                seed=_seed(settings),
            )
        return self._pictures(images_B3HW)

    def _batch(self, image: Pixels) -> Float[Tensor, "1 3 H W"]:
        return torch.from_numpy(image).permute(2, 0, 1)[None].to(self.device) / 255

    def _result(self, image_13HW: Tensor, is_hidden_1L: Tensor, images_B3HW: Tensor) -> Result:
        (seen,) = self._pictures(hide_tokens(image_13HW, is_hidden_1L))
        return Result(seen, self._pictures(images_B3HW))

    def _pictures(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> list[Pixels]:
        # + 0.5 of a level: a level that came in goes out as it was
        return [_pixels(image) for image in to_uint8(enlarged(images_B3HW + 0.5 / 255, self.zoom))]

    def _sampler(self, settings: Settings, guidance_scale: float) -> SamplerConfig:
        return SamplerConfig(
            steps=settings.steps,
            choice_temperature=settings.choice_temperature,
            schedule=settings.schedule,
            guidance_scale=guidance_scale,
        )

    def _labels(self, settings: Settings) -> Tensor | None:
        text, classes = settings.label.strip(), self.model.config.num_classes or 0
        if not text:
            if settings.guidance_scale:
                raise InputError("guidance weighs a class against none: give a class label too")
            return None
        numbers = {str(label): label for label in range(classes)}
        if text not in numbers:
            wanted = f"0 to {classes - 1}" if classes else "none: the model knows no classes"
            raise InputError(f"class label is {text[:20]!r}, wanted {wanted}")
        return torch.full((settings.variants,), numbers[text])


def painted(layers: Iterable[UInt8[ndarray, "h w 4"]], side: int) -> Bool[Tensor, "side side"]:
    """The pixels of an image on which any paint lies, of RGBA layers of any size."""
    mask_HW = torch.zeros(side, side, dtype=torch.bool)
    for layer in layers:
        alpha_1hw = torch.from_numpy(layer[None, :, :, 3].astype(np.float32))
        mask_HW |= F.adaptive_max_pool2d(alpha_1hw, side)[0] > 0
    return mask_HW


def _seed(settings: Settings) -> int:
    if settings.seed is None:
        raise InputError("seed is empty, wanted a whole number")
    return settings.seed


def _pixels(image_3HW: UInt8[Tensor, "3 H W"]) -> Pixels:
    return image_3HW.permute(1, 2, 0).contiguous().numpy()
