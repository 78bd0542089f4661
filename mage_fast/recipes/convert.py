"""``mage-fast convert``: published checkpoints to our folders and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mage_fast import checkpoint, storage
from mage_fast.errors import InputError
from mage_fast.model import MAGE


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a published .pth to a folder (config.json, model.safetensors), or a folder to a .pth."""

    #: The published .pth or .safetensors file, or a model's folder.
    source: Path
    #: A new folder, or a new .pth or .safetensors file. Nothing that exists is overwritten.
    out: Path


def run(config: ConvertConfig) -> dict[str, object]:
    """Convert, strictly: every tensor is accounted for by name and shape.

    Raises:
        InputError: ``out`` exists, or both are of one kind.
        CheckpointError: missing, truncated or of another width.
    """
    to_file = config.out.suffix in (".pth", ".safetensors")
    if config.out.exists():
        raise InputError(f"{config.out} exists, wanted a new path")
    if to_file == (not config.source.is_dir()):
        kind = "file" if to_file else "folder"
        raise InputError(f"source and out are both a {kind}, wanted a published file and a model's folder")
    model = MAGE.from_pretrained(config.source)
    if to_file:
        published = checkpoint.to_published(model.state_dict(), model.config)
        if config.out.suffix == ".pth":
            checkpoint.save_published(config.out, published)
        else:
            storage.save_safetensors(config.out, published)
        tensors = len(published)
    else:
        model.save_pretrained(config.out)
        tensors = len(model.state_dict())
    return {"tensors": tensors, "out": str(config.out)}
