"""``nearest_code``: the codebook entry nearest to each feature, the tokenizer's quantisation.

Shape suffixes: N features, K codebook entries, D channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def nearest_code(
    x_ND: Float[Tensor, "N D"], codebook_KD: Float[Tensor, "K D"], *, implementation: str = "auto"
) -> Int64[Tensor, " N"]:
    """Find the codebook entry at the smallest squared L2 distance; of equal ones the lowest index.

    Equivalent PyTorch, without the whole distance matrix in memory::

        torch.cdist(x, codebook).argmin(1)

    Args:
        x_ND: features; float64, float32, bfloat16 or float16.
        codebook_KD: at least one entry.
        implementation: ``"auto"`` or the name of one.

    Returns:
        int64 indices in [0, K), without gradient. Distances in float32 (float64 if either is float64), as
        ``|c|^2 - 2 x.c``: of codes nearer to each other than its rounding, either may come out.

    Raises:
        ValueError: shapes that disagree, an empty codebook, a dtype that is not floating.
        Unsupported: the forced implementation cannot run here.

    Source: vector quantisation of the VQGAN tokenizer (van den Oord et al., 2017).
    """
    op = "nearest_code"
    check.shape(op, "x", x_ND, (None, None))
    check.features(op, "x", x_ND)
    check.floating(op, "x", x_ND)
    check.shape(op, "codebook", codebook_KD, (None, x_ND.shape[1]))
    check.floating(op, "codebook", codebook_KD)
    if codebook_KD.shape[0] == 0:
        raise ValueError(f"{op}: codebook has 0 entries, wanted at least 1")
    check.same_device(op, x_ND, codebook=codebook_KD)
    implementation = dispatch.requested(op, implementation)
    return _nearest_code(x_ND.detach(), codebook_KD.detach(), implementation)


def _fake(x: Tensor, codebook: Tensor, implementation: str) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.int64)


_nearest_code = library.define(
    "nearest_code(Tensor x, Tensor codebook, str implementation) -> Tensor", fake=_fake
)
