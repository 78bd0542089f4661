"""``mage-fast edit``: parts of images made anew by a trained model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.editing import border_mask, box_mask, edit, hide_tokens, shrink, token_mask
from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.model import MAGE
from mage_fast.recipes.inputs import Pictures, fingerprint, read_mask, read_pictures
from mage_fast.recipes.loading import Precision, image_size, load_model, precision_context
from mage_fast.recipes.outputs import claim, write_tries
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.sources import Split

SETTINGS = "edit.json"
Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class EditConfig:
    """Make parts of images anew: --mask or --box, --outpaint or --uncrop.

    Masks, boxes and sides are in pixels of the images as they are; the evaluation's crop comes after.
    """

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: An image file, a folder of images, or a data source: digits, folder:PATH, webdataset:PATH or hf:NAME.
    images: str = "digits"
    #: Folder of the PNG files IMAGE_VARIANT.png and of grid.png: originals, what the model sees, variants.
    out: Path = Path("out/edited")
    #: An image of the images' size, white where they are made anew.
    mask: Path | None = None
    #: LEFT TOP RIGHT BOTTOM of a box that is made anew.
    box: Four | None = None
    #: LEFT TOP RIGHT BOTTOM: how many pixels of each side are made anew.
    outpaint: Four | None = None
    #: Side of the image made smaller, over its own; all around it is made anew.
    uncrop: float | None = None
    #: Where the smaller image is, from left (0) to right (1) and from top to bottom.
    anchor: tuple[float, float] = (0.5, 0.5)
    #: Class label of what is made anew; unconditional without.
    label: int | None = None
    #: Tokens by which the mask is widened on all sides; by default 1, with --uncrop 0.
    grow: int | None = None
    #: At most so many images.
    count: int = 8
    #: Of a data source; files and folders are taken whole.
    split: Split = "test"
    #: Results for each image, by the seeds from ``seed`` on.
    variants: int = 3
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: EditConfig) -> dict[str, object]:
    """Edit and write the images; returns their number, the part of the tokens made anew, and the folder.

    Raises:
        InputError: images or masks that cannot be read or do not fit, no task or more than one, guidance
            without a label, a folder with images of other settings.
        OSError: a file cannot be written.
        ValueError: a label that is none of the model's classes, a seed of more than 64 bits, a model that
            does not generate.
    """
    tasks = {name: getattr(config, name) for name in ("mask", "box", "outpaint", "uncrop")}
    chosen = [f"--{name}" for name, value in tasks.items() if value is not None]
    if len(chosen) != 1:
        raise InputError(
            f"edit: got {' and '.join(chosen) or 'none'} of --mask, --box, --outpaint, --uncrop, wanted one"
        )
    if config.variants < 1 or config.batch_size < 1:
        raise InputError(
            f"edit: variants {config.variants}, batch_size {config.batch_size}: wanted 1 or more"
        )
    if config.label is None and config.sampler.guidance_scale != 0.0:
        raise InputError(
            f"edit: guidance_scale is {config.sampler.guidance_scale} without a label, wanted --label: "
            "guidance weighs a class against none"
        )
    device = pick_device(config.device)
    model = load_model(config.model, device)
    pictures = read_pictures(config.images, config.count, image_size=image_size(model), split=config.split)
    images_B3HW, mask_BHW = _task(config, model, pictures)
    labels_B = None if config.label is None else torch.full((len(images_B3HW),), config.label)
    model.class_ids(labels_B, len(images_B3HW))
    Decoding(model, config.sampler)  # refuses a model that does not generate
    rng.new_state(config.seed + config.variants - 1)  # and this the last seed
    grow = config.grow if config.grow is not None else int(config.uncrop is None)
    settings = {
        **dataclasses.asdict(config.sampler),
        **{"seed": config.seed, "label": config.label, "grow": grow, "precision": config.precision},
        **{**tasks, "mask": config.mask and fingerprint(mask_BHW), "anchor": config.anchor},
        **{"count": len(pictures.names), "images": fingerprint(pictures.images_B3HW)},
        **{"model": module_fingerprint(model)},
    }
    is_edited_BL = token_mask(mask_BHW, model.config.grid_size, grow)
    claim(config.out, SETTINGS, settings)
    variants = []
    for number in progress(range(config.variants), "edit"):
        with precision_context(config.precision, device):
            edited = edit(
                model,
                images_B3HW,
                mask_BHW,
                labels_B=labels_B,
                config=config.sampler,
                seed=config.seed + number,
                batch_size=config.batch_size,
                grow=grow,
            )
        variants.append(edited.images_B3HW.float().cpu())
    seen_B3HW = hide_tokens(images_B3HW, is_edited_BL)
    write_tries(config.out, pictures.images_B3HW, seen_B3HW, torch.stack(variants))
    return {
        "images": len(images_B3HW),
        "variants": config.variants,
        "edited_tokens": is_edited_BL.float().mean().item(),
        "out": str(config.out),
    }


def _task(config: EditConfig, model: MAGE, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """The images to edit, and what of them."""
    if config.uncrop is not None:
        return shrink(pictures.images_B3HW, model.config.grid_size, config.uncrop, config.anchor)
    whole = None if config.mask is None else read_mask(config.mask)

    def mask(size: tuple[int, int]) -> np.ndarray:
        if whole is None:
            if config.outpaint is not None:
                return border_mask(size, config.outpaint).numpy()
            assert config.box is not None
            return box_mask(size, config.box).numpy()
        if whole.shape[::-1] != size:
            raise InputError(
                f"{config.mask} is {whole.shape[1]} x {whole.shape[0]} pixels, wanted the image's "
                f"{size[0]} x {size[1]}"
            )
        return whole

    return pictures.images_B3HW, pictures.masks(mask)
