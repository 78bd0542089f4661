"""The files of a token cache: names, the index, and the checks that every shard is what the index says."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mage_fast.errors import InputError
from mage_fast.training.logs import progress

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
#: Shards checked at a time: reading and CRC-32 run outside Python's lock.
_THREADS = 8


def id_dtype(codebook_size: int) -> np.dtype:
    """What ids are stored as, little-endian."""
    return np.dtype("<u2" if codebook_size <= 65535 else "<i4")


def file_name(part: str, number: int) -> str:
    """The file of ``ids`` or ``labels`` of a shard."""
    return f"{part}-{number:05d}.bin"


def record_name(number: int) -> str:
    """The file that says, while the cache is unfinished, that a shard is done."""
    return f"shard-{number:05d}.json"


def record_paths(folder: Path) -> dict[int, Path]:
    """The records in a folder, by the number of their shard."""
    found = {int(path.stem.removeprefix("shard-")): path for path in folder.glob("shard-[0-9]*.json")}
    return dict(sorted(found.items()))


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """What is known of the shards that are done, by number.

    Raises:
        InputError: a record is damaged.
    """
    records = {number: _read_object(path) for number, path in record_paths(folder).items()}
    for number, record in records.items():
        _parts(record, folder / record_name(number))
    return records


def crc32(data: bytes | memoryview) -> str:
    """CRC-32 in hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache, complete or not.

    Raises:
        InputError: missing, damaged, of another version, or a value of a wrong kind.
    """
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"there is no token cache in {folder} (no {INDEX})")
    index = _read_object(path)
    if (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        got = (index.get("format"), index.get("version"))
        raise InputError(f"token cache: {path} is {got}, wanted {(FORMAT, VERSION)}")
    for key, kind in FIELDS.items():
        value: Any = index.get(key)
        if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
            raise InputError(f"token cache: {path} has {key} {value!r}, wanted a valid {kind.__name__}")
    return index


def check_shards(
    folder: Path, shards: Mapping[int, dict[str, Any]], index: dict[str, Any], *, verify: bool
) -> None:
    """Names, sizes and, with ``verify``, checksums and ids of shards by number, with a progress bar.

    Raises:
        InputError: a shard is missing, truncated, altered, in another's place, or outside the folder.
    """
    for number, shard in shards.items():
        where = folder / (INDEX if index["complete"] else record_name(number))
        _check_files(folder, number, shard, index, where)
        wanted = index["shard_size"]
        if shard["items"] > wanted or (shard["items"] < wanted and number != max(shards)):
            raise InputError(f"token cache: {where}: shard {number} has {shard['items']} items, not {wanted}")
    if not verify:
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        checks = pool.map(lambda shard: _check_content(folder, shard, index), shards.values())
        for _ in progress(checks, f"check {folder}", len(shards)):
            pass


def map_ids(folder: Path, shard: dict[str, Any], index: dict[str, Any]) -> np.ndarray:
    """The ids of a shard [items * views, L], mapped."""
    shape = (shard["items"] * index["views"], index["length"])
    ids = np.memmap(folder / shard["ids"]["file"], id_dtype(index["codebook_size"]), mode="r", shape=shape)
    return np.asarray(ids)  # the plain class indexes faster


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"token cache: {path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"token cache: {path} is a {type(values).__name__}, wanted an object")
    return values


def _parts(shard: Any, where: Path) -> list[tuple[str, str, int, str]]:
    """Part, file name, bytes and CRC-32 of the two files."""
    try:
        parts = [(p, shard[p]["file"], int(shard[p]["bytes"]), shard[p]["crc32"]) for p in ("ids", "labels")]
        if int(shard["items"]) < 1:
            raise ValueError(shard["items"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"token cache: {where} has a damaged shard entry {shard!r}") from error
    return parts


def _check_files(folder: Path, number: int, shard: Any, index: dict[str, Any], where: Path) -> None:
    for part, name, size, _ in _parts(shard, where):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+\.bin", name):
            raise InputError(f"token cache: shard name {name!r} in {where} is not a plain file name")
        if name != file_name(part, number):
            raise InputError(
                f"token cache: {where}: shard {number} is in {name}, wanted {file_name(part, number)}"
            )
        row = index["views"] * index["length"] * id_dtype(index["codebook_size"]).itemsize
        wanted = shard["items"] * (row if part == "ids" else LABEL_DTYPE.itemsize)
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise InputError(
                f"token cache: shard {path} is missing or a link, wanted a file of {wanted} bytes"
            )
        if not path.stat().st_size == size == wanted:
            raise InputError(
                f"token cache: shard {path} has {path.stat().st_size} bytes, wanted {wanted} "
                f"({shard['items']} items)"
            )


def _check_content(folder: Path, shard: dict[str, Any], index: dict[str, Any]) -> None:
    for part in ("ids", "labels"):
        path, wanted = folder / shard[part]["file"], shard[part]["crc32"]
        data = path.read_bytes()
        if crc32(data) != wanted:
            raise InputError(f"token cache: shard {path} has CRC-32 {crc32(data)}, wanted {wanted}")
        if part == "ids":
            unsigned = f"<u{id_dtype(index['codebook_size']).itemsize}"
            highest = np.frombuffer(data, unsigned).max()
            if highest >= index["codebook_size"]:
                raise InputError(
                    f"token cache: shard {path} holds id {highest}, wanted below {index['codebook_size']}"
                )
