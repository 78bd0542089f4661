"""``mage-fast generate``: images from a trained model, one PNG each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.errors import InputError
from mage_fast.files import write_json
from mage_fast.recipes.loading import Precision, load_model, precision_context
from mage_fast.recipes.pictures import write_grid
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.images import read_rgb
from mage_fast.training.logs import progress
from mage_fast.training.metrics import save_png, to_uint8
from mage_fast.training.run import check_settings, pick_device
from mage_fast.training.run_state import module_fingerprint

SETTINGS = "generate.json"
GRID_IMAGES = 64
#: Threads that compress PNG files.
WRITERS = 4


@dataclass(frozen=True)
class GenerateConfig:
    """Generate images by iterative decoding. The same command goes on where it stopped."""

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Folder of the PNG files 000000.png ... and of grid.png.
    out: Path = Path("out/generated")
    count: int = 16
    #: Class label of every image; unconditional without.
    label: int | None = None
    #: Class labels that the images have in turn, in place of one label.
    labels: tuple[int, ...] = ()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    #: With the image's number it decides the image, whatever the batch size.
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: GenerateConfig) -> dict[str, object]:
    """Write the images that are not there yet; returns their number and the folder.

    Values are clipped to [0, 255] and truncated, as published FIDs were computed.

    Raises:
        InputError: a folder with images of other settings, a wrong count, guidance without a label, both
            ``label`` and ``labels``.
        OSError: a file cannot be written, as on a full disk; it names the file, and what is whole stays.
        ValueError: a label that is none of the model's classes, a model that does not generate.
    """
    if config.count < 1 or config.batch_size < 1:
        raise InputError(f"generate: count {config.count}, batch_size {config.batch_size}: wanted 1 or more")
    device = pick_device(config.device)
    model = load_model(config.model, device)
    if model.tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer to make images with")
    labels = _labels(config)
    # a wrong label, a model that does not generate: refused before anything is written
    model.class_ids(labels, config.count)
    decode = Decoding(model, config.sampler)
    _claim(config, module_fingerprint(model))
    for leftover in config.out.glob(".*.png.tmp"):  # of a run that was killed
        leftover.unlink()
    paths = [config.out / f"{index:06d}.png" for index in range(config.count)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    starts = sorted({index // config.batch_size * config.batch_size for index in missing})
    with PNGWriter() as writer:
        for first in progress(starts, "generate"):
            part = slice(first, min(first + config.batch_size, config.count))
            with torch.no_grad(), precision_context(config.precision, device):
                ids_BL = decode(
                    part.stop - part.start,
                    labels_B=None if labels is None else labels[part],
                    seed=config.seed,
                    first_sample=first,
                )
                images_B3HW = to_uint8(model.tokenizer.decode(ids_BL))
            writer.write(images_B3HW, paths[part])
    if missing and missing[0] < GRID_IMAGES:
        _grid(paths[:GRID_IMAGES], config.out / "grid.png")
    return {"images": config.count, "new": len(missing), "out": str(config.out)}


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


def _labels(config: GenerateConfig) -> Tensor | None:
    """The class label of each image."""
    if config.label is not None and config.labels:
        raise InputError(f"generate: got label {config.label} and labels {config.labels}, wanted one of them")
    labels = config.labels if config.label is None else (config.label,)
    if not labels and config.sampler.guidance_scale != 0.0:
        raise InputError(
            f"generate: guidance_scale is {config.sampler.guidance_scale} without a label, wanted --label or "
            "--labels: guidance weighs a class against none"
        )
    return torch.tensor(labels)[torch.arange(config.count) % len(labels)] if labels else None


def _claim(config: GenerateConfig, fingerprint: str) -> None:
    """Note the settings in the folder, or compare them with those noted."""
    settings = {
        **dataclasses.asdict(config.sampler),
        **{
            "seed": config.seed,
            "label": config.label,
            "labels": list(config.labels),
            "precision": config.precision,
        },
        "model": fingerprint,
    }
    if config.out.exists() and not config.out.is_dir():
        raise InputError(f"{config.out} is a file, wanted a folder for the images")
    path = config.out / SETTINGS
    if path.exists():
        check_settings(config.out, json.loads(path.read_text()), settings)
    elif config.out.exists() and any(config.out.glob("*.png")):
        raise InputError(f"{config.out} holds images of something else: give another --out")
    else:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _grid(paths: list[Path], path: Path) -> None:
    images = [torch.from_numpy(np.array(read_rgb(file))).permute(2, 0, 1) for file in paths]
    # + 0.5: a value that was truncated to this level comes back as this level
    write_grid((torch.stack(images) + 0.5) / 255, path)
