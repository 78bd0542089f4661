"""MAGE (masked generative encoder) with fused kernels.

>>> import mage_fast
>>> model = mage_fast.MAGE(mage_fast.MAGEConfig.vit_b())

Importing this package does no work: each name is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mage_fast import ops
    from mage_fast.acceleration import Accelerated, AcceleratedOutput, accelerate
    from mage_fast.classification import MAGEClassifier
    from mage_fast.config import ClassifierConfig, MAGEConfig, TokenizerConfig
    from mage_fast.contrastive import MAGEC, MAGECOutput, info_nce
    from mage_fast.decoding import Decoding
    from mage_fast.editing import Edited, Reconstructed, edit, reconstruct, token_mask
    from mage_fast.errors import CheckpointError, InputError
    from mage_fast.kernels.check import device_values
    from mage_fast.kernels.dispatch import Unsupported, use_implementation
    from mage_fast.model import MAGE, MAGEOutput
    from mage_fast.sampler import generate, generate_ids
    from mage_fast.sampler_config import SamplerConfig
    from mage_fast.tokenizer import VQGAN, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "MAGE",
    "MAGEC",
    "VQGAN",
    "Accelerated",
    "AcceleratedOutput",
    "CheckpointError",
    "ClassifierConfig",
    "Decoding",
    "Edited",
    "InputError",
    "MAGECOutput",
    "MAGEClassifier",
    "MAGEConfig",
    "MAGEOutput",
    "Reconstructed",
    "SamplerConfig",
    "Tokenizer",
    "TokenizerConfig",
    "Unsupported",
    "__version__",
    "accelerate",
    "device_values",
    "edit",
    "generate",
    "generate_ids",
    "info_nce",
    "ops",
    "reconstruct",
    "token_mask",
    "use_implementation",
]

_HOME = {
    "MAGE": "model",
    "MAGEC": "contrastive",
    "MAGECOutput": "contrastive",
    "MAGEClassifier": "classification",
    "MAGEConfig": "config",
    "MAGEOutput": "model",
    "Accelerated": "acceleration",
    "AcceleratedOutput": "acceleration",
    "CheckpointError": "errors",
    "ClassifierConfig": "config",
    "Decoding": "decoding",
    "Edited": "editing",
    "Reconstructed": "editing",
    "InputError": "errors",
    "SamplerConfig": "sampler_config",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "config",
    "Unsupported": "kernels.dispatch",
    "VQGAN": "tokenizer",
    "accelerate": "acceleration",
    "device_values": "kernels.check",
    "edit": "editing",
    "generate": "sampler",
    "generate_ids": "sampler",
    "info_nce": "contrastive",
    "reconstruct": "editing",
    "token_mask": "editing",
    "use_implementation": "kernels.dispatch",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("mage_fast.ops")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
