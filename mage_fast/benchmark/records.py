"""The record file: one JSON record a measurement, in a list; the fields are the same in every suite."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mage_fast.errors import InputError
from mage_fast.files import write_json

FIELDS = (
    *("suite", "name", "device", "dtype", "shape", "implementation", "baseline", "median_ms"),
    *("baseline_median_ms", "ratio", "floor_ms", "percent_of_floor", "peak_mib", "correct", "rounds"),
    *("images_s", "activation_mib", "mfu_percent", "note", "versions", "date"),
)
#: Fields that earlier record files lack: of whole steps only, images a second, what is kept for the backward
#: pass, the part of the data sheet's peak, and a remark.
ADDED = frozenset({"images_s", "activation_mib", "mfu_percent", "note"})
#: The op's own reference as a baseline.
REFERENCE_NAME = "reference-eager-fp32"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def slug(device: str) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def versions() -> dict[str, str]:
    installed = {d.name for d in importlib.metadata.distributions()}
    wanted = ("mage-fast", "torch", "triton", "numpy", "flash-attn", "xformers", "liger-kernel", "apex")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in wanted if name in installed
    }


def complete(records: Iterable[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The records in the stored form: every field, and where and when they were taken.

    What a record says itself, as the device of a data sheet, stays.
    """
    taken = {
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    named = {"reference": REFERENCE_NAME}
    rows = [taken | r | {"baseline": named.get(str(r.get("baseline")), r.get("baseline"))} for r in records]
    return [{key: row.get(key) for key in FIELDS} for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file.

    Raises:
        InputError: the file is a folder or holds something else.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, wanted a file for the records")
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} does not hold records: {error}") from error
    wanted = set(FIELDS) - ADDED
    known = isinstance(records, list) and all(isinstance(r, dict) and wanted <= set(r) for r in records)
    if not known:
        raise InputError(f"{path} does not hold records: give another file")
    return [{key: r.get(key) for key in FIELDS} for r in records]


def update(path: Path, new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put records into the file; those of the same measurement on the same device are replaced.

    Raises:
        InputError: the file is a folder, holds something else, or lies in a file.
    """
    merged = {_key(r): r for r in (*read(path), *new)}
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent} is a file, wanted a folder for the records")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, list(merged.values()))
    return list(merged.values())


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[k] for k in ("suite", "name", "device", "dtype", "implementation"))
