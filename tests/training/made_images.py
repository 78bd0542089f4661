"""Images for tests: real photographs and a drawing that other packages ship, and a made one."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

PHOTOGRAPHS = importlib.resources.files("sklearn.datasets") / "images"
CHINA, FLOWER = Path(str(PHOTOGRAPHS / "china.jpg")), Path(str(PHOTOGRAPHS / "flower.jpg"))
LOGO = Path(matplotlib.get_data_path()) / "sample_data" / "logo2.png"
HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
#: Files of the ``zoo`` fixture that are no images.
BAD = {"truncated.jpg", "text.png", "empty.jpeg", "truncated.png"}


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 64)], -1).astype(np.uint8))
