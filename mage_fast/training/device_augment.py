"""JPEG files decoded, cropped and resized on the device, with the crops that the CPU path draws.

Loading processes read the files and draw the crops from the width and height in the headers; this process
decodes on the device with nvImageCodec and resizes there. Everything but whole JPEG files in colour or grey
is decoded by Pillow in the loading processes, so the images of a run are the same but for rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.training.augment import Crop
from mage_fast.training.loading import Batch, Batches, Received, Undecoded

#: Files decoded at once: whole photographs of a large batch would not fit beside the model.
FILES_AT_ONCE = 32
#: Pillow's bicubic kernel: the parameter of Keys (1981), and half its width in pixels.
_A, _SUPPORT = -0.5, 2.0


class Decoder(Protocol):
    """Decodes JPEG files to RGB pixels, upright as EXIF says; None where a file is damaged."""

    device: torch.device

    def __call__(self, files: Sequence[bytes]) -> list[UInt8[Tensor, "H W 3"] | None]: ...


class NvImageCodec:
    """A :class:`Decoder` that runs NVIDIA nvImageCodec on a CUDA device.

    Chroma is interpolated (``fancy_upsampling``) as libjpeg-turbo, Pillow's decoder, does by default.

    Raises:
        InputError: the package is not installed, or the device is not CUDA.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise InputError(f"JPEG decoding on a GPU: the device is {self.device}, wanted a CUDA device")
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        try:
            codec: Any = importlib.import_module("nvidia.nvimgcodec")
        except ImportError as error:
            raise InputError(
                "JPEG decoding on a GPU needs the package nvidia-nvimgcodec-cu12 (or -cu13): "
                "pip install mage-fast[gpu-decode]"
            ) from error
        self._parameters = codec.DecodeParams(apply_exif_orientation=True, color_spec=codec.ColorSpec.SRGB)
        try:
            self._decoder = codec.Decoder(device_id=self.device.index, options=":fancy_upsampling=1")
        except RuntimeError as error:
            raise InputError(f"nvImageCodec cannot decode on {self.device}: {error}") from error

    def __call__(self, files: Sequence[bytes]) -> list[UInt8[Tensor, "H W 3"] | None]:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        images = self._decoder.decode(list(files), params=self._parameters, cuda_stream=stream)
        # A copy, as the library's buffer lives no longer than its image does.
        return [None if image is None else torch.from_dlpack(image).clone() for image in images]


def crop_on_device(pixels_HWC: UInt8[Tensor, "H W 3"], crop: Crop, size: int) -> Float[Tensor, "3 S S"]:
    """What :func:`mage_fast.training.augment.applied` cuts out, in whole numbers from 0 to 255.

    Columns are resized first and rounded, then rows, as Pillow does for all but tall images, for which some
    of its versions begin with the rows: 1 level apart at most, or where the order differs a fraction of one
    in the mean and more at sharp edges.
    """
    height, width, _ = pixels_HWC.shape
    left, top, right, bottom = crop.box
    device = pixels_HWC.device
    columns, of_columns = _weights((left, right), crop.resized[0], crop.corner[0], size, width, device)
    rows, of_rows = _weights((top, bottom), crop.resized[1], crop.corner[1], size, height, device)
    # Where fp32 products may use TF32, levels are exact in it and weights lose a tenth of a level at most.
    with torch.autocast(device.type, enabled=False):
        image = pixels_HWC[rows, columns].permute(2, 0, 1).float()
        image = _rounded(of_rows @ _rounded(image @ of_columns.mT))
    return image.flip(-1) if crop.flip else image


def _rounded(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor_().clamp_(0, 255)


def _weights(
    bounds: tuple[int, int], resized: int, corner: int, size: int, length: int, device: torch.device
) -> tuple[slice, Float[Tensor, "S N"]]:
    """The pixels of one axis that a crop reads, and the weight of each in every output pixel.

    Bicubic, widened by the factor of scaling down, with the pixels around the box taken along and weights
    that sum to 1 where the image ends. In double precision, as a place is large beside its fraction.
    """
    scale = (bounds[1] - bounds[0]) / resized
    wide = max(scale, 1.0)
    first, last = (bounds[0] + (corner + place) * scale for place in (0.5, size - 0.5))
    read = slice(max(0, int(first - _SUPPORT * wide)), min(length, int(last + _SUPPORT * wide) + 1))
    centers = (
        torch.arange(size, device=device, dtype=torch.float64).add_(corner + 0.5).mul_(scale).add_(bounds[0])
    )
    pixels = torch.arange(read.start, read.stop, device=device, dtype=torch.float64).add_(0.5)
    x = ((pixels - centers[:, None]) / wide).abs()
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    weights = torch.where(x < 1, near, torch.where(x < _SUPPORT, far, 0.0))
    return read, (weights / weights.sum(1, keepdim=True)).float()


def decoded(batch: Undecoded, dataset: Batches, decoder: Decoder) -> Received:
    """The batch of ``batch`` with images on the decoder's device, and the files that were found damaged.

    An item whose file cannot be decoded there is loaded again as the CPU path does it: the same image, or
    the same substitute.
    """
    return dataset.noting_bad_files(lambda: _decoded(batch, dataset, decoder))


def _decoded(batch: Undecoded, dataset: Batches, decoder: Decoder) -> Batch:
    size = dataset.image_size
    images, shown = [], []
    for start in range(0, len(batch.items), FILES_AT_ONCE):
        items = batch.items[start : start + FILES_AT_ONCE]
        files = [item.content for item in items if isinstance(item.content, bytes)]
        pixels = iter(decoder(files) if files else [])
        for item in items:
            found = next(pixels) if isinstance(item.content, bytes) else None
            if found is not None:
                views = torch.stack([crop_on_device(found, crop, size) for crop in item.crops])
            else:
                loaded = (
                    dataset.item(batch.epoch, item.requested) if isinstance(item.content, bytes) else item
                )
                if loaded is None:
                    continue  # damaged, and left out
                item = loaded
                views = torch.from_numpy(item.content).to(decoder.device, non_blocking=True).float()
            images.append(views)
            shown.append(item.shown)
    empty = torch.empty((dataset.views, 0, 3, size, size), device=decoder.device)
    return dataset.batch(torch.stack(images, dim=1).div_(255) if images else empty, shown)
