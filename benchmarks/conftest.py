"""Options and the record file of the benchmarks: one JSON record a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RECORDS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="record file, otherwise benchmarks/results/<device>.json")
    parser.addoption("--smoke", action="store_true", help="the tiny specs in place of the real ones")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smoke = config.getoption("--smoke")
    # the small specs are for kernels in the interpreter: neither quick nor real
    items[:] = [item for item in items if ("/tiny" in item.name) == smoke and "/small" not in item.name]


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Keep one measurement; fields that do not apply are None in the file."""
    return lambda **fields: pytestconfig.stash[RECORDS].append(fields)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    installed = {d.name for d in importlib.metadata.distributions()}
    wanted = ("mage-fast", "torch", "triton", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in wanted if name in installed
    }


def complete(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in the stored form: with their baseline's time, the ratio, and where they were taken."""
    median = {(r["name"], r["implementation"]): r["median_ms"] for r in records}
    taken = {"device": device_name(), "versions": versions(), "date": datetime.date.today().isoformat()}
    keys = (
        *("suite", "name", "device", "dtype", "shape", "implementation", "baseline", "median_ms"),
        *("baseline_median_ms", "ratio", "floor_ms", "percent_of_floor", "peak_mib", "correct", "rounds"),
        *("versions", "date"),
    )
    out = []
    for r in records:
        base = median.get((r["name"], r["baseline"]))
        named = {"reference": "reference-eager-fp32"}.get(r["baseline"], r["baseline"])
        ratio = base / r["median_ms"] if base else None
        row = r | taken | {"baseline": named, "baseline_median_ms": base, "ratio": ratio}
        out.append({key: row.get(key) for key in keys})
    return out


def pytest_sessionfinish(session: pytest.Session) -> None:
    records = session.config.stash[RECORDS]
    if not records:
        return
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    out = session.config.getoption("--out") or Path(__file__).parent / "results" / f"{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(complete(records), indent=1) + "\n")
    os.replace(temporary, out)
