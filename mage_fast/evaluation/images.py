"""A folder of generated images, read as it is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.training.images import UnreadableImage, header_size, read_rgb
from mage_fast.training.metrics import GRID_NAME

#: Threads that decode PNG files.
READERS = 4


class PNGFolder:
    """The PNG files of a folder, in the order of their names; ``grid.png`` and hidden files are left out.

    Pixels are the files' own: nothing is resized, and nothing but the generator has rounded or truncated.

    Raises:
        InputError: no such folder, no PNG file in it, a damaged one, images of different sizes; named.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"there is no folder of images at {self.folder}")
        self.paths = sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix.lower() == ".png" and path.name[0] != "." and path.name != GRID_NAME
        )
        if not self.paths:
            raise InputError(f"{self.folder} holds no PNG files")
        #: (width, height)
        self.size = self._size(self.paths[0])
        for path in self.paths:
            if (size := self._size(path)) != self.size:
                raise InputError(
                    f"{path} is {size[0]} x {size[1]} pixels, {self.paths[0].name} {self.size[0]} x "
                    f"{self.size[1]}: wanted images of one size"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[UInt8[Tensor, "B 3 H W"]]:
        """All images.

        Raises:
            InputError: a damaged file, named.
        """
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(0, len(self.paths), batch_size):
                images = list(pool.map(_read, self.paths[first : first + batch_size]))
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    @staticmethod
    def _size(path: Path) -> tuple[int, int]:
        try:
            return header_size(path)
        except UnreadableImage as error:
            raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return np.asarray(read_rgb(path))
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}") from error
