"""Editing: a part of an image is made anew by decoding its tokens again, given all the others.

Shape suffixes: B images, H and W pixels, L tokens an image, T tries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.kernels import check, rng
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig

GREY = 0.5


class Edited(NamedTuple):
    """What :func:`edit` returns."""

    #: RGB, about [0, 1], not clamped; decoded from all tokens.
    images_B3HW: Float[Tensor, "B 3 H W"]
    ids_BL: Int64[Tensor, "B L"]
    #: The tokens that were made anew.
    is_edited_BL: Bool[Tensor, "B L"]


class Reconstructed(NamedTuple):
    """What :func:`reconstruct` returns."""

    #: RGB, about [0, 1], not clamped; decoded from all tokens.
    images_TB3HW: Float[Tensor, "T B 3 H W"]
    ids_TBL: Int64[Tensor, "T B L"]
    #: The tokens that were hidden.
    is_masked_BL: Bool[Tensor, "B L"]


def edit(
    model: MAGE,
    images_B3HW: Float[Tensor, "B 3 H W"],
    mask_BHW: Bool[Tensor, "B H W"],
    *,
    labels_B: Int[Tensor, "B"] | None = None,
    config: SamplerConfig | None = None,
    seed: int | None = None,
    batch_size: int = 64,
    grow: int = 1,
) -> Edited:
    """Make the masked part of each image anew, given the rest; with labels, as a part of that class.

    Tokens of the rest stay exactly as they were. Their pixels stay only about so: all pixels are decoded from
    tokens, each from those around it too.

    >>> mask_BHW = torch.zeros(len(images), 256, 256, dtype=torch.bool)
    >>> mask_BHW[:, 64:192, 64:192] = True
    >>> edited = mage_fast.edit(model, images, mask_BHW, seed=0)

    Args:
        model: any :class:`MAGE` with a tokenizer.
        images_B3HW: RGB in [0, 1], of the tokenizer's size.
        mask_BHW: bool, True where a pixel is to be made anew; empty and full masks will do.
        labels_B: class labels; unconditional by default. ``config.guidance_scale`` weighs them.
        config: settings; the published release's by default.
        seed: the same seed gives the same images whatever the batch size; drawn from torch's global
            generator by default.
        batch_size: images at a time.
        grow: tokens by which the mask is widened on all sides, see :func:`token_mask`.

    Raises:
        ValueError: no tokenizer, a mask that is not boolean or of another size than the images, images of
            another size than the tokenizer's or far outside of [0, 1], labels that do not fit, numbers out of
            range.

    Source: MAGE, appendix (image editing).
    """
    _check("edit", model, images_B3HW, batch_size)
    check.shape("edit", "mask", mask_BHW, (len(images_B3HW), *images_B3HW.shape[2:]))
    model.class_ids(labels_B, len(images_B3HW))
    is_edited_BL = token_mask(mask_BHW, model.config.grid_size, grow).to(model.head.bias.device)
    decode = Decoding(model, config)
    seed = int(rng.new_state()[0]) if seed is None else seed
    ids_BL = _encode(model, images_B3HW, batch_size)
    ids_BL = _complete(decode, ids_BL, is_edited_BL, labels_B, seed, batch_size)
    return Edited(_decode(model, ids_BL, batch_size), ids_BL, is_edited_BL)


def reconstruct(
    model: MAGE,
    images_B3HW: Float[Tensor, "B 3 H W"],
    *,
    ratio: float = 0.75,
    tries: int = 1,
    config: SamplerConfig | None = None,
    seed: int | None = None,
    batch_size: int = 64,
) -> Reconstructed:
    """Hide tokens drawn at random and let the model complete each image, ``tries`` times.

    Args:
        model: any :class:`MAGE` with a tokenizer.
        images_B3HW: RGB in [0, 1], of the tokenizer's size.
        ratio: part of the tokens that is hidden, in [0, 1]; rounded to a number of tokens.
        tries: completions of the same hidden tokens; try t has the noise of ``seed + t``.
        config: settings; the published release's by default.
        seed: the same seed gives the same images whatever the batch size; drawn from torch's global
            generator by default.
        batch_size: images at a time.

    Raises:
        ValueError: no tokenizer, images of another size than the tokenizer's or far outside of [0, 1],
            numbers out of range.

    Source: MAGE figure 2.
    """
    _check("reconstruct", model, images_B3HW, batch_size)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"reconstruct: ratio is {ratio}, wanted 0 <= ratio <= 1")
    if tries < 1:
        raise ValueError(f"reconstruct: tries is {tries}, wanted at least 1")
    decode = Decoding(model, config)
    seed = int(rng.new_state()[0]) if seed is None else seed
    ids_BL = _encode(model, images_B3HW, batch_size)
    batch, length = ids_BL.shape
    noise_BL = rng.words(rng.new_state(seed), rng.stream(rng.Stream.MASK_PLAN), batch, length)
    is_masked_BL = (noise_BL.argsort(1).argsort(1) < round(ratio * length)).to(ids_BL.device)
    ids_TBL = torch.stack(
        [_complete(decode, ids_BL, is_masked_BL, None, seed + t, batch_size) for t in range(tries)]
    )
    images_TB3HW = torch.stack([_decode(model, ids_BL, batch_size) for ids_BL in ids_TBL])
    return Reconstructed(images_TB3HW, ids_TBL, is_masked_BL)


def token_mask(mask_BHW: Bool[Tensor, "B H W"], grid_size: int, grow: int = 1) -> Bool[Tensor, "B L"]:
    """The tokens of which any pixel is masked, and those at most ``grow`` tokens beside them.

    A token says something of the pixels around its own, too: those next to a mask know what was there, so
    one token more is made anew by default.

    Equivalent PyTorch: two ``F.max_pool2d``, over the pixels of a token and over ``2 * grow + 1`` tokens.

    Args:
        mask_BHW: bool, True where a pixel is masked.
        grid_size: tokens along one side.
        grow: tokens by which the mask is widened on all sides, corners too.

    Raises:
        ValueError: a mask that is not boolean, sides that are no multiple of the grid's, a negative number.
    """
    check.shape("token_mask", "mask", mask_BHW, (None, None, None))
    check.dtype("token_mask", "mask", mask_BHW, (torch.bool,))
    if grow < 0:
        raise ValueError(f"token_mask: grow is {grow}, wanted 0 or more")
    height, width = mask_BHW.shape[1:]
    if grid_size < 1 or height % grid_size or width % grid_size or not height or not width:
        raise ValueError(
            f"token_mask: mask has {width} x {height} pixels, wanted a multiple of the {grid_size} tokens "
            "along each side"
        )
    patch, grow = (height // grid_size, width // grid_size), min(grow, grid_size)
    grid_B1hw = F.max_pool2d(mask_BHW[:, None].float(), patch)
    return F.max_pool2d(grid_B1hw, 2 * grow + 1, stride=1, padding=grow).flatten(1) > 0


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Bool[Tensor, "H W"]:
    """True inside of a box: inpainting.

    Args:
        size: (width, height) of the image, in pixels.
        box: (left, top, right, bottom), in pixels; right and bottom are the first that are outside.

    Raises:
        ValueError: an empty box, or one that reaches out of the image.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(
            f"box_mask: the box (left, top, right, bottom) is {tuple(box)}, wanted 0 <= left < right <= "
            f"{size[0]} and 0 <= top < bottom <= {size[1]}"
        )
    mask_HW = torch.zeros(size[1], size[0], dtype=torch.bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW


def border_mask(size: tuple[int, int], border: tuple[int, int, int, int]) -> Bool[Tensor, "H W"]:
    """True within so many pixels of each side: outpainting.

    Args:
        size: (width, height) of the image, in pixels.
        border: (left, top, right, bottom), how many pixels of each side.

    Raises:
        ValueError: a negative number, none at all, or no pixel left to go by.
    """
    left, top, right, bottom = border
    if min(border) < 0 or not any(border) or left + right >= size[0] or top + bottom >= size[1]:
        raise ValueError(
            f"border_mask: the border (left, top, right, bottom) is {tuple(border)}, wanted 0 or more pixels "
            f"of each side, some in all, and a part of the {size[0]} x {size[1]} left inside"
        )
    return ~box_mask(size, (left, top, size[0] - right, size[1] - bottom))


def shrink(
    images_B3HW: Float[Tensor, "B 3 H W"],
    grid_size: int,
    scale: float = 0.5,
    anchor: tuple[float, float] = (0.5, 0.5),
) -> tuple[Float[Tensor, "B 3 H W"], Bool[Tensor, "B H W"]]:
    """Images made smaller, and a mask of all around them: uncropping.

    The small image takes whole tokens, so none of it is lost: edit it with ``grow=0``. Its outermost pixels
    are repeated around it, since the tokenizer looks at what is next to a token, too.

    Args:
        images_B3HW: square RGB images in [0, 1].
        grid_size: tokens along one side.
        scale: side of the small image over the image's, in (0, 1); rounded to whole tokens.
        anchor: where it is from left (0) to right (1) and from top to bottom; rounded to whole tokens.

    Returns:
        ``(images, mask)``, for :func:`edit`.

    Raises:
        ValueError: numbers out of range, sides that are no multiple of the grid's.
    """
    check.shape("shrink", "images", images_B3HW, (None, 3, None, None))
    check.floating("shrink", "images", images_B3HW)
    height, width = images_B3HW.shape[2:]
    if grid_size < 2 or height % grid_size or width % grid_size:
        raise ValueError(
            f"shrink: images have {width} x {height} pixels and grid_size is {grid_size}, wanted a multiple "
            "of 2 or more tokens along each side"
        )
    if not 0.0 < scale < 1.0 or not all(0.0 <= x <= 1.0 for x in anchor):
        raise ValueError(
            f"shrink: scale is {scale} and anchor {tuple(anchor)}, wanted 0 < scale < 1 and anchors in [0, 1]"
        )
    side = min(max(round(scale * grid_size), 1), grid_size - 1)
    patch_h, patch_w = height // grid_size, width // grid_size
    left, top = (round(x * (grid_size - side)) for x in anchor)
    x0, y0, x1, y1 = left * patch_w, top * patch_h, (left + side) * patch_w, (top + side) * patch_h
    small = F.interpolate(images_B3HW, (y1 - y0, x1 - x0), mode="bicubic", antialias=True).clamp(0, 1)
    around = F.pad(small, (x0, width - x1, y0, height - y1), mode="replicate")
    mask_HW = ~box_mask((width, height), (x0, y0, x1, y1))
    return around, mask_HW.to(images_B3HW.device).expand(len(images_B3HW), -1, -1)


def hide_tokens(
    images_B3HW: Float[Tensor, "B 3 H W"], is_masked_BL: Bool[Tensor, "B L"]
) -> Float[Tensor, "B 3 H W"]:
    """Images with masked tokens' pixels grey: what the model sees, to be looked at."""
    side = round(is_masked_BL.shape[1] ** 0.5)
    grid_B1hw = is_masked_BL.view(-1, 1, side, side).to(images_B3HW.device)
    patch = (images_B3HW.shape[2] // side, images_B3HW.shape[3] // side)
    is_grey_B1HW = grid_B1hw.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    return torch.where(is_grey_B1HW, GREY, images_B3HW)


def _check(name: str, model: MAGE, images_B3HW: Tensor, batch_size: int) -> None:
    if model.tokenizer is None:
        raise ValueError(f"{name}: this model has no tokenizer to encode images and to decode ids")
    check.shape(name, "images", images_B3HW, (None, 3, None, None))
    check.floating(name, "images", images_B3HW)
    if not len(images_B3HW):
        raise ValueError(f"{name}: number of images is 0, wanted at least 1")
    low, high = (x.item() for x in images_B3HW.aminmax())
    if not (low >= -1 and high <= 2):  # bytes, NaN; a decoded image may lie a little outside
        raise ValueError(f"{name}: images hold values from {low:g} to {high:g}, wanted about [0, 1]")
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size is {batch_size}, wanted at least 1")


def _encode(model: MAGE, images_B3HW: Tensor, batch_size: int) -> Tensor:
    device = model.head.bias.device
    return torch.cat([model.tokenize(part.to(device)) for part in images_B3HW.split(batch_size)])


@torch.no_grad()
def _decode(model: MAGE, ids_BL: Tensor, batch_size: int) -> Tensor:
    assert model.tokenizer is not None
    return torch.cat([model.tokenizer.decode(part) for part in ids_BL.split(batch_size)])


def _complete(
    decode: Decoding,
    ids_BL: Tensor,
    is_masked_BL: Tensor,
    labels_B: Tensor | None,
    seed: int,
    batch_size: int,
) -> Tensor:
    """The ids, those of the masked tokens decoded anew."""
    known_BL = ids_BL.masked_fill(is_masked_BL, decode.model.config.mask_token_id)
    parts = []
    for first in range(0, len(known_BL), batch_size):
        part = slice(first, first + batch_size)
        labels = None if labels_B is None else labels_B[part]
        parts.append(decode(ids_BL=known_BL[part], labels_B=labels, seed=seed, first_sample=first))
    return torch.cat(parts)
