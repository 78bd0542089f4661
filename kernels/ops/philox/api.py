"""``philox``: a block of counter-based random words, the source of every random number in the package."""

from __future__ import annotations

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from mage_fast.kernels import check, dispatch, library


def philox(
    state: Int64[Tensor, " 2"],
    stream: int,
    high: int,
    low: int,
    *,
    first_high: int = 0,
    implementation: str = "auto",
) -> Int32[Tensor, "high low 4"]:
    """Philox-4x32-10 words for the counters ``(j, first_high + i, stream, step)``, ``i < high``, ``j < low``.

    Equivalent PyTorch: :func:`mage_fast.kernels.ops.philox.reference.philox_4x32` on broadcast counters.

    Args:
        state: int64 ``(seed, step)`` on the device that draws; the key is the seed, ``step`` the last
            counter word. It is read on the device, so a replayed CUDA graph draws fresh numbers.
        stream: third counter word in [0, 2**32), see :func:`mage_fast.kernels.rng.stream`.
        high: how many values of the second counter word.
        low: how many values of the first counter word.
        first_high: first value of the second counter word.

    Returns:
        The 32-bit words as int32 bit patterns, in memory order: viewed as uint8 they are 16 bytes a block.

    Raises:
        ValueError: a state of another dtype or shape, a stream outside [0, 2**32), or a count outside
            [0, 2**32].

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    check.state("philox", state)
    if not 0 <= stream < 2**32:
        raise ValueError(f"philox: stream is {stream}, wanted 0 <= stream < 2**32")
    for name, value in (("high", high), ("low", low), ("first_high + high", first_high + high)):
        if not 0 <= value <= 2**32:
            raise ValueError(f"philox: {name} is {value}, wanted 0 <= {name} <= 2**32")
    return _philox(state, stream, high, low, first_high, dispatch.requested("philox", implementation))


def _fake(state: Tensor, stream: int, high: int, low: int, first_high: int, implementation: str) -> Tensor:
    return torch.empty(high, low, 4, dtype=torch.int32, device=state.device)


_philox = library.define(
    "philox(Tensor state, SymInt stream, SymInt high, SymInt low, SymInt first_high, str implementation) "
    "-> Tensor",
    fake=_fake,
)
