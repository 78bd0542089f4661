"""Frozen features of labelled data: computed once, and kept in files where they are wanted again.

Shape suffixes: H blocks of the encoder (one, or all), N images, D features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mage_fast.decoding import eval_mode
from mage_fast.errors import CheckpointError, InputError
from mage_fast.model import MAGE
from mage_fast.recipes.loading import Precision, precision_context
from mage_fast.storage import read_metadata, read_safetensors, save_safetensors
from mage_fast.training.data import batches, open_source, steps_per_epoch
from mage_fast.training.logs import progress
from mage_fast.training.run import check_settings
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.sources import Source, Split, source_fingerprint
from mage_fast.training.watch import check_labelled

#: Which block's output: a number from 0, every one, or the last.
Block = int | Literal["all"] | None


class Features(NamedTuple):
    """Mean-pooled encoder outputs of the images of a split, on the CPU, and their labels."""

    features_HND: Float[Tensor, "H N D"]
    labels_N: Int64[Tensor, " N"]


def open_labelled(what: str, model: MAGE, data: str, split: Split) -> Source:
    """A source of two or more classes that the model can read, at its image size; messages name ``what``.

    Raises:
        InputError: an unknown source, data without labels, tokens of another tokenizer.
    """
    tokenizer = model.config.tokenizer
    source = open_source(data, image_size=tokenizer.image_size if tokenizer else 256, split=split)
    check_labelled(what, model, source)
    return source


@dataclass(frozen=True)
class FeatureReader:
    """Reads the features of sources by one model, frozen and in eval mode.

    Raises:
        InputError: a batch size below 1.
        ValueError: no such block.
    """

    model: MAGE
    block: Block = None
    #: Images encoded at a time.
    batch_size: int = 128
    workers: int = 0
    precision: Precision = "fp32"
    #: Where features are kept, as ``<name>.safetensors``; None keeps none.
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise InputError(
                f"features: batch_size is {self.batch_size}, workers {self.workers}, wanted 1 or more and 0 "
                "or more"
            )
        depth = self.model.config.encoder_depth
        if self.block is not None and self.block != "all" and not 0 <= self.block < depth:
            raise InputError(f"features: block is {self.block}, wanted 0 <= block < {depth}")

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks read, in order."""
        depth = self.model.config.encoder_depth
        if self.block == "all":
            return list(range(depth))
        return [depth - 1 if self.block is None else self.block]

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Float[Tensor, "H B D"]:
        """Features of a batch, float32, on the model's device; all blocks' come from one pass."""
        device = self.model.head.bias.device
        inputs = inputs.to(device, non_blocking=True)
        with precision_context(self.precision, device), eval_mode(self.model):
            if self.block == "all":
                return self.model.block_features(inputs).float()
            return self.model.features(inputs, block=self.block)[None].float()

    def read(
        self, source: Source, name: str, *, augment: str = "eval", epoch: int = 0, seed: int = 0
    ) -> Features:
        """Features of a whole source in its order, damaged images left out; from the folder if kept there.

        Args:
            source: see :func:`open_labelled`.
            name: of the file, and in messages.
            augment: how images are cropped; the evaluation's by default.
            epoch: whose crops those of an augmentation are.
            seed: of these crops.

        Raises:
            InputError: the file there is of another model or other data, features that are not finite.
            CheckpointError: the file there is damaged.
        """
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        settings: dict[str, Any] = {}
        if path is not None:
            settings = self.settings(source) | {"augment": augment, "epoch": epoch, "seed": seed}
            if path.exists():
                return _kept(path, settings)
        stream = batches(
            source,
            self.batch_size,
            shuffle=False,
            drop_last=False,
            augment=augment,
            epoch=epoch,
            seed=seed,
            workers=self.workers,
            pin_memory=self.model.head.bias.is_cuda,
        )
        features, labels = [], []
        for batch in progress(
            stream, f"features ({name})", steps_per_epoch(source, self.batch_size, drop_last=False)
        ):
            features.append(self.encode(batch.inputs).cpu())
            labels.append(batch.labels)
        found = Features(torch.cat(features, 1), torch.cat(labels))
        if not found.features_HND.isfinite().all():
            raise InputError(f"{source.spec}: the model's features ({name}) hold NaN or infinity")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_safetensors(
                path,
                {"features": found.features_HND, "labels": found.labels_N},
                {"settings": json.dumps(settings)},
            )
        return found

    def settings(self, source: Source) -> dict[str, Any]:
        """What decides features: the model's weights, the data's files and labels, block, precision."""
        return {
            "model": self._fingerprint,
            "data": source.spec,
            "items": source_fingerprint(source),
            "block": self.block,
            "precision": self.precision,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return module_fingerprint(self.model)


def extract_features(
    model: MAGE,
    data: str,
    split: Split,
    *,
    block: int | None = None,
    batch_size: int = 128,
    workers: int = 0,
    precision: Precision = "fp32",
) -> tuple[Float[Tensor, "N D"], Int64[Tensor, " N"]]:
    """Mean-pooled features and labels of a split, with the evaluation's crop.

    Raises:
        InputError: an unknown source, or data of a single class.
    """
    reader = FeatureReader(model, block, batch_size, workers, precision)
    features_HND, labels_N = reader.read(open_labelled("features", model, data, split), split)
    return features_HND[0], labels_N


def _kept(path: Path, settings: dict[str, Any]) -> Features:
    try:
        saved = json.loads(read_metadata(path).get("settings", ""))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise CheckpointError(f"{path}: not a file of features") from error
    check_settings(path, saved, settings)
    tensors = read_safetensors(path)
    return Features(tensors["features"], tensors["labels"])
