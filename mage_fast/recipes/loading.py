"""What several recipes do: find the tokenizer or model a path names, and put it on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from mage_fast import storage
from mage_fast.config import MAGEConfig
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.tokenizer import VQGAN
from mage_fast.training.distributed import Processes
from mage_fast.training.precision import autocast
from mage_fast.training.sources import Source

Precision = Literal["fp32", "bf16"]


def load_model(path: Path, device: torch.device) -> MAGE:
    """A model with its tokenizer, in eval mode.

    Raises:
        CheckpointError: missing, truncated or of another width.
        InputError: nothing there, or a tokenizer alone.
    """
    if not path.exists():
        raise InputError(f"there is no model at {path}: train one with mage-fast pretrain, or give --model")
    if path.is_dir() and _is_tokenizer(path):
        raise InputError(f"{path} holds a tokenizer, wanted a model")
    if path.is_dir() and "mage" in storage.read_config(path):
        raise InputError(f"{path} holds a classifier, wanted the model that it was made of")
    return MAGE.from_pretrained(path).to(device).eval()


def image_size(model: MAGE) -> int:
    """Pixels along a side of a model's images.

    Raises:
        InputError: a model without a tokenizer.
    """
    if model.config.tokenizer is None:
        raise InputError("this model has no tokenizer to make images with")
    return model.config.tokenizer.image_size


def load_tokenizer(path: Path, device: torch.device) -> VQGAN:
    """A tokenizer from its own folder, from a model's folder, or from a published ``.pth``.

    Raises:
        CheckpointError: missing, truncated or of another width.
        InputError: nothing there, or a model without a tokenizer.
    """
    if not path.exists():
        raise InputError(
            f"there is no tokenizer at {path}: train one with mage-fast train-tokenizer, or give --tokenizer"
        )
    if path.is_dir() and _is_tokenizer(path):
        tokenizer = VQGAN.from_pretrained(path)
    else:
        model = MAGE.from_pretrained(path)
        if not isinstance(model.tokenizer, VQGAN):
            raise InputError(f"{path} holds a model without a tokenizer")
        tokenizer = model.tokenizer
    return tokenizer.requires_grad_(False).to(device).eval()


def _is_tokenizer(folder: Path) -> bool:
    return "codebook_dim" in storage.read_config(folder)


def fitting_batch_size(
    verb: str, source: Source, given: int | None, default: int, processes: Processes, accumulate: int
) -> int:
    """Images a step: as given, else the default or, of less data, as many as there are.

    Raises:
        InputError: a number that the step's micro-batches do not divide.
    """
    split, batch_size = processes.count * accumulate, default if given is None else given
    if given is None and len(source) < batch_size:
        batch_size = max(len(source) // split, 1) * split
    if batch_size % split:
        raise InputError(
            f"{verb}: batch_size is {batch_size}, wanted a multiple of {split}: "
            f"{processes.count} processes times {accumulate} accumulated"
        )
    return batch_size


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast, or nothing."""
    return autocast(precision, device)


def preset(name: str, tokenizer: VQGAN, **changes: object) -> MAGEConfig:
    """A named model size over a tokenizer's grid and codebook."""
    sizes = {"grid_size": tokenizer.grid_size, "codebook_size": tokenizer.codebook_size}
    make = {"vit_b": MAGEConfig.vit_b, "vit_l": MAGEConfig.vit_l, "vit_h": MAGEConfig.vit_h}
    return (make | {"small": MAGEConfig.small})[name](tokenizer=tokenizer.config, **sizes, **changes)
