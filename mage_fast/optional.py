"""Optional packages: imported where they are used, with the way to install them where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from mage_fast.errors import InputError

#: Extras whose packages import torchvision.
WITH_TORCHVISION = ("evaluate", "finetune", "lpips")
#: torchvision's compiled operators without whose schemas it does not import.
SCHEMAS = tuple(
    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")
)
_defined: list[torch.library.Library] = []  # a definition lasts as long as its library


def optional(name: str, *, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Some packages import torchvision. Its wheels hold operators that are linked with one build of torch;
    beside another, as a CPU build, its import ends at them. Then their schemas are defined, so that all of
    torchvision that is written in Python works; the operators themselves (none is used here) stay missing.

    Args:
        name: as ``"timm.data"``.
        extra: of this package, that installs it.

    Raises:
        InputError: missing, or it does not load here; with the command that installs it.
    """
    try:
        if extra in WITH_TORCHVISION:
            _import_torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"{name} does not load: pip install 'mage-fast[{extra}]' installs it ({error})"
        ) from error


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _defined.append(library)
        importlib.import_module("torchvision")
