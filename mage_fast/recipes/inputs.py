"""Images that a recipe is given to work on: a file, a folder, or a data source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.training.augment import EVALUATION_RESIZE, Crop, applied, drawn, item_generator, named
from mage_fast.training.data import KNOWN_SOURCES, open_source
from mage_fast.training.images import UnreadableImage, read_rgb
from mage_fast.training.sources import Source, Split


class Pictures(NamedTuple):
    """Images after the evaluation's crop, and what was cropped of each."""

    images_B3HW: Float[Tensor, "B 3 H W"]
    #: (width, height) before the crop.
    sizes: list[tuple[int, int]]
    crops: list[Crop]
    names: list[str]

    def masks(self, mask: Callable[[tuple[int, int]], Bool[np.ndarray, "H W"]]) -> Bool[Tensor, "B H W"]:
        """The masks that ``mask`` makes of each image's size before the crop, cropped as the images are.

        A pixel is masked if any of the image's own that it comes from is: thin lines do not vanish.

        Raises:
            InputError: ``mask`` refuses a size, or the crop leaves nothing of a mask; with the image's name.
        """
        side, masks = self.images_B3HW.shape[2], []
        for size, crop, name in zip(self.sizes, self.crops, self.names, strict=True):
            try:
                whole = Image.fromarray(mask(size).astype(np.float32))
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error
            cropped = torch.from_numpy(np.asarray(applied(whole, crop, side, Image.Resampling.BOX)) > 0)
            if not cropped.any():
                raise InputError(
                    f"{name}: the mask is empty within the crop, which keeps the pixels from (left, top) "
                    "{} to (right, bottom) {} of {} x {}".format(*_kept(crop, side), *size)
                )
            masks.append(cropped)
        return torch.stack(masks)


def read_pictures(spec: str, count: int, *, image_size: int, split: Split = "test") -> Pictures:
    """The first ``count`` images, or as many as there are, in [0, 1].

    Args:
        spec: an image file, a folder of images, which is taken whole, or a data source of images.
        count: how many.
        image_size: pixels along a side of the crop.
        split: of a data source.

    Raises:
        InputError: nothing of that name, no images, a damaged image.
    """
    if count < 1:
        raise InputError(f"count is {count}, wanted 1 or more")
    path = Path(os.path.expanduser(spec))
    if spec == "digits":  # to all verbs the source, whatever lies here; a folder of that name is ./digits
        source = open_source(spec, image_size=image_size, split=split)
    elif path.is_file():
        return _cropped([_read(path)], [str(path)], image_size, EVALUATION_RESIZE)
    elif path.is_dir():
        source = open_source(f"folder:{path}", image_size=image_size, split="all")
    elif ":" in spec:
        source = open_source(spec, image_size=image_size, split=split)
    else:
        raise InputError(
            f"images {spec!r}: there is no such file or folder, nor is it one of {KNOWN_SOURCES}"
        )
    if source.kind != "images":
        raise InputError(f"images {spec!r} is a source of {source.kind}, wanted images")
    indices = range(min(count, len(source)))
    images = [_of(source, index) for index in indices]
    return _cropped(images, [source.name(index) for index in indices], image_size, source.resize_ratio)


def fingerprint(pixels: Tensor) -> str:
    """SHA-256 of images or masks, the first part of it: tells one input from another."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:12]


def evaluation_crop(size: tuple[int, int], image_size: int, resize_ratio: float = EVALUATION_RESIZE) -> Crop:
    """What the evaluation takes of an image of ``size`` (width, height)."""
    unused = item_generator(0, 0, 0)  # it draws nothing
    return drawn(size, image_size, named("eval"), unused, default_resize_ratio=resize_ratio)


def read_mask(path: Path) -> Bool[np.ndarray, "H W"]:
    """An image file as a mask: True where it is white or transparent.

    Raises:
        InputError: missing, damaged, or nowhere white.
    """
    mask = np.asarray(_read(path).convert("L")) >= 128
    if not mask.any():
        raise InputError(f"{path} is black everywhere, wanted white where the image is to be made anew")
    return mask


def _read(path: Path) -> Image.Image:
    try:
        return read_rgb(path)
    except UnreadableImage as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _of(source: Source, index: int) -> Image.Image:
    try:
        return source.image(index)
    except UnreadableImage as error:
        raise InputError(f"{source.name(index)} cannot be read: {error}") from error


def _cropped(images: list[Image.Image], names: list[str], image_size: int, resize_ratio: float) -> Pictures:
    crops = [evaluation_crop(image.size, image_size, resize_ratio) for image in images]
    pixels = [np.asarray(applied(*pair, image_size)) for pair in zip(images, crops, strict=True)]
    levels_B3HW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Pictures(levels_B3HW / 255, [image.size for image in images], crops, names)


def _kept(crop: Crop, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The corners, in pixels of the image, of what a crop keeps."""
    scale = [(crop.box[i + 2] - crop.box[i]) / crop.resized[i] for i in (0, 1)]
    first = [crop.box[i] + crop.corner[i] * scale[i] for i in (0, 1)]
    last = [first[i] + side * scale[i] for i in (0, 1)]
    return (round(first[0]), round(first[1])), (round(last[0]), round(last[1]))
