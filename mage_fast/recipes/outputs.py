"""What recipes that write images share: a folder claimed for one setting, PNG files written in threads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import require_folder, write_json
from mage_fast.recipes.pictures import write_grid
from mage_fast.training.images import EXTENSIONS
from mage_fast.training.metrics import GRID_NAME, save_png, to_uint8
from mage_fast.training.run import check_settings

#: Images, columns of the grid, that :func:`write_tries` shows.
SHOWN = 16
#: Threads that compress PNG files.
WRITERS = 4


def claim(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Note settings in a folder for images, in a file ``name``, or compare them with those noted.

    Raises:
        InputError: a file in the folder's place, images of other settings or of something else in it, a
            damaged file of settings.
    """
    require_folder(folder, "the images")
    path = folder / name
    if path.exists():
        check_settings(folder, _noted(path), json.loads(json.dumps(settings)))
    elif folder.exists() and any(x.suffix.lower() in EXTENSIONS for x in folder.iterdir()):
        raise InputError(f"{folder} holds images of something else: give another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    for leftover in folder.glob(".*.png.tmp"):  # of a run that was killed
        leftover.unlink()


def _noted(path: Path) -> dict[str, Any]:
    """Settings as :func:`claim` noted them."""
    try:
        noted = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is no JSON file ({error}): give another --out, or remove it") from error
    if not isinstance(noted, dict):
        raise InputError(f"{path} holds no settings: give another --out, or remove it")
    return noted


class PNGWriter:
    """Compresses and writes batches of images in threads, while the next batch is computed.

    A batch waits until the one before it is written: two are in memory at most. As a context manager it
    ends when all files are there, or at the first error.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITERS)
        self._pending: list[Future[None]] = []

    def write(self, images_BCHW: Tensor, paths: Sequence[Path]) -> None:
        """Begin to write uint8 images; files that are there stay.

        Raises:
            OSError: a file of an earlier batch could not be written.
        """
        self._wait()
        self._pending = [
            self._pool.submit(save_png, image, path)
            for image, path in zip(images_BCHW, paths, strict=True)
            if not path.exists()
        ]

    def _wait(self) -> None:
        for written in self._pending:
            written.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)


def write_tries(
    folder: Path,
    originals_B3HW: Float[Tensor, "B 3 H W"],
    seen_B3HW: Float[Tensor, "B 3 H W"],
    tries_TB3HW: Float[Tensor, "T B 3 H W"],
) -> None:
    """Write every try as ``IMAGE_TRY.png`` and a grid: originals, what the model sees, a row for each try."""
    with PNGWriter() as writer:
        for number, images_B3HW in enumerate(tries_TB3HW):
            paths = [folder / f"{index:06d}_{number}.png" for index in range(len(images_B3HW))]
            writer.write(to_uint8(images_B3HW), paths)
    rows = [x[:SHOWN].cpu() for x in (originals_B3HW, seen_B3HW, *tries_TB3HW)]
    write_grid(torch.cat(rows), folder / GRID_NAME, columns=len(rows[0]))
