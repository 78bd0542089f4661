"""Atomic file writing: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mage_fast.errors import InputError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends without an error.

    The content reaches the disk before the name changes (fsync of file, then of folder). When the block
    raises, the temporary file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as of a write to a full disk: say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require_folder(path: Path, what: str) -> None:
    """Check, before any work, that a folder for ``what`` is there or can be made.

    Raises:
        InputError: it or a folder above it is a file.
    """
    nearest = next(x for x in (path, *path.parents) if x.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file, wanted a folder for {what}")


def write_json(path: Path | str, values: Any) -> None:
    """Plain values as an indented JSON file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def fsync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
