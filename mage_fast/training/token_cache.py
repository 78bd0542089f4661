"""The token cache: images tokenized once, kept as memory-mapped shards of small integers.

A folder with ``index.json`` and, for each shard, ``ids-00000.bin`` (little-endian uint16, or uint32 for a
codebook over 65535; items x views x length) and ``labels-00000.bin`` (int64). Size and CRC-32 of every file
stand in the index; until the cache is complete, each shard's in a file of its own, ``shard-00000.json``, so
that processes share the work without sharing a file. The K views of an image are K augmented crops of it:
training shows view epoch mod K.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Integer
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import atomic_path, write_json
from mage_fast.training.token_shards import (
    FORMAT,
    INDEX,
    LABEL_DTYPE,
    VERSION,
    check_shards,
    crc32,
    file_name,
    id_dtype,
    map_ids,
    read_index,
    read_records,
    record_name,
    record_paths,
)


class TokenCacheWriter:
    """Write a cache: by shards, in any order and from any process, or item by item with ``append``.

    A shard is done when its record is there, which is written last; opened again after an interruption, the
    writer keeps the shards that are done, and ``missing`` names the others. ``close()`` (or leaving the
    ``with`` block without an error) marks the cache as complete; until then it cannot be read. Of several
    processes one opens and closes the writer, and the others get a copy of it (it can be pickled).

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
        if codebook_size > 2**31:
            raise InputError(f"token cache: codebook_size is {codebook_size}, wanted at most {2**31}")
        self._ids: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._buffered = 0
        self.complete = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists():
            self._resume()
        else:
            self._write_index([], complete=False)
        #: Shard that ``append`` fills, and the items before it.
        self._number, self._before = 0, 0
        done = self._done()
        while self._number in done:
            self._before += done[self._number]["items"]
            self._number += 1

    def _resume(self) -> None:
        index = read_index(self.folder)
        for key, wanted in self.settings.items():
            if index[key] != wanted:
                raise InputError(
                    f"token cache {self.folder} was begun with {key} {index[key]!r}, wanted {wanted!r}: "
                    "give the same settings or another folder"
                )
        self.complete = index["complete"]
        check_shards(self.folder, self._done(), index, verify=True)
        if self.complete:
            self._remove_records()  # of a process that died before it came to that

    def _done(self) -> dict[int, dict[str, Any]]:
        """The shards that are done, by number."""
        if self.complete:
            return dict(enumerate(read_index(self.folder)["shards"]))
        return read_records(self.folder)

    def _remove_records(self) -> None:
        for path in record_paths(self.folder).values():
            path.unlink()

    def missing(self, items: int) -> list[int]:
        """Shards of a cache of so many items that are yet to be written; shard n starts at item
        ``n * shard_size``.

        Raises:
            InputError: shards that are there were made of another number of items.
        """
        size = self.settings["shard_size"]
        wanted = {first // size: min(size, items - first) for first in range(0, items, size)}
        done = {number: shard["items"] for number, shard in self._done().items()}
        missing = sorted(wanted.keys() - done.keys())
        if (self.complete and missing) or any(wanted.get(number) != done[number] for number in done):
            raise InputError(
                f"token cache {self.folder} has shards of {sum(done.values())} items that are not those of "
                f"{items} items: the data has changed, give another folder"
            )
        return missing

    def is_done(self, number: int) -> bool:
        """Whether a shard is written."""
        return self.complete or (self.folder / record_name(number)).exists()

    @property
    def next_item(self) -> int:
        """Index of the item that ``append`` takes next."""
        return self._before + self._buffered

    def append(
        self, ids_BKL: Integer[Tensor, "B K L"] | Integer[Tensor, "B L"], labels_B: Integer[Tensor, " B"]
    ) -> None:
        """Add items in order; ``[B, L]`` will do for one view.

        Raises:
            InputError: another length or number of views, an id outside the codebook, a complete cache.
        """
        if self.complete:
            raise InputError(f"token cache {self.folder} is complete already, wanted a new or unfinished one")
        ids, labels = self._checked(ids_BKL, labels_B, self.next_item)
        self._ids.append(ids)
        self._labels.append(labels)
        self._buffered += len(ids)
        while self._buffered >= self.settings["shard_size"]:
            self._flush(self.settings["shard_size"])

    def write_shard(
        self,
        number: int,
        ids_BKL: Integer[Tensor, "B K L"] | Integer[Tensor, "B L"],
        labels_B: Integer[Tensor, " B"],
    ) -> None:
        """Write the items of shard ``number``, whole; the last shard may have fewer than ``shard_size``.

        Raises:
            InputError: as ``append``, or no item or too many.
        """
        size = self.settings["shard_size"]
        if not 1 <= len(labels_B) <= size:
            raise InputError(f"token cache: shard {number} got {len(labels_B)} items, wanted 1 to {size}")
        ids, labels = self._checked(ids_BKL, labels_B, number * size)
        self._write(number, ids, labels)

    def _checked(self, ids_BKL: Tensor, labels_B: Tensor, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Both as they are stored."""
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
                f"token cache: item {first + int(np.argwhere(outside)[0, 0])} has id "
                f"{ids[outside][0]}, wanted 0 <= id < codebook_size {self.settings['codebook_size']}"
            )
        return ids.astype(id_dtype(self.settings["codebook_size"])), labels

    def _write(self, number: int, ids: np.ndarray, labels: np.ndarray) -> None:
        record: dict[str, Any] = {"items": len(ids)}
        for part, array in (("ids", ids), ("labels", labels)):
            name, data = file_name(part, number), array.tobytes()
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(data)
            record[part] = {"file": name, "bytes": len(data), "crc32": crc32(data)}
        write_json(self.folder / record_name(number), record)

    def _flush(self, items: int) -> None:
        ids, labels = np.concatenate(self._ids), np.concatenate(self._labels)
        self._write(self._number, ids[:items], labels[:items])
        self._ids, self._labels, self._buffered = [ids[items:]], [labels[items:]], self._buffered - items
        self._number, self._before = self._number + 1, self._before + items

    def _write_index(self, shards: list[dict[str, Any]], *, complete: bool) -> None:
        index = {"format": FORMAT, "version": VERSION, "complete": complete, **self.settings}
        with atomic_path(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index | {"shards": shards}, indent=1) + "\n")

    def close(self) -> None:
        """Write what is left and mark the cache as complete.

        Raises:
            InputError: a shard is missing.
        """
        if self.complete:
            return
        if self._buffered:
            self._flush(self._buffered)
        records = read_records(self.folder)
        for number in range(len(records)):
            if number not in records:
                raise InputError(f"token cache {self.folder}: shard {number} is missing, wanted all of them")
        self._write_index([records[number] for number in range(len(records))], complete=True)
        self.complete = True
        self._remove_records()

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
        index = read_index(self.folder)
        if not index["complete"]:
            done = sum(record["items"] for record in read_records(self.folder).values())
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
        check_shards(self.folder, dict(enumerate(index["shards"])), index, verify=verify)
        #: CRC-32 of the ids of each shard.
        self.checksums: list[str] = [shard["ids"]["crc32"] for shard in index["shards"]]
        self._maps = [map_ids(self.folder, shard, index) for shard in index["shards"]]
        labels = [np.fromfile(self.folder / s["labels"]["file"], LABEL_DTYPE) for s in index["shards"]]
        self.labels: np.ndarray = np.concatenate([np.empty(0, LABEL_DTYPE), *labels])
        self._first = np.cumsum([0, *(shard["items"] for shard in index["shards"])])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Sequence[int], view: int = 0) -> np.ndarray:
        """Ids [B, L] of one view of some items, uint16, or int32 for a codebook over 65535.

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
        ids = np.empty((len(items), self.length), dtype=id_dtype(self.codebook_size))
        shard_of_item = np.searchsorted(self._first, items, side="right") - 1
        rows = (items - self._first[shard_of_item]) * self.views + view
        by_shard = np.argsort(shard_of_item, kind="stable")
        for mine in np.split(by_shard, np.flatnonzero(np.diff(shard_of_item[by_shard])) + 1):
            if mine.size:
                ids[mine] = self._maps[shard_of_item[mine[0]]].take(rows[mine], axis=0)
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder,)  # data-loading processes map the shards themselves


def _reopen(folder: Path) -> TokenCache:
    return TokenCache(folder, verify=False)
