"""A folder as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_images import CHINA, FLOWER, HOPPER, LOGO, gradient
from PIL import Image


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Two classes, mixed sizes and modes, five files that are no images."""
    folder = tmp_path / "zoo"
    drawings, photographs = folder / "drawings", folder / "photographs"
    drawings.mkdir(parents=True)
    photographs.mkdir()
    gradient().save(drawings / "rgb.png")
    gradient().convert("L").save(drawings / "grey.png")
    gradient(100, 7).convert("1").save(drawings / "bilevel.BMP")
    gradient().save(drawings / "lossless.webp", lossless=True)
    with Image.open(LOGO) as logo:
        logo.resize((120, 40)).save(drawings / "logo.png")
    for file in (CHINA, FLOWER, HOPPER):
        with Image.open(file) as photograph:
            photograph.reduce(4).save(photographs / file.name)
            photograph.reduce(8).convert("CMYK").save(photographs / f"cmyk-{file.name}")
    whole = (photographs / "china.jpg").read_bytes()
    (photographs / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (photographs / "text.png").write_text("not an image\n")
    (photographs / "empty.jpeg").write_bytes(b"")
    whole = (drawings / "rgb.png").read_bytes()
    (drawings / "truncated.png").write_bytes(whole[:-40])
    (folder / "notes.txt").write_text("ignored\n")
    (drawings / "._rgb.png").write_bytes(b"resource fork")
    return folder
