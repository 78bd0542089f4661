"""The benchmark of waiting for data runs, on sizes too small to mean anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import data_wait


def test_waiting_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["data_wait", "--smoke", "--out", str(tmp_path)])
    data_wait.main()
    records = json.loads((tmp_path / "data_wait.json").read_text())["records"]
    assert len(records) == 3
    assert all(0 <= r["data_wait"] <= 1 and r["images_per_second"] > 0 for r in records)
