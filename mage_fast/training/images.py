"""Decoding of image files to RGB: every mode that PNG, JPEG, WebP and BMP files come in."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

#: File name endings that a folder source takes for images.
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
#: Pillow decoders in use, whatever the file is called: Pillow has others (EPS, for one, starts an external
#: program) that have no place on files of unknown origin.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
#: What Pillow raises for a broken file, by experience and by its documentation.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class UnreadableImage(Exception):
    """An image file cannot be decoded; the message says why. Data loading skips the file and names it."""


def read_file(path: Path | str) -> bytes:
    """The content of an image file.

    Raises:
        UnreadableImage: there is none, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(_reason(error)) from error


def read_rgb(file: Path | str | BinaryIO) -> Image.Image:
    """Decode an image completely and convert it to RGB, upright as its EXIF orientation says.

    Raises:
        UnreadableImage: not an image of a known format, truncated, or damaged.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:
        raise UnreadableImage(_reason(error)) from error


def header_size(file: Path | str | BinaryIO) -> tuple[int, int]:
    """(width, height) from the file's header, without decoding.

    Raises:
        UnreadableImage: not an image of a known format.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except DECODING_ERRORS as error:
        raise UnreadableImage(_reason(error)) from error


def whole_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(width, height), upright, of a JPEG file in colour or grey that has its end; None for anything else."""
    if not content.endswith(b"\xff\xd9"):
        return None
    try:
        with Image.open(BytesIO(content), formats=("JPEG",)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            size = image.size[::-1] if turned else image.size
            return size if image.mode in ("RGB", "L") else None
    except DECODING_ERRORS:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency is composited on white, 16-bit grey is scaled (Pillow's own conversion
    would clip it at 255), CMYK, palette and bilevel images are converted.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64)
        grey = np.round(np.clip(values, 0, 65535) / 257).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a PNG, JPEG, WebP or BMP image"
    return " ".join(str(error).split()) or type(error).__name__
