"""Every op at every spec under pytest-benchmark: `make bench` times them, the test suite runs the tiny ones.

``mage-fast bench`` times the same cases side by side, round by round, in place of one after another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.conftest import DEVICE
from mage_fast.benchmark import cases
from mage_fast.benchmark.gate import Gate
from mage_fast.benchmark.measure import Row
from mage_fast.benchmark.timing import Timing
from mage_fast.kernels import dispatch
from mage_fast.kernels.roofline import Device

PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for smoke in (False, True)
    for case in cases.cases(dispatch.OPS, DEVICE, smoke=smoke)
    for name in cases.implementations(case.op, DEVICE)
]


@pytest.mark.parametrize(("case", "implementation"), PAIRS)
def test_op(
    case: cases.Case, implementation: str, benchmark: Any, device_limits: Device | None, rows: list[Row]
) -> None:
    inputs = case.inputs()
    try:
        Gate(case, inputs).check(implementation)
    except dispatch.Unsupported as error:
        pytest.skip(str(error))
    run, _ = case.runner(implementation, inputs)
    benchmark.group = case.name

    def timed() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
    if benchmark.stats is None:  # --benchmark-disable: a smoke run
        return
    floor_ms = 1e3 * device_limits.floor_seconds(case.work, case.dtype) if device_limits else None
    timing = Timing(tuple(1e3 * seconds for seconds in benchmark.stats.stats.data))
    rows.append(Row(case, implementation, timing, None, floor_ms))
