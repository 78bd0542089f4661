"""``mage-fast transfer``: linear classifiers on frozen features of several data sets, few labels each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mage_fast.errors import InputError
from mage_fast.files import write_json
from mage_fast.probe import chance_level
from mage_fast.recipes.accuracy_plots import accuracy_bars
from mage_fast.recipes.features import FeatureReader, open_labelled
from mage_fast.recipes.fewshot import check_draws, few_shot_accuracy, print_table, require_shots, summary
from mage_fast.recipes.loading import Precision, load_model
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device


@dataclass(frozen=True)
class TransferConfig:
    """Fit linear classifiers on frozen features of several data sets, 25 labelled images a class each."""

    #: Labelled data sets, one or more: digits, folder:PATH, webdataset:PATH, tokens:PATH or hf:NAME.
    data: tuple[str, ...]
    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Labelled images a class.
    shots: int = 25
    #: Draws of these images: seeds 0, 1, 2, ...
    seeds: int = 5
    #: Folder of transfer.json, transfer.png and the features; printed only, without.
    out: Path | None = None
    #: Encoder block whose output is used, from 0; the last without.
    block: int | None = None
    #: Images encoded at a time.
    batch_size: int = 128
    workers: int = 0
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: TransferConfig) -> dict[str, Any]:
    """Fit and score; returns the accuracies on each data set's held-out split.

    All data sets are opened and checked before the first is read.

    Raises:
        InputError: no data, or one twice; an unknown source, unlabelled data, a class with fewer images than
            wanted, a number out of range.
    """
    check_draws("transfer", [config.shots], config.seeds, config.out)
    if not config.data or len(set(config.data)) < len(config.data):
        raise InputError(f"transfer: data is {list(config.data)}, wanted one or more, each once")
    model = load_model(config.model, pick_device(config.device))
    folder = None if config.out is None else config.out / "features"
    reader = FeatureReader(model, config.block, config.batch_size, config.workers, config.precision, folder)
    sources = {
        data: [open_labelled("transfer", model, data, split) for split in ("train", "test")]
        for data in config.data
    }
    for train_source, _ in sources.values():
        require_shots(train_source, config.shots)
    found: dict[str, list[float]] = {}
    chance: dict[str, float] = {}
    rows = []
    names = short_names(config.data)
    for name, (data, (train_source, test_source)) in zip(names, sources.items(), strict=True):
        train, test = (
            reader.read(source, f"{hashlib.sha256(data.encode()).hexdigest()[:12]}-{split}")
            for source, split in ((train_source, "train"), (test_source, "test"))
        )
        found[name] = [
            few_shot_accuracy(train, test, config.shots, seed) for seed in progress(range(config.seeds), name)
        ]
        chance[name] = chance_level(test.labels_N)
        rows.append(
            {"data": data, "name": name, "classes": train_source.num_classes, "chance": chance[name]}
            | {"test_images": len(test.labels_N)}
            | summary(found[name])
        )
    print_table(f"{config.model}, {config.shots} labelled images a class", "data", found)
    result = {
        **{"model": str(config.model), "shots": config.shots, "block": config.block},
        **{"precision": config.precision, "data": rows},
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        accuracy_bars(config.out / "transfer.png", found, chance=chance)
        write_json(config.out / "transfer.json", result)
    return result


def short_names(specs: Sequence[str]) -> list[str]:
    """What tables call the data sets: the last part of each path, or the whole where two would be alike."""
    short = [Path(spec.partition(":")[2]).name or spec for spec in specs]
    return short if len(set(short)) == len(short) else list(specs)
