"""The ops by themselves, for any masked-token model: ``mage_fast.ops.attention(...)``.

Each is the public function of ``mage_fast.kernels.ops.<op>.api`` and is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mage_fast.kernels.ops.add_norm.api import add_norm
    from mage_fast.kernels.ops.attention.api import attention
    from mage_fast.kernels.ops.bias_gelu.api import bias_gelu
    from mage_fast.kernels.ops.embed_kept.api import embed_kept
    from mage_fast.kernels.ops.group_norm_silu.api import group_norm_silu
    from mage_fast.kernels.ops.linear.api import linear
    from mage_fast.kernels.ops.linear_cross_entropy.api import linear_cross_entropy
    from mage_fast.kernels.ops.mask_plan.api import mask_plan
    from mage_fast.kernels.ops.masked_cross_entropy.api import masked_cross_entropy
    from mage_fast.kernels.ops.nearest_code.api import nearest_code
    from mage_fast.kernels.ops.pad_decoder.api import pad_decoder
    from mage_fast.kernels.ops.philox.api import philox
    from mage_fast.kernels.ops.sample_confident.api import sample_confident

__all__ = [
    "add_norm",
    "attention",
    "bias_gelu",
    "embed_kept",
    "group_norm_silu",
    "linear",
    "linear_cross_entropy",
    "mask_plan",
    "masked_cross_entropy",
    "nearest_code",
    "pad_decoder",
    "philox",
    "sample_confident",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no op {name!r}; the ops are {', '.join(__all__)}")
    function = getattr(importlib.import_module(f"mage_fast.kernels.ops.{name}.api"), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return __all__
