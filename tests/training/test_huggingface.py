"""The Hugging Face source: against a stand-in of the package, and the package where it is installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from made_images import BAD, gradient

from mage_fast.errors import InputError
from mage_fast.training.data import batches, open_source


def test_hugging_face_source_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install mage-fast\[datasets\]"):
        open_source("hf:mnist")


class _Image:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class _ClassLabel:
    names = ("cat", "dog")


class _Rows:
    """The part of datasets.Dataset that is in use."""

    def __init__(self, rows: list[dict], features: dict) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> object:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, column: str, feature: _Image) -> _Rows:
        assert not feature.decode
        return _Rows(self.rows, self.features | {column: feature})


def test_hugging_face_source_reads_splits_and_columns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gradient().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = [{"picture": {"bytes": content, "path": None}, "kind": i % 2} for i in range(10)]
    rows[3] = {"picture": {"bytes": content[:60], "path": None}, "kind": 1}
    rows[4] = {"picture": {"bytes": None, "path": str(tmp_path / "a.png")}, "kind": 0}
    features = {"kind": _ClassLabel(), "picture": _Image()}
    module = types.SimpleNamespace(
        Image=_Image,
        ClassLabel=_ClassLabel,
        load_dataset=lambda name: {"train": _Rows(rows, features), "validation": _Rows(rows[:2], features)},
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = open_source("hf:owner/pets")
    assert (len(source), source.class_names) == (10, ("cat", "dog"))
    assert len(open_source("hf:owner/pets", split="test")) == 2
    assert len(open_source("hf:owner/pets:validation")) == 2
    with pytest.raises(InputError, match="names one split, so nothing is held out"):
        open_source("hf:owner/pets:train", split="test")
    (batch,) = batches(source, 10, image_size=16, shuffle=False)
    assert len(batch.labels) == 9
    assert list(source.bad_files) == ["hf:owner/pets[3]"]
    with pytest.raises(InputError, match="no split 'extra', wanted one of train, validation"):
        open_source("hf:owner/pets:extra")


def test_hugging_face_source_with_the_real_package(tmp_path: Path, zoo: Path) -> None:
    pytest.importorskip("datasets")
    for bad in BAD:
        next(zoo.rglob(bad)).unlink()
    source = open_source(f"hf:{zoo}", split="all")
    assert source.class_names == ("drawings", "photographs")
    (batch,) = batches(source, len(source), image_size=16, shuffle=False)
    assert len(batch.labels) == len(source)
