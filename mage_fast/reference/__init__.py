"""The paper in plain eager PyTorch, as the published release computes it: oracle and speed baseline.

Imports nothing else of ``mage_fast``, so that it can be read, trusted and copied alone.
"""

from __future__ import annotations

from typing import Any

from .generate import Generated, generate, num_remasked
from .model import MAGE, MAGEOutput
from .vqgan import VQGAN

__all__ = ["MAGE", "VQGAN", "Generated", "MAGEOutput", "generate", "num_remasked", "vit_b", "vit_l"]


def vit_b(**changes: Any) -> MAGE:
    """ViT-B with the published tokenizer."""
    base: dict[str, Any] = {"vqgan": VQGAN()}
    return MAGE(**(base | changes))


def vit_l(**changes: Any) -> MAGE:
    """ViT-L with the published tokenizer."""
    large: dict[str, Any] = {
        **{"encoder_width": 1024, "encoder_depth": 24, "encoder_heads": 16},
        **{"decoder_width": 1024, "decoder_depth": 8, "decoder_heads": 16},
    }
    return MAGE(**(large | {"vqgan": VQGAN()} | changes))
