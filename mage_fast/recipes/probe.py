"""``mage-fast probe``: linear probing of a model's frozen features, and their nearest neighbours."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mage_fast.errors import InputError
from mage_fast.files import require_folder, write_json
from mage_fast.probe import chance_level, knn_accuracy, linear_probe
from mage_fast.recipes.accuracy_plots import accuracy_curves
from mage_fast.recipes.features import Block, FeatureReader, Features, extract_features, open_labelled
from mage_fast.recipes.loading import Precision, load_model
from mage_fast.recipes.probe_training import (
    FeatureStream,
    FreshFeatures,
    HeadChoices,
    HeadTraining,
    KeptFeatures,
)
from mage_fast.training.run import Run, check_settings, pick_device
from mage_fast.training.sources import Source
from mage_fast.training.watch import NEIGHBOURS

__all__ = ["HeadChoices", "ProbeConfig", "extract_features", "run"]

RESULT, BLOCKS = "probe.json", "blocks.png"
#: Settings of a result that must not change in its folder; features know their model.
FIXED = ("data", "recipe", "block", "precision")


@dataclass(frozen=True)
class ProbeConfig:
    """Fit a linear classifier on frozen encoder features and score it on held-out data."""

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Labelled data: digits, folder:PATH, webdataset:PATH, tokens:PATH or hf:NAME.
    data: str = "digits"
    #: solved: logistic regression on features of the evaluation's crop. exact: the paper's, a head trained by
    #: LARS while images are augmented anew. cached: the same training on features computed once.
    recipe: Literal["solved", "cached", "exact"] = "solved"
    #: Folder of probe.json, features, plots and the head's training; printed only, without. A trained head
    #: wants one.
    out: Path | None = None
    #: Encoder block whose output is probed, from 0; all: every one (figure 6); the last without.
    block: Block = None
    head: HeadChoices = field(default_factory=HeadChoices)
    #: Images encoded at a time.
    batch_size: int = 128
    workers: int = 0
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: ProbeConfig) -> dict[str, Any]:
    """Probe; returns the accuracy on the held-out split and the chance level, of "all" for every block.

    Of recipe solved also the accuracy on the training split, and, where the evaluation's crop of it is read,
    that of weighted nearest neighbours. The same command goes on where it stopped.

    Raises:
        InputError: an unknown source, unlabelled data, a number out of range, a folder with another probe.
        TrainingError: a trained head's loss is not finite.
        ValueError: no such block.
    """
    _check_folder(config)
    device = pick_device(config.device)
    model = load_model(config.model, device)
    folder = None if config.out is None else config.out / "features"
    reader = FeatureReader(model, config.block, config.batch_size, config.workers, config.precision, folder)
    train, test = (open_labelled("probe", model, config.data, split) for split in ("train", "test"))
    choices = config.head.checked(model.config.encoder_width, len(train))
    result: dict[str, Any] = {
        **{"model": str(config.model), "data": config.data, "recipe": config.recipe},
        **{"block": config.block, "precision": config.precision, "train_images": len(train)},
    }
    settings: dict[str, Any] = {}
    if config.out is not None and config.recipe != "solved":
        settings = reader.settings(train) | {"recipe": config.recipe} | dataclasses.asdict(choices)
        Run(config.out, settings).refuse_other_settings()
    test_features = reader.read(test, "test")
    result |= {"test_images": len(test_features.labels_N), "chance": chance_level(test_features.labels_N)}
    if config.recipe == "solved":
        blocks = _solved(reader, train, test_features)
    else:
        trained = _trained(config, choices, settings, reader, train, test_features)
        if trained.get("stopped_by"):
            return trained
        blocks = trained.pop("accuracies")
        result |= trained
    result |= blocks[-1]
    if config.block == "all":
        result["blocks"] = [{"block": number} | found for number, found in enumerate(blocks)]
        _print_table(config, blocks)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        if config.block == "all":
            titles = {"test_top1": "linear", "knn_top1": "nearest neighbours"}
            curves = {
                title: [[found[key]] for found in blocks] for key, title in titles.items() if key in blocks[0]
            }
            accuracy_curves(
                config.out / BLOCKS, reader.blocks, curves, label="encoder block", chance=result["chance"]
            )
        write_json(config.out / RESULT, result)
    return result


def _solved(reader: FeatureReader, train: Source, test: Features) -> list[dict[str, float]]:
    """Accuracies of every block that is read."""
    features_HND, labels_N = reader.read(train, "train")
    found = []
    for train_ND, test_MD in zip(features_HND, test.features_HND, strict=True):
        top1 = linear_probe(train_ND, labels_N, test_MD, test.labels_N)
        knn = _knn(reader, train_ND, labels_N, test_MD, test.labels_N)
        found.append({"train_top1": top1.train_top1, "test_top1": top1.test_top1, "knn_top1": knn})
    return found


def _trained(
    config: ProbeConfig,
    choices: HeadChoices,
    settings: dict[str, Any],
    reader: FeatureReader,
    train: Source,
    test: Features,
) -> dict[str, Any]:
    """``accuracies`` of every block, steps, and what stopped the training, if anything did."""
    assert config.out is not None
    model = reader.model
    device, width = model.head.bias.device, model.config.encoder_width
    stream: FeatureStream
    views: list[Features] = []
    if config.recipe == "exact":
        stream, images = FreshFeatures(reader, train, choices), len(train)
    else:
        if choices.views == 0:
            views = [reader.read(train, "train")]
        else:
            augment, seed = choices.augment, choices.seed
            views = [
                reader.read(train, f"train-view-{view}", augment=augment, epoch=view, seed=seed)
                for view in range(min(choices.views, choices.epochs))
            ]
        stream, images = KeptFeatures(views, choices, device), len(views[0].labels_N)
    training = HeadTraining(choices, len(reader.blocks), width, train.num_classes, images, test, device)
    done = training.run(config.out, settings, stream)
    about = {"steps": done.step, "stopped_by": done.stopped_by}
    if done.stopped_by:
        return about | {"out": str(config.out)}
    accuracies = [{"test_top1": top1} for top1 in training.accuracies()]
    if config.recipe == "cached" and choices.views == 0:
        for found, train_ND, test_MD in zip(
            accuracies, views[0].features_HND, test.features_HND, strict=True
        ):
            found["knn_top1"] = _knn(reader, train_ND, views[0].labels_N, test_MD, test.labels_N)
    return about | {"accuracies": accuracies}


def _knn(reader: FeatureReader, train_ND: Any, labels_N: Any, test_MD: Any, test_labels_M: Any) -> float:
    device = reader.model.head.bias.device
    parts = (x.to(device) for x in (train_ND, labels_N, test_MD, test_labels_M))
    return knn_accuracy(*parts, k=min(NEIGHBOURS, len(labels_N)))


def _check_folder(config: ProbeConfig) -> None:
    if config.out is None:
        if config.recipe != "solved":
            raise InputError(f"probe: recipe {config.recipe} trains a head, wanted --out, the run's folder")
        return
    require_folder(config.out, "the probe")
    path = config.out / RESULT
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no result of a probe: give another --out") from error
        check_settings(config.out, {k: saved.get(k) for k in FIXED}, {k: getattr(config, k) for k in FIXED})


def _print_table(config: ProbeConfig, blocks: list[dict[str, float]]) -> None:
    table = Table()
    table.add_column("block", justify="right")
    for key in blocks[0]:
        table.add_column(key, justify="right")
    for number, found in enumerate(blocks):
        table.add_row(str(number), *(f"{value:.1%}" for value in found.values()))
    console = Console(stderr=True)
    title = f"{config.model} on {config.data}: top-1 accuracy after each block"
    console.print(title, highlight=False, markup=False)
    console.print(table)
