"""Fixed-order sums over the partial results of programs: what a parameter's gradient ends in.

Float atomics would add in another order at each run; partials added in theirs give the same bits again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: A program's tile: columns that make whole sectors of memory, all the partials if they are few.
_ELEMENTS, _MOST_PARTIALS = 4096, 128


@triton.jit
def _sum_partials(
    partial, first, second, count, features, PARTIALS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    which = tl.program_id(1)
    partial += which.to(tl.int64) * count * features
    total = tl.zeros([PARTIALS, COLUMNS], tl.float32)
    for start in range(0, count, PARTIALS):
        row = start + tl.arange(0, PARTIALS)[:, None]
        inside = (row < count) & (column < features)
        total += tl.load(partial + row.to(tl.int64) * features + column, mask=inside, other=0.0)
    result = tl.sum(total, 0)[None, :]
    if which == 0:
        tl.store(first + column, result.to(first.dtype.element_ty), mask=column < features)
    else:
        tl.store(second + column, result.to(second.dtype.element_ty), mask=column < features)


def sum_partials(partials: Tensor, *outputs: Tensor) -> None:
    """Sum float32 ``partials [len(outputs), programs, features]`` over programs into one or two outputs."""
    _, count, features = partials.shape
    tile = min(_MOST_PARTIALS, max(4, triton.next_power_of_2(count)))
    columns = _ELEMENTS // tile
    _sum_partials[triton.cdiv(features, columns), len(outputs)](
        partials, outputs[0], outputs[-1], count, features, tile, columns, num_warps=8
    )
