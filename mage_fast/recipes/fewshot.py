"""``mage-fast fewshot``: a linear classifier on frozen features with a few labelled images a class."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import require_folder, write_json
from mage_fast.probe import chance_level, linear_probe
from mage_fast.recipes.accuracy_plots import accuracy_curves
from mage_fast.recipes.features import FeatureReader, Features, open_labelled
from mage_fast.recipes.loading import Precision, load_model
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device
from mage_fast.training.sources import Source


@dataclass(frozen=True)
class FewshotConfig:
    """Fit a linear classifier on frozen features of a few labelled images a class, several draws of them."""

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Labelled data: digits, folder:PATH, webdataset:PATH, tokens:PATH or hf:NAME.
    data: str = "digits"
    #: Labelled images a class; the paper's by default.
    shots: tuple[int, ...] = (5, 10, 13, 25)
    #: Draws of these images: seeds 0, 1, 2, ...
    seeds: int = 5
    #: Folder of fewshot.json, fewshot.png and the features; printed only, without.
    out: Path | None = None
    #: Encoder block whose output is used, from 0; the last without.
    block: int | None = None
    #: Images encoded at a time.
    batch_size: int = 128
    workers: int = 0
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: FewshotConfig) -> dict[str, Any]:
    """Fit and score; returns the accuracies on the held-out split for each number of images a class.

    Raises:
        InputError: an unknown source, unlabelled data, a class with fewer images than wanted, a number out
            of range.
    """
    check_draws("fewshot", config.shots, config.seeds, config.out)
    model = load_model(config.model, pick_device(config.device))
    folder = None if config.out is None else config.out / "features"
    reader = FeatureReader(model, config.block, config.batch_size, config.workers, config.precision, folder)
    sources = [open_labelled("fewshot", model, config.data, split) for split in ("train", "test")]
    require_shots(sources[0], max(config.shots))
    train, test = (reader.read(source, name) for source, name in zip(sources, ("train", "test"), strict=True))
    draws = [(shots, seed) for shots in config.shots for seed in range(config.seeds)]
    found: dict[int, list[float]] = {shots: [] for shots in config.shots}
    for shots, seed in progress(draws, "few-shot"):
        found[shots].append(few_shot_accuracy(train, test, shots, seed))
    chance = chance_level(test.labels_N)
    result = {
        **{"model": str(config.model), "data": config.data, "block": config.block},
        **{"precision": config.precision, "test_images": len(test.labels_N), "chance": chance},
        "shots": [{"shots": shots} | summary(values) for shots, values in found.items()],
    }
    rows = {str(shots): values for shots, values in found.items()}
    print_table(f"{config.model} on {config.data}", "images a class", rows)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        accuracy_curves(
            config.out / "fewshot.png",
            config.shots,
            {"linear": list(found.values())},
            label="labelled images a class",
            chance=chance,
        )
        write_json(config.out / "fewshot.json", result)
    return result


def few_shot_accuracy(train: Features, test: Features, shots: int, seed: int) -> float:
    """Held-out top-1 accuracy in [0, 1] of :func:`linear_probe` on ``shots`` images a class."""
    chosen = draw_shots(train.labels_N, shots, seed)
    train_ND, test_MD = train.features_HND[-1], test.features_HND[-1]
    return linear_probe(train_ND[chosen], train.labels_N[chosen], test_MD, test.labels_N).test_top1


def draw_shots(labels_N: Int64[Tensor, " N"], shots: int, seed: int) -> Int64[Tensor, " S"]:
    """Indices of ``shots`` items of every class, ascending by class.

    Of one seed, fewer shots are a part of more.

    Raises:
        InputError: a class has fewer.
    """
    chosen = []
    for label in labels_N.unique().tolist():
        items = torch.nonzero(labels_N == label).flatten().numpy()
        if len(items) < shots:
            raise InputError(f"class {label} has {len(items)} readable images, wanted {shots}")
        chosen.append(np.random.default_rng((seed, label)).permutation(items)[:shots])
    return torch.from_numpy(np.concatenate(chosen))


def require_shots(source: Source, shots: int) -> None:
    """Check that every class has so many training images.

    Raises:
        InputError: one has fewer; the message names it.
    """
    counts = np.bincount(source.labels, minlength=source.num_classes)
    fewest = int(counts.argmin())
    if counts[fewest] < shots:
        raise InputError(
            f"{source.spec}: class {source.class_names[fewest]} has {counts[fewest]} training images, wanted "
            f"at least the {shots} that are to be drawn of each"
        )


def check_draws(verb: str, shots: Sequence[int], seeds: int, out: Path | None) -> None:
    """Check the numbers, and that ``out`` can be a folder.

    Raises:
        InputError: they are out of range, or it is a file.
    """
    if not shots or min(shots) < 1 or len(set(shots)) < len(shots) or seeds < 1:
        raise InputError(
            f"{verb}: shots {list(shots)}, seeds {seeds}: wanted different shots, these and seeds 1 or more"
        )
    if out is not None:
        require_folder(out, "the result")


def summary(accuracies: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one draw) and the accuracies themselves."""
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"mean": statistics.fmean(accuracies), "deviation": deviation, "accuracies": list(accuracies)}


def print_table(title: str, first: str, rows: dict[str, list[float]]) -> None:
    """A row a number of images or a data set, to standard error."""
    table = Table()
    for column in (first, "top-1", "deviation", "least", "greatest"):
        table.add_column(column, justify="left" if column == first else "right")
    for name, values in rows.items():
        about = summary(values)
        cells = (about["mean"], about["deviation"], min(values), max(values))
        table.add_row(name, *(f"{value:.1%}" for value in cells))
    console = Console(stderr=True)
    draws = len(next(iter(rows.values())))
    console.print(f"{title}, {draws} draws of the labelled images", highlight=False, markup=False)
    console.print(table)
