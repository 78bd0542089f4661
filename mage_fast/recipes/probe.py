"""``mage-fast probe``: linear probing of a model's frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import write_json
from mage_fast.model import MAGE
from mage_fast.probe import chance_level, linear_probe
from mage_fast.recipes.loading import Precision, load_model, precision_context
from mage_fast.training.data import batches, open_source, steps_per_epoch
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device
from mage_fast.training.sources import Split


@dataclass(frozen=True)
class ProbeConfig:
    """Fit a linear classifier on frozen encoder features and score it on held-out data."""

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Labelled data: digits, folder:PATH, webdataset:PATH, tokens:PATH or hf:NAME.
    data: str = "digits"
    #: JSON file for the result; printed only, without.
    out: Path | None = None
    #: Encoder block whose output is probed, from 0; the last without.
    block: int | None = None
    batch_size: int = 128
    workers: int = 0
    device: str = "auto"
    precision: Precision = "fp32"


def run(config: ProbeConfig) -> dict[str, object]:
    """Probe; returns accuracies on the training and the held-out split, and the chance level.

    Raises:
        InputError: an unknown source, unlabelled data, a batch size below 1.
        ValueError: no such block.
    """
    if config.batch_size < 1:
        raise InputError(f"probe: batch_size is {config.batch_size}, wanted 1 or more")
    device = pick_device(config.device)
    model = load_model(config.model, device)
    train, test = (
        extract_features(
            model,
            config.data,
            split,
            block=config.block,
            batch_size=config.batch_size,
            workers=config.workers,
            precision=config.precision,
        )
        for split in ("train", "test")
    )
    top1 = linear_probe(*train, *test)
    result: dict[str, object] = {
        **{"train_top1": top1.train_top1, "test_top1": top1.test_top1, "chance": chance_level(test[1])},
        **{"train_images": len(train[1]), "test_images": len(test[1]), "model": str(config.model)},
        "data": config.data,
    }
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, result)
    return result


def extract_features(
    model: MAGE,
    data: str,
    split: Split,
    *,
    block: int | None = None,
    batch_size: int = 128,
    workers: int = 0,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Mean-pooled features ``[N, D]`` and labels of a split, with the evaluation's crop.

    Raises:
        InputError: an unknown source, or data of a single class.
    """
    tokenizer = model.config.tokenizer
    source = open_source(data, image_size=tokenizer.image_size if tokenizer else 256, split=split)
    if source.num_classes < 2:
        raise InputError(f"{data} has {source.num_classes} class, wanted labelled data of two or more")
    device = model.head.bias.device
    stream = batches(source, batch_size, shuffle=False, drop_last=False, augment="eval", workers=workers)
    steps = steps_per_epoch(source, batch_size, drop_last=False)
    features, labels = [], []
    for batch in progress(stream, f"features ({split})", steps):
        with torch.no_grad(), precision_context(precision, device):
            features.append(model.features(batch.inputs.to(device), block=block).float().cpu())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)
