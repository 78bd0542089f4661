"""Decoding and augmentation of images, on real photographs and made files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import CHINA, gradient
from PIL import Image

from mage_fast.training.augment import AUGMENTATIONS, applied, drawn, item_generator, random_box
from mage_fast.training.images import read_rgb


def cropped(
    image: Image.Image, size: int, augment: str, generator: np.random.Generator | None = None
) -> Image.Image:
    generator = generator or item_generator(0, 0, 0)
    return applied(image, drawn(image.size, size, AUGMENTATIONS[augment], generator), size)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    def stored(image: Image.Image, name: str, **options: object) -> np.ndarray:
        image.save(tmp_path / name, **options)
        read = read_rgb(tmp_path / name)
        assert read.mode == "RGB"
        return np.asarray(read).astype(int)

    rgb = np.asarray(gradient()).astype(int)
    np.testing.assert_array_equal(stored(gradient(), "rgb.png"), rgb)
    np.testing.assert_array_equal(stored(gradient(), "rgb.bmp"), rgb)
    np.testing.assert_array_equal(stored(gradient(), "rgb.webp", lossless=True), rgb)
    grey = np.asarray(gradient().convert("L"))
    np.testing.assert_array_equal(stored(gradient().convert("L"), "l.png"), np.stack([grey] * 3, -1))
    bits = np.asarray(gradient().convert("1")).astype(int) * 255
    np.testing.assert_array_equal(stored(gradient().convert("1"), "1.png"), np.stack([bits] * 3, -1))
    assert np.abs(stored(gradient().convert("CMYK"), "cmyk.jpg", quality=100) - rgb).max() < 12
    deep = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)
    read = stored(Image.fromarray(deep), "16.png")
    assert np.abs(read[..., 0] - deep / 257).max() <= 0.5
    assert len(np.unique(read)) == 256  # not clipped at 255


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = gradient().convert("RGBA")
    alpha = np.full((24, 40), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(tmp_path / "rgba.png")
    share = alpha[..., None] / 255
    wanted = np.asarray(gradient()) * share + 255 * (1 - share)
    assert np.abs(np.asarray(read_rgb(tmp_path / "rgba.png")) - wanted).max() <= 1
    rgba.convert("LA").save(tmp_path / "la.png")
    assert (np.asarray(read_rgb(tmp_path / "la.png"))[:, :10] == 255).all()
    palette = Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1, 0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    pixels = np.asarray(read_rgb(tmp_path / "p.png"))[0].tolist()
    assert pixels == [[255, 255, 255], [0, 0, 255]] * 2


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    gradient(64, 32).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = np.asarray(read_rgb(tmp_path / "turned.jpg")).astype(int)
    assert upright.shape == (64, 32, 3)
    wanted = np.asarray(gradient(64, 32).transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(upright - wanted).mean() < 5


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    low=st.floats(0.01, 1),
)
def test_random_resized_crop_draws_the_wanted_area(width: int, height: int, seed: int, low: float) -> None:
    box = random_box((width, height), (low, 1.0), (3 / 4, 4 / 3), item_generator(seed, 0, 0))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if box != (0, 0, width, height):
        assert (right - left + 0.5) * (bottom - top + 0.5) >= low * width * height * 0.99 - 1
        assert (right - left - 0.5) / (bottom - top + 0.5) <= 4 / 3
        assert (right - left + 0.5) / max(bottom - top - 0.5, 0.1) >= 3 / 4


def test_random_resized_crop_law() -> None:
    """Areas are uniform on (0.2, 1) where they fit, and every place and flip is seen."""
    image = gradient(400, 400)
    draws = [
        np.asarray(cropped(image, 8, "strong", item_generator(0, 0, i))).astype(float) for i in range(300)
    ]
    red = np.stack([draw[..., 0] for draw in draws])
    flipped = red[:, :, 0].mean(1) > red[:, :, -1].mean(1)
    assert 0.4 < flipped.mean() < 0.6
    spread = np.abs(red[:, :, 0] - red[:, :, -1]).mean(1) / 255 * 8 / 7
    assert 0.4 < spread.min() < 0.5  # sqrt(0.2) = 0.447 at aspect 1, less for narrow crops
    assert spread.max() > 0.9


def test_evaluation_crop_is_292_for_256() -> None:
    with Image.open(CHINA) as photograph:
        image = photograph.convert("RGB")
    width, height = image.size
    resized = image.resize((round(width * 292 / height), 292), Image.Resampling.BICUBIC)
    left, top = (resized.width - 256) // 2, 18
    wanted = resized.crop((left, top, left + 256, top + 256))
    np.testing.assert_array_equal(np.asarray(cropped(image, 256, "eval")), np.asarray(wanted))
    assert cropped(Image.new("RGB", (1, 60000)), 64, "eval").size == (64, 64)
