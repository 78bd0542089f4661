"""Every op at every spec: `make bench` times them, the test suite runs the tiny ones once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import cases
from mage_fast.kernels.dispatch import Unsupported


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: f"{case.name}-{case.implementation}")
def test_op(case: cases.Case, benchmark: Any, record: Callable[..., None]) -> None:
    try:
        cases.check(case)
    except Unsupported as error:
        pytest.skip(str(error))
    run, given = case.function(), cases.inputs(case.spec)
    benchmark.group = case.name
    if cases.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def timed() -> None:
        run(given)
        if cases.DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
    if benchmark.stats is None:  # --benchmark-disable: a smoke run
        return
    record(
        suite="kernels",
        name=case.name,
        dtype=case.dtype,
        shape=case.shape,
        implementation=case.implementation,
        baseline=case.baseline,
        median_ms=benchmark.stats.stats.median * 1e3,
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if cases.DEVICE == "cuda" else None,
        correct=True,
        rounds=benchmark.stats.stats.rounds,
    )
