"""Crops and flips, and the random numbers they read: a function of (seed, epoch, index, view) alone.

Drawing a crop needs the size of an image only; what was drawn is applied here to a Pillow image, or to
pixels on another device (:mod:`mage_fast.training.device_augment`).

Neither the number of workers nor the order in which they finish changes an image, and a resumed run sees
the crops that the unbroken run would have seen.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from mage_fast.errors import InputError
from mage_fast.optional import optional

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
    #: RandAugment of the crop, in timm's words as "rand-m9-mstd0.5-inc1" (the extra finetune).
    rand_augment: str | None = None

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


class Crop(NamedTuple):
    """What was drawn for one view: the ``box`` of the image (left, top, right, bottom) becomes ``resized``
    (width, height) pixels, the input is cut out of these at ``corner`` (left, top), and mirrored or not. The
    ``seed`` is for what changes the pixels after that.
    """

    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    flip: bool
    seed: int = 0


def drawn(
    image_size: tuple[int, int],
    size: int,
    augmentation: Augmentation,
    generator: np.random.Generator,
    *,
    default_resize_ratio: float = EVALUATION_RESIZE,
    name: str = "image",
) -> Crop:
    """The crop of ``size`` x ``size`` pixels of an image of ``image_size`` (width, height).

    Raises:
        InputError: ``resize=False`` and the image is smaller than the crop.
    """
    box, resized = (0, 0, *image_size), image_size
    if not augmentation.resize:
        require_size(image_size, size, name)
    elif augmentation.crop == "random":
        box, resized = random_box(image_size, augmentation.scale, augmentation.ratio, generator), (size, size)
    else:
        box = _without_ends(image_size)
        width, height = box[2] - box[0], box[3] - box[1]
        factor = round(size * (augmentation.resize_ratio or default_resize_ratio)) / min(width, height)
        resized = (max(size, round(width * factor)), max(size, round(height * factor)))
    if augmentation.crop == "random" and not augmentation.resize:
        left, top = (int(generator.integers(side - size + 1)) for side in image_size)
    else:
        left, top = ((side - size) // 2 for side in resized)
    flip = augmentation.flip and bool(generator.random() < 0.5)
    seed = int(generator.integers(2**32)) if augmentation.rand_augment else 0
    return Crop(box, resized, (left, top), flip, seed)


def applied(
    image: Image.Image, crop: Crop, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The ``size`` x ``size`` pixels that a crop takes out of an image, resampled where it is resized."""
    left, top, right, bottom = crop.box
    if crop.resized == (right - left, bottom - top):
        image = image.crop(crop.box)
    else:
        image = image.resize(crop.resized, resample, box=crop.box)
    left, top = crop.corner
    image = image.crop((left, top, left + size, top + size))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else image


def rand_augmented(image: Image.Image, words: str, seed: int) -> Image.Image:
    """RandAugment as timm has it; the same for the same seed, and for nothing else.

    Args:
        image: RGB.
        words: timm's description of it, see :class:`Augmentation`.
        seed: of 32 bits.

    Raises:
        InputError: timm is not there, or does not understand the words.

    Source: Cubuk et al. 2020 (RandAugment), figure 2.
    """
    transform = _rand_augment(words, min(image.size))
    with _global_generators(seed):
        return transform(image)


def check_rand_augment(words: str) -> None:
    """Import timm, and let it read the words.

    Raises:
        InputError: timm is not there, or does not understand them.
    """
    _rand_augment(words, 256)


@lru_cache(maxsize=8)
def _rand_augment(words: str, size: int) -> Callable[[Image.Image], Image.Image]:
    timm: Any = optional("timm.data", extra="finetune")
    fill = tuple(round(255 * mean) for mean in timm.IMAGENET_DEFAULT_MEAN)
    options = {
        "translate_const": int(size * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    wanted = f"rand_augment is {words!r}, wanted timm's words, as 'rand-m9-mstd0.5-inc1'"
    for section in words.split("-")[1:]:
        if not re.match(r"t|[a-z]+\d", section):  # timm passes over it
            raise InputError(f"{wanted} ({section!r} has no number)")
    try:
        return timm.rand_augment_transform(words, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(f"{wanted} ({error})") from error


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """timm draws from Python's and NumPy's global generators: seeded inside, afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the ones that timm reads)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def without_flip(augmentation: Augmentation) -> Augmentation:
    """The same crop, never mirrored: for images whose mirror image means something else, as digits."""
    return replace(augmentation, flip=False)


def random_box(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """A random rectangle (left, top, right, bottom) of an image of (width, height).

    The area is uniform in ``scale`` x the image's area, width over height log-uniform in ``ratio``, the
    place uniform. A draw that does not fit into the image is drawn again, up to ten times; then the whole
    image is taken (a very long image has no crop of the wanted shape).
    """
    width, height = image_size
    for _ in range(ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height


def _without_ends(image_size: tuple[int, int], longest: int = 8) -> tuple[int, int, int, int]:
    """The middle of a very long image: scaling up a 1 x 100000 strip whole would fill the memory."""
    width, height = (min(side, longest * min(image_size)) for side in image_size)
    left, top = (image_size[0] - width) // 2, (image_size[1] - height) // 2
    return left, top, left + width, top + height


def require_size(image_size: tuple[int, int], crop: int, name: str = "image") -> None:
    """Refuse an image smaller than a crop that does not resize."""
    if min(image_size) < crop:
        width, height = image_size
        raise InputError(f"{name} is {width} x {height} pixels, wanted at least the crop of {crop} x {crop}")
