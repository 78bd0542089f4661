"""Uncompressed tar files read in place: where their members lie, and the bytes there.

Nothing is unpacked, and links, devices and sparse members are never followed.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from mage_fast.errors import InputError
from mage_fast.training.images import UnreadableImage

#: Files that a process keeps open, of 1024 that systems usually allow.
OPEN_FILES = 256
#: A range in braces may not stand for more files: a typing error, not a data set.
MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: What ``tarfile`` raises for headers that are no headers, by experience.
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, IndexError, KeyError)


def expand_braces(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` to ``a-08.tar``, ``a-09.tar``, ``a-10.tar``, as a shell does; several ranges nest.

    Raises:
        InputError: a range that ends before it begins, or more than a million names.
    """
    names, count = [""], 1
    literals_and_bounds = _RANGE.split(pattern)
    for place in range(0, len(literals_and_bounds), 3):
        names = [name + literals_and_bounds[place] for name in names]
        if place + 2 < len(literals_and_bounds):
            first, last = literals_and_bounds[place + 1 : place + 3]
            count *= int(last) - int(first) + 1
            if not 1 <= count <= MOST_SHARDS:
                raise InputError(
                    f"{pattern!r}: the range {{{first}..{last}}} makes {max(count, 0)} names, "
                    f"wanted 1 to {MOST_SHARDS}"
                )
            padded = any(bound.startswith("0") and len(bound) > 1 for bound in (first, last))
            width = max(len(first), len(last)) if padded else 0
            numbers = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
            names = [name + number for name in names for number in numbers]
    return names


def members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file in order; ``file`` may be moved between two of them.

    Raises:
        InputError: not an uncompressed tar file, truncated, or with a damaged header.
    """
    place = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= place:
                    raise InputError(f"{path} is damaged: the member at byte {place} has a negative size")
                place = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold every header there is
                yield member
            place = tar.offset
            file.seek(place)
            end = file.read(tarfile.BLOCKSIZE)
    except _TAR_ERRORS as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is not an uncompressed tar file, or damaged or truncated after byte {place}: {reason}"
        ) from error
    # tarfile takes what is no header in the middle of a file for the end of it.
    if len(end) < tarfile.BLOCKSIZE:
        raise InputError(
            f"{path} is truncated: it ends at byte {place + len(end)} without the mark of an end"
        )
    if any(end):
        raise InputError(f"{path} is damaged: there is no header of a member at byte {place}")


class ShardReader:
    """Reads bytes of files by number; each process opens them for itself, ``OPEN_FILES`` at most."""

    def __init__(self, paths: list[Path], sizes: list[int]) -> None:
        self.paths, self.sizes = paths, sizes
        self._open: OrderedDict[int, RawIOBase] = OrderedDict()
        self._process = os.getpid()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on.

        Raises:
            UnreadableImage: the file cannot be read, or is not as long as it was.
        """
        try:
            file = self._file(shard)
            file.seek(offset)
            parts = bytearray()
            while len(parts) < size and (part := file.read(size - len(parts))):
                parts += part
        except OSError as error:
            raise UnreadableImage(" ".join(str(error).split())) from error
        if len(parts) < size:
            raise UnreadableImage(f"{self.paths[shard]} has lost its end since it was opened")
        return bytes(parts)

    def _file(self, shard: int) -> RawIOBase:
        if self._process != os.getpid():  # a forked process shares the place in a file with the others
            self.close()
            self._process = os.getpid()
        if shard not in self._open:
            file = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115
            if (size := os.fstat(file.fileno()).st_size) != self.sizes[shard]:
                file.close()
                raise UnreadableImage(
                    f"{self.paths[shard]} has {size} bytes, wanted the {self.sizes[shard]} of before"
                )
            self._open[shard] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        while self._open:
            self._open.popitem()[1].close()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.paths, self.sizes)
