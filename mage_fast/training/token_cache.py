"""The token cache: images tokenized once, kept as memory-mapped shards of small integers.

A folder with ``index.json`` and, for each shard, ``ids-00000.bin`` (little-endian uint16, or uint32 for a
codebook over 65535; items x views x length) and ``labels-00000.bin`` (int64). Size and CRC-32 of every file
stand in the index. The K views of an image are K augmented crops of it: training shows view epoch mod K.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Integer
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import atomic_path

FORMAT = "mage_fast.token_cache"
VERSION = 1
INDEX = "index.json"
LABEL_DTYPE = np.dtype("<i8")
#: Keys of the index beside format and version.
FIELDS: dict[str, type] = {
    **dict.fromkeys(("length", "codebook_size", "views", "shard_size"), int),
    **dict.fromkeys(("tokenizer_fingerprint", "augmentation", "split"), str),
    **{"class_names": list, "shards": list, "complete": bool},
}


class TokenCacheWriter:
    """Append items to a cache; opened again after an interruption it goes on at ``next_item``.

    Shards appear whole: what was appended since the last full shard is lost when the process dies, and
    ``next_item`` says so. ``close()`` (or leaving the ``with`` block without an error) writes the last shard
    and marks the cache as complete; until then it cannot be read.

    Args:
        folder: made if missing.
        length: tokens a view.
        codebook_size: ids lie in [0, codebook_size).
        views: augmented views an item.
        shard_size: items a shard.
        tokenizer_fingerprint: which tokenizer made the ids, see ``run_state.module_fingerprint``.
        augmentation: what the views are, in words.
        class_names: names of the labels; empty for unlabelled data.
        split: which split of the data source the items are ("all": readers split it).

    Raises:
        InputError: the folder holds a cache with other settings, or damaged shards.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        length: int,
        codebook_size: int,
        views: int = 1,
        shard_size: int = 8192,
        tokenizer_fingerprint: str = "",
        augmentation: str = "",
        class_names: Sequence[str] = (),
        split: str = "all",
    ) -> None:
        if split not in ("train", "test", "all"):
            raise InputError(f"token cache: split is {split!r}, wanted train, test or all")
        self.folder = Path(folder)
        self.settings: dict[str, Any] = {
            **{"length": length, "codebook_size": codebook_size, "views": views, "shard_size": shard_size},
            **{"tokenizer_fingerprint": tokenizer_fingerprint, "augmentation": augmentation},
            **{"class_names": list(class_names), "split": split},
        }
        for name in ("length", "codebook_size", "views", "shard_size"):
            if self.settings[name] < 1:
                raise InputError(f"token cache: {name} is {self.settings[name]}, wanted 1 or more")
        self._shards: list[dict[str, Any]] = []
        self._ids: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._buffered = 0
        self.complete = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists():
            self._resume()
        else:
            self._write_index(complete=False)

    def _resume(self) -> None:
        index = _read_index(self.folder)
        for key, wanted in self.settings.items():
            if index[key] != wanted:
                raise InputError(
                    f"token cache {self.folder} was begun with {key} {index[key]!r}, wanted {wanted!r}: "
                    "give the same settings or another folder"
                )
        for shard in index["shards"]:
            _check_shard(self.folder, shard, index, verify=True)
        self._shards, self.complete = index["shards"], index["complete"]

    @property
    def next_item(self) -> int:
        """Index of the item that ``append`` takes next."""
        return sum(shard["items"] for shard in self._shards) + self._buffered

    def append(
        self, ids_BKL: Integer[Tensor, "B K L"] | Integer[Tensor, "B L"], labels_B: Integer[Tensor, " B"]
    ) -> None:
        """Add items in order; ``[B, L]`` will do for one view.

        Raises:
            InputError: another length or number of views, an id outside the codebook, a complete cache.
        """
        if self.complete:
            raise InputError(f"token cache {self.folder} is complete already, wanted a new or unfinished one")
        views, length = self.settings["views"], self.settings["length"]
        ids = ids_BKL.detach().cpu().numpy()
        labels = labels_B.detach().cpu().numpy().astype(LABEL_DTYPE)
        if ids.ndim == 2 and views == 1:
            ids = ids[:, None]
        if ids.ndim != 3 or ids.shape[1:] != (views, length) or labels.shape != ids.shape[:1]:
            raise InputError(
                f"token cache: ids have shape {tuple(ids_BKL.shape)} and labels {tuple(labels_B.shape)}, "
                f"wanted (B, {views}, {length}) and (B,)"
            )
        outside = (ids < 0) | (ids >= self.settings["codebook_size"])
        if outside.any():
            raise InputError(
                f"token cache: item {self.next_item + int(np.argwhere(outside)[0, 0])} has id "
                f"{ids[outside][0]}, wanted 0 <= id < codebook_size {self.settings['codebook_size']}"
            )
        self._ids.append(ids.astype(_id_dtype(self.settings["codebook_size"])))
        self._labels.append(labels)
        self._buffered += len(ids)
        while self._buffered >= self.settings["shard_size"]:
            self._write_shard(self.settings["shard_size"])

    def _write_shard(self, items: int) -> None:
        ids, labels = np.concatenate(self._ids), np.concatenate(self._labels)
        number = len(self._shards)
        shard: dict[str, Any] = {"items": items}
        for part, array in (("ids", ids), ("labels", labels)):
            name, data = f"{part}-{number:05d}.bin", array[:items].tobytes()
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(data)
            shard[part] = {"file": name, "bytes": len(data), "crc32": _crc32(data)}
        self._shards.append(shard)
        self._ids, self._labels, self._buffered = [ids[items:]], [labels[items:]], self._buffered - items
        self._write_index(complete=False)

    def _write_index(self, *, complete: bool) -> None:
        index = {"format": FORMAT, "version": VERSION, "complete": complete, **self.settings}
        with atomic_path(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index | {"shards": self._shards}, indent=1) + "\n")

    def close(self) -> None:
        """Write what is left and mark the cache as complete."""
        if self._buffered:
            self._write_shard(self._buffered)
        if not self.complete:
            self._write_index(complete=True)
            self.complete = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


class TokenCache:
    """Read a complete cache; batches come straight from the memory-mapped shards.

    Sizes are always checked. ``verify`` also reads every shard once and checks checksums and ids.

    Raises:
        InputError: no cache there, an unfinished one, an unknown version, a shard that is missing,
            truncated, altered, or outside the folder.
    """

    def __init__(self, folder: Path | str, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if not index["complete"]:
            done = sum(shard["items"] for shard in index["shards"])
            raise InputError(
                f"token cache {self.folder} is unfinished ({done} items): tokenize again to go on"
            )
        self.length: int = index["length"]
        self.views: int = index["views"]
        self.codebook_size: int = index["codebook_size"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        self.augmentation: str = index["augmentation"]
        self.class_names: tuple[str, ...] = tuple(index["class_names"])
        self.split: str = index["split"]
        for shard in index["shards"]:
            _check_shard(self.folder, shard, index, verify=verify)
        self._maps = [_map(self.folder, shard, index) for shard in index["shards"]]
        labels = [np.fromfile(self.folder / s["labels"]["file"], LABEL_DTYPE) for s in index["shards"]]
        self.labels: np.ndarray = np.concatenate([np.empty(0, LABEL_DTYPE), *labels])
        self._first = np.cumsum([0, *(shard["items"] for shard in index["shards"])])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Sequence[int], view: int = 0) -> np.ndarray:
        """int64 ids [B, L] of one view of some items.

        Raises:
            InputError: an index or a view that does not exist.
        """
        items = np.asarray(indices, dtype=np.int64)
        if not 0 <= view < self.views:
            raise InputError(f"token cache: view is {view}, wanted 0 <= view < {self.views}")
        if items.size and (items.min() < 0 or items.max() >= len(self)):
            raise InputError(
                f"token cache: indices reach from {items.min()} to {items.max()}, wanted 0 to {len(self) - 1}"
            )
        ids = np.empty((len(items), self.length), dtype=np.int64)
        shard_of_item = np.searchsorted(self._first, items, side="right") - 1
        for shard in np.unique(shard_of_item):
            mine = shard_of_item == shard
            ids[mine] = self._maps[shard][items[mine] - self._first[shard], view]
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder,)  # data-loading processes map the shards themselves


def _reopen(folder: Path) -> TokenCache:
    return TokenCache(folder, verify=False)


def _id_dtype(codebook_size: int) -> np.dtype:
    return np.dtype("<u2" if codebook_size <= 65535 else "<u4")


def _crc32(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"there is no token cache in {folder} (no {INDEX})")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"token cache: {path} is damaged ({error})") from error
    if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        got = (index.get("format"), index.get("version")) if isinstance(index, dict) else type(index).__name__
        raise InputError(f"token cache: {path} is {got}, wanted {(FORMAT, VERSION)}")
    for key, kind in FIELDS.items():
        value: Any = index.get(key)
        if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
            raise InputError(f"token cache: {path} has {key} {value!r}, wanted a valid {kind.__name__}")
    return index


def _check_shard(folder: Path, shard: Any, index: dict[str, Any], *, verify: bool) -> None:
    """Names, sizes and, with ``verify``, checksums and ids of a shard's two files."""
    try:
        items = int(shard["items"])
        parts = [(p, shard[p]["file"], int(shard[p]["bytes"]), shard[p]["crc32"]) for p in ("ids", "labels")]
        if items < 1:
            raise ValueError(items)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"token cache: {folder / INDEX} has a damaged shard entry {shard!r}") from error
    row = index["views"] * index["length"] * _id_dtype(index["codebook_size"]).itemsize
    for part, name, size, crc32 in parts:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+\.bin", name):
            raise InputError(f"token cache: shard name {name!r} in {folder / INDEX} is not a plain file name")
        path = folder / name
        wanted = items * (row if part == "ids" else LABEL_DTYPE.itemsize)
        if path.is_symlink() or not path.is_file():
            raise InputError(
                f"token cache: shard {path} is missing or a link, wanted a file of {wanted} bytes"
            )
        if not path.stat().st_size == size == wanted:
            raise InputError(
                f"token cache: shard {path} has {path.stat().st_size} bytes, wanted {wanted} ({items} items)"
            )
        if verify:
            data = np.fromfile(path, np.uint8)
            if _crc32(data.data) != crc32:
                raise InputError(f"token cache: shard {path} has CRC-32 {_crc32(data.data)}, wanted {crc32}")
            ids = data.view(_id_dtype(index["codebook_size"])) if part == "ids" else data[:0]
            if ids.size and ids.max() >= index["codebook_size"]:
                raise InputError(
                    f"token cache: shard {path} holds id {ids.max()}, wanted below {index['codebook_size']}"
                )


def _map(folder: Path, shard: dict[str, Any], index: dict[str, Any]) -> np.ndarray:
    shape = (shard["items"], index["views"], index["length"])
    ids = np.memmap(folder / shard["ids"]["file"], _id_dtype(index["codebook_size"]), mode="r", shape=shape)
    return np.asarray(ids)  # the plain class indexes faster
