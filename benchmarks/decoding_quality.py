"""What the approximations of decoding cost in quality, and what they save, on the demo's model.

    mage-fast demo                                    # trains it: out/demo/pretrain
    python -m benchmarks.decoding_quality [--model out/demo/pretrain] [--out benchmarks/decoding_quality.json]

The Frechet distance is the demo's: of generated to real digits, in features of a classifier of digits. Every
seed generates with each variant in turn, so that a busy machine slows all of them alike. Fewer exact steps
stand beside the approximations: what an approximation must beat at the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.errors import InputError
from mage_fast.files import write_json
from mage_fast.model import MAGE
from mage_fast.recipes.classifier import DigitClassifier
from mage_fast.recipes.demo import FRECHET_IMAGES, SAMPLER, images_of
from mage_fast.recipes.loading import load_model
from mage_fast.sampler_config import Approximation, SamplerConfig
from mage_fast.tokenizer import VQGAN
from mage_fast.training.metrics import frechet_distance
from mage_fast.training.run import pick_device

BATCH = 128
#: Each approximation at the demo's settings, and fewer exact steps.
VARIANTS = tuple(
    dataclasses.replace(SAMPLER, approximation=approximation) for approximation in get_args(Approximation)
) + tuple(dataclasses.replace(SAMPLER, steps=steps) for steps in (9, 6))


@torch.no_grad()
def generate(model: MAGE, config: SamplerConfig, images: int, seed: int) -> tuple[Tensor, float]:
    """Images, and the seconds that decoding their ids took (the tokenizer's share is the same in all)."""
    assert model.tokenizer is not None
    decode, parts, seconds = Decoding(model, config), [], 0.0
    for first in range(0, images, BATCH):
        start = time.perf_counter()
        ids_BL = decode(min(BATCH, images - first), seed=seed, first_sample=first)
        if ids_BL.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        parts.append(model.tokenizer.decode(ids_BL))
    return torch.cat(parts), seconds


def measure(
    model: MAGE,
    distance: Callable[[Tensor], float],
    *,
    images: int,
    seeds: Sequence[int],
    variants: Sequence[SamplerConfig] = VARIANTS,
) -> list[dict[str, Any]]:
    """One record a variant: time an image, and the distance's mean and spread over the seeds.

    Args:
        model: a trained model with its tokenizer, in eval mode.
        distance: of generated images to real ones.
        images: how many, for each seed.
        seeds: of the noise, two or more for a spread.
        variants: settings to compare.
    """
    distances: list[list[float]] = [[] for _ in variants]
    milliseconds: list[list[float]] = [[] for _ in variants]
    for config in variants:  # a batch first that no clock sees
        generate(model, config, min(BATCH, images), seed=-1)
    for seed in seeds:
        for number, config in enumerate(variants):
            generated, seconds = generate(model, config, images, seed)
            milliseconds[number].append(1000 * seconds / images)
            distances[number].append(distance(generated))
    return [
        {
            "approximation": config.approximation,
            "steps": config.steps,
            "images": images,
            "seeds": len(seeds),
            "milliseconds_per_image": statistics.median(times),
            "frechet_distance_mean": statistics.mean(found),
            "frechet_distance_std": statistics.stdev(found) if len(found) > 1 else None,
        }
        for config, times, found in zip(variants, milliseconds, distances, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("out/demo/pretrain"), help="the demo's model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/decoding_quality.json"))
    parser.add_argument("--images", type=int, default=FRECHET_IMAGES, help="for each seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.images < 2 or options.seeds < 1:
        raise InputError(
            f"decoding_quality: images is {options.images}, seeds is {options.seeds}, wanted 2 and 1 or more"
        )
    device = pick_device(options.device)
    model = load_model(options.model, device)
    if not isinstance(model.tokenizer, VQGAN):
        raise InputError(f"decoding_quality: {options.model} has no tokenizer to make images with")
    train, test = (images_of(split, model.tokenizer.config.image_size, device) for split in ("train", "test"))
    classifier = DigitClassifier.trained(*train, seed=0)
    real = classifier.features(train[0])

    def distance(images: Tensor) -> float:
        return frechet_distance(classifier.features(images), real)

    records = measure(model, distance, images=options.images, seeds=range(options.seeds))
    floor = distance(test[0])
    write_json(options.out, {"device": device.type, "held_out_real": floor, "records": records})
    table = Table("approximation", "steps", "ms an image", "Frechet distance", title=f"floor {floor:.1f}")
    for found in records:
        spread = found["frechet_distance_std"]
        table.add_row(
            found["approximation"],
            str(found["steps"]),
            f"{found['milliseconds_per_image']:.2f}",
            f"{found['frechet_distance_mean']:.1f}" + ("" if spread is None else f" ± {spread:.1f}"),
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
