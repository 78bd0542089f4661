"""``mage-fast reconstruct``: images of which most tokens are hidden, and the model's completions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from mage_fast.decoding import Decoding
from mage_fast.editing import hide_tokens, reconstruct
from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.recipes.inputs import fingerprint, read_pictures
from mage_fast.recipes.loading import Precision, image_size, load_model, precision_context
from mage_fast.recipes.outputs import claim, write_tries
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.run import pick_device
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.sources import Split

SETTINGS = "reconstruct.json"


@dataclass(frozen=True)
class ReconstructConfig:
    """Hide tokens of images, drawn at random, and complete them by several seeds (the paper's figure 2)."""

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: An image file, a folder of images, or a data source: digits, folder:PATH, webdataset:PATH or hf:NAME.
    images: str = "digits"
    #: Folder of the PNG files IMAGE_TRY.png and of grid.png: originals, what the model sees, completions.
    out: Path = Path("out/reconstructed")
    #: Part of the tokens that is hidden.
    ratio: float = 0.75
    #: Completions of each image, by the seeds from ``seed`` on.
    tries: int = 3
    #: At most so many images.
    count: int = 8
    #: Of a data source; files and folders are taken whole.
    split: Split = "test"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: ReconstructConfig) -> dict[str, object]:
    """Complete and write the images; returns their number, the part of the tokens hidden, and the folder.

    Raises:
        InputError: images that cannot be read, numbers out of range, a folder with images of other settings.
        OSError: a file cannot be written.
        ValueError: a seed of more than 64 bits, a model that does not generate.
    """
    if not 0.0 <= config.ratio <= 1.0 or config.tries < 1 or config.batch_size < 1:
        raise InputError(
            f"reconstruct: ratio {config.ratio}, tries {config.tries}, batch_size {config.batch_size}: "
            "wanted 0 <= ratio <= 1, and 1 or more"
        )
    device = pick_device(config.device)
    model = load_model(config.model, device)
    pictures = read_pictures(config.images, config.count, image_size=image_size(model), split=config.split)
    Decoding(model, config.sampler)  # refuses a model that does not generate
    rng.new_state(config.seed + config.tries - 1)  # and this the last seed
    settings = {
        **dataclasses.asdict(config.sampler),
        **{"seed": config.seed, "ratio": config.ratio, "precision": config.precision},
        **{"count": len(pictures.names), "images": fingerprint(pictures.images_B3HW)},
        **{"model": module_fingerprint(model)},
    }
    claim(config.out, SETTINGS, settings)
    with precision_context(config.precision, device):
        completed = reconstruct(
            model,
            pictures.images_B3HW,
            ratio=config.ratio,
            tries=config.tries,
            config=config.sampler,
            seed=config.seed,
            batch_size=config.batch_size,
        )
    seen_B3HW = hide_tokens(pictures.images_B3HW, completed.is_masked_BL)
    write_tries(config.out, pictures.images_B3HW, seen_B3HW, completed.images_TB3HW)
    return {
        "images": len(seen_B3HW),
        "tries": config.tries,
        "hidden_tokens": completed.is_masked_BL.float().mean().item(),
        "out": str(config.out),
    }
