"""Options of the benchmarks under pytest-benchmark, and the record file that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mage_fast.benchmark import limits, records
from mage_fast.benchmark.measure import Row
from mage_fast.kernels.roofline import Device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
LIMITS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="record file, otherwise benchmarks/results/<device>.json")
    parser.addoption("--smoke", action="store_true", help="the tiny specs in place of the real ones")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[LIMITS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smoke = config.getoption("--smoke")
    # the small specs are for kernels in the interpreter: neither quick nor real
    items[:] = [item for item in items if ("/tiny" in item.name) == smoke and "/small" not in item.name]


@pytest.fixture(scope="session")
def device_limits(pytestconfig: pytest.Config) -> Device | None:
    """What the device can do, measured once; None where nothing is timed."""
    if not pytestconfig.getoption("benchmark_enable") and pytestconfig.getoption("benchmark_disable"):
        return None
    pytestconfig.stash[LIMITS] += limits.measure(DEVICE, 0.5, smoke=pytestconfig.getoption("--smoke"))
    return limits.as_device(pytestconfig.stash[LIMITS])


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> list[Row]:
    """To be appended to: one row a measurement."""
    return pytestconfig.stash[ROWS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[ROWS]
    if not rows:
        return
    out = session.config.getoption("--out")
    out = out or Path(__file__).parent / "results" / f"{records.slug(DEVICE)}.json"
    medians = {(r.case.name, r.implementation): r.timing.median_ms for r in rows if r.timing}
    compared = [r.against(medians.get((r.case.name, r.case.baseline))) for r in rows]
    kernels = [row.record() for row in compared]
    records.update(out, records.complete([*session.config.stash[LIMITS], *kernels], DEVICE))
