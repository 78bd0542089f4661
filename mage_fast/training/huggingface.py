"""Images of a Hugging Face ``datasets`` dataset; the package is an optional extra."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from mage_fast.errors import InputError
from mage_fast.training.images import read_file
from mage_fast.training.sources import Source, Split, split_indices

#: Names under which published datasets keep their held-out images, in order of preference.
HELD_OUT = ("test", "validation", "valid", "val")


class HuggingFaceSource(Source):
    """``hf:NAME`` or ``hf:NAME:SPLIT``: any dataset with an image column, a folder on disk included.

    Without SPLIT, ``train`` is the dataset's train split and ``test`` its test or validation split; where
    it has none, both are a fixed stratified 80 / 20 split of train. Labels are the first class-label column.

    Raises:
        InputError: ``datasets`` is not installed, no such dataset or split, no image column.
    """

    has_files = True

    def __init__(
        self, name: str, *, image_size: int = 256, split: Split = "train", min_side: int = 1
    ) -> None:
        self.image_size = image_size
        name, _, part = name.partition(":")
        spec = f"hf:{name}"
        try:
            datasets = importlib.import_module("datasets")
        except ModuleNotFoundError as error:
            raise InputError(
                f"data {spec!r} needs the package datasets: pip install mage-fast[datasets]"
            ) from error
        if not name:
            raise InputError("data 'hf:' names no dataset, wanted hf:NAME or hf:NAME:SPLIT")
        try:
            parts = datasets.load_dataset(name)
        except (OSError, ValueError) as error:
            raise InputError(f"data {spec!r} cannot be loaded: {' '.join(str(error).split())}") from error
        rows, divide = self._choose(spec, parts, part, split)
        self.min_side = min_side
        columns = rows.features
        self._column = next((c for c, kind in columns.items() if isinstance(kind, datasets.Image)), None)
        if self._column is None:
            raise InputError(f"data {spec!r} has columns {', '.join(columns)}, wanted one of images")
        label = next((c for c, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
        labels = np.asarray(rows[label], dtype=np.int64) if label else np.zeros(len(rows), dtype=np.int64)
        self._chosen = split_indices(labels, [str(index) for index in range(len(rows))], divide)
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        super().__init__(spec, labels[self._chosen], columns[label].names if label else (".",))

    @staticmethod
    def _choose(spec: str, parts: Any, part: str, split: Split) -> tuple[Any, Split]:
        """The dataset split to read, and how to divide it further."""
        if part and part not in parts:
            raise InputError(f"data {spec!r} has no split {part!r}, wanted one of {', '.join(parts)}")
        held_out = next((name for name in HELD_OUT if name in parts), None)
        train = "train" if "train" in parts else next(iter(parts))
        if part:
            if split == "test":
                raise InputError(
                    f"data {spec!r} names one split, so nothing is held out: wanted hf:NAME alone"
                )
            return parts[part], "all"
        if split == "test" and held_out:
            return parts[held_out], "all"
        return parts[train], "all" if held_out not in (None, train) else split

    def encoded(self, index: int) -> bytes:
        value = self._rows[int(self._chosen[index])][self._column]
        return value["bytes"] if value["bytes"] is not None else read_file(value["path"])
