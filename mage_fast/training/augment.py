"""Crops and flips, and the random numbers they read: a function of (seed, epoch, index) alone.

Neither the number of workers nor the order in which they finish changes an image, and a resumed run sees
the crops that the unbroken run would have seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from mage_fast.errors import InputError

#: Short side before the centre crop over the crop: 292 for 256, the evaluation crop of published results.
EVALUATION_RESIZE = 292 / 256
ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """How an image of any size becomes a square input.

    ``resize=True``: an image of any size will do, small ones are scaled up. ``resize=False``: the crop is
    taken at the image's own resolution, so every image must be at least as large as the crop.
    """

    crop: Literal["random", "center"] = "random"
    resize: bool = True
    #: Part of the image's area that a random crop covers.
    scale: tuple[float, float] = (0.2, 1.0)
    #: Width over height of a random crop, drawn log-uniformly.
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    #: Short side before a centre crop, over the crop; None: the source's own (292 / 256 for photographs).
    resize_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.crop not in ("random", "center"):
            raise InputError(f"Augmentation: crop is {self.crop!r}, wanted 'random' or 'center'")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"Augmentation: scale is {self.scale}, wanted 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"Augmentation: ratio is {self.ratio}, wanted 0 < low <= high")
        if self.resize_ratio is not None and self.resize_ratio < 1:
            raise InputError(f"Augmentation: resize_ratio is {self.resize_ratio}, wanted 1 or more")


#: By name: the pre-training recipe, its weak variant, the weak one without flip, a random window at the
#: image's own resolution, and evaluation.
AUGMENTATIONS = {
    "strong": Augmentation(),
    "weak": Augmentation(scale=(0.8, 1.0)),
    "weak-no-flip": Augmentation(scale=(0.8, 1.0), flip=False),
    "window": Augmentation(resize=False),
    "eval": Augmentation(crop="center", flip=False),
}


def named(augment: Augmentation | str) -> Augmentation:
    """The augmentation of a name.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(augment, Augmentation):
        return augment
    if augment not in AUGMENTATIONS:
        raise InputError(f"augment is {augment!r}, wanted one of {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[augment]


def item_generator(seed: int, epoch: int, index: int, view: int = 0) -> np.random.Generator:
    """The random numbers of one view of one image in one epoch."""
    return np.random.default_rng((seed, epoch, index, view) if view else (seed, epoch, index))


def augmented(
    image: Image.Image,
    size: int,
    augmentation: Augmentation,
    generator: np.random.Generator,
    *,
    default_resize_ratio: float = EVALUATION_RESIZE,
    name: str = "image",
) -> Image.Image:
    """An RGB image of ``size`` x ``size`` pixels.

    Raises:
        InputError: ``resize=False`` and the image is smaller than the crop.
    """
    if augmentation.crop == "center":
        ratio = (augmentation.resize_ratio or default_resize_ratio) if augmentation.resize else None
        image = center_crop(image, size, resize_ratio=ratio, name=name)
    elif augmentation.resize:
        image = random_resized_crop(
            image, size, scale=augmentation.scale, ratio=augmentation.ratio, generator=generator
        )
    else:
        image = random_crop(image, size, generator=generator, name=name)
    if augmentation.flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def without_flip(augmentation: Augmentation) -> Augmentation:
    """The same crop, never mirrored: for images whose mirror image means something else, as digits."""
    return replace(augmentation, flip=False)


def random_resized_crop(
    image: Image.Image,
    size: int,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: np.random.Generator,
) -> Image.Image:
    """Crop a random rectangle and resize it to a square, bicubic.

    The area is uniform in ``scale`` x the image's area, width over height log-uniform in ``ratio``, the
    place uniform. A draw that does not fit into the image is drawn again, up to ten times; then the whole
    image is taken (a very long image has no crop of the wanted shape).
    """
    width, height = image.size
    for _ in range(ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            break
    else:
        left, top, crop_width, crop_height = 0, 0, width, height
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def random_crop(
    image: Image.Image, size: int, *, generator: np.random.Generator, name: str = "image"
) -> Image.Image:
    """A ``size`` x ``size`` window of the image at its own resolution.

    Raises:
        InputError: the image is smaller than the crop.
    """
    require_size(image.size, size, name)
    left = int(generator.integers(image.width - size + 1))
    top = int(generator.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def center_crop(
    image: Image.Image, size: int, *, resize_ratio: float | None = EVALUATION_RESIZE, name: str = "image"
) -> Image.Image:
    """Resize the short side to ``size * resize_ratio`` (bicubic), then cut out the middle.

    ``resize_ratio=None`` cuts at the image's own resolution.

    Raises:
        InputError: nothing is resized and the image is smaller than the crop.
    """
    if resize_ratio is None:
        require_size(image.size, size, name)
    else:
        image = _without_ends(image)
        factor = round(size * resize_ratio) / min(image.size)
        resized = (max(size, round(image.width * factor)), max(size, round(image.height * factor)))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _without_ends(image: Image.Image, longest: int = 8) -> Image.Image:
    """The middle of a very long image: scaling up a 1 x 100000 strip whole would fill the memory."""
    width, height = (min(side, longest * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image


def require_size(image_size: tuple[int, int], crop: int, name: str = "image") -> None:
    """Refuse an image smaller than a crop that does not resize."""
    if min(image_size) < crop:
        width, height = image_size
        raise InputError(f"{name} is {width} x {height} pixels, wanted at least the crop of {crop} x {crop}")
