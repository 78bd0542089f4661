"""``mage-fast generate``: images from a trained model, one PNG each, and how they came about."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.editing import GREY, hide_tokens
from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.recipes.loading import Precision, load_model, precision_context
from mage_fast.recipes.outputs import PNGWriter, claim
from mage_fast.recipes.pictures import write_animation, write_grid
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.images import read_rgb
from mage_fast.training.logs import progress
from mage_fast.training.metrics import GRID_NAME, to_uint8
from mage_fast.training.run import pick_device
from mage_fast.training.run_state import module_fingerprint

SETTINGS = "generate.json"
GRID_IMAGES = 64
ANIMATION = "animation.webp"


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
    #: Also write animation.webp: the images of grid.png after each step, masked tokens grey.
    animate: bool = False
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
        ValueError: a label that is none of the model's classes, a seed of more than 64 bits, a model that
            does not generate.
    """
    if config.count < 1 or config.batch_size < 1:
        raise InputError(f"generate: count {config.count}, batch_size {config.batch_size}: wanted 1 or more")
    device = pick_device(config.device)
    model = load_model(config.model, device)
    if model.tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer to make images with")
    labels = _labels(config)
    # a wrong label or seed, a model that does not generate: refused before anything is written
    model.class_ids(labels, config.count)
    rng.new_state(config.seed)
    decode = Decoding(model, config.sampler)
    settings = {
        **dataclasses.asdict(config.sampler),
        **{
            "seed": config.seed,
            "label": config.label,
            "labels": list(config.labels),
            "precision": config.precision,
        },
        "model": module_fingerprint(model),
    }
    claim(config.out, SETTINGS, settings)
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
    # a run may have been killed between its last image and the grid
    if not (config.out / GRID_NAME).exists() or (missing and missing[0] < GRID_IMAGES):
        _grid(paths[:GRID_IMAGES], config.out / GRID_NAME)
    if config.animate:
        with precision_context(config.precision, device):
            write_animation(_frames(config, decode, labels), config.out / ANIMATION)
    return {"images": config.count, "new": len(missing), "out": str(config.out)}


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


@torch.no_grad()
def _frames(config: GenerateConfig, decode: Decoding, labels: Tensor | None) -> Iterator[Tensor]:
    """The grid's images before the first step, all grey, and after each; what is masked again is grey."""
    tokenizer, count, size = decode.model.tokenizer, min(config.count, GRID_IMAGES), config.batch_size
    assert tokenizer is not None
    steps_of_batches = [
        decode.masked_steps(
            min(size, count - first),
            labels_B=None if labels is None else labels[first : min(first + size, count)],
            seed=config.seed,
            first_sample=first,
        )
        for first in range(0, count, size)
    ]
    steps = zip(*steps_of_batches, strict=True)
    for number, batches in enumerate(progress(steps, "animate", config.sampler.steps)):
        images = torch.cat([hide_tokens(tokenizer.decode(ids_BL), mask_BL) for ids_BL, mask_BL in batches])
        if number == 0:
            yield torch.full_like(images, GREY)
        yield images


def _grid(paths: list[Path], path: Path) -> None:
    images = [torch.from_numpy(np.array(read_rgb(file))).permute(2, 0, 1) for file in paths]
    # + 0.5: a value that was truncated to this level comes back as this level
    write_grid((torch.stack(images) + 0.5) / 255, path)
