"""Images in tar shards, the webdataset convention, with random access through an index of their members."""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from array import array
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mage_fast.errors import InputError
from mage_fast.training.augment import require_size
from mage_fast.training.images import EXTENSIONS, UnreadableImage, header_size
from mage_fast.training.sources import Source, Split, file_version, split_folders, split_indices
from mage_fast.training.tar_shards import ShardReader, expand_braces, members

#: Largest label: every class up to the largest label has a name, seen or not.
MOST_CLASSES = 2**20
#: Bytes of a ``.cls`` and of a ``.json`` member.
LABEL_BYTES = {"cls": 64, "json": 2**20}
#: Bytes from the start of an image that nearly always hold its width and height.
HEAD = 2**16
_IMAGES = frozenset(extension.removeprefix(".") for extension in EXTENSIONS)
_INTEGER = re.compile(rb"\s*(\d{1,18})\s*")

log = logging.getLogger(__name__)


class WebDatasetSource(Source):
    """``webdataset:PATH``: a folder of .tar files, one tar, or a pattern as ``train-{000000..000146}.tar``.

    A sample is the members of one shard that share their path up to the first dot of the file's own name:
    one image (.jpg .jpeg .png .webp .bmp) and optionally a label, ``.cls`` (an integer as text) or ``.json``
    with an integer ``label``; without any label there is one class. Members of other types are ignored,
    links and a label without an image are ignored and named in ``bad_files``. Only headers and labels are
    read when opened, and nothing is ever unpacked.

    ``PATH/train`` with ``PATH/val`` or ``PATH/test``, folders of shards, are the splits; otherwise ``train``
    and ``test`` are a fixed stratified 80 / 20 split by shard and member name.

    Raises:
        InputError: no such file, a damaged or truncated shard, a shard without an image, a label that is no
            integer, two images or two labels of one sample, labels for some samples only.
    """

    has_files = True

    def __init__(
        self, path: str, *, image_size: int = 256, split: Split = "train", min_side: int = 1
    ) -> None:
        super().__init__(f"webdataset:{path}", [], [])
        self.image_size, self.min_side = image_size, min_side
        shards, divide = self._shards(path, split)
        #: Of every image: shard, place and size in it, label (-1: none), end of its name in ``_names``.
        self._columns = {name: array("q") for name in ("shard", "offset", "size", "label", "end")}
        self._names = bytearray()
        self._reader = ShardReader(shards, [0] * len(shards))
        self._versions = [file_version(shard) for shard in shards]
        for number, shard in enumerate(shards):
            self._scan(number, shard)
        columns = {name: np.frombuffer(column, np.int64) for name, column in self._columns.items()}
        self._shard, self._offset, self._size = (columns[name] for name in ("shard", "offset", "size"))
        self._end, labels = columns["end"], columns["label"]
        del self._columns
        unlabelled = np.flatnonzero(labels < 0)
        if 0 < len(unlabelled) < len(labels):
            raise InputError(
                f"data {self.spec!r} has labels for some samples only: {self._name(int(labels.argmax()))} "
                f"has label {labels.max()}, {self._name(int(unlabelled[0]))} none"
            )
        labels = np.maximum(labels, 0)
        names = (f"{shards[self._shard[i]].name}/{self._member(i)}" for i in range(len(labels)))
        self._chosen = split_indices(labels, names, divide)
        if not len(self._chosen):
            raise InputError(f"data {self.spec!r}: the {split} split of {len(labels)} images is empty")
        self.labels = labels[self._chosen]
        labelled = not len(unlabelled)
        self.class_names = tuple(map(str, range(int(labels.max()) + 1))) if labelled else (".",)
        log.info(
            *("%s: %d images in %d shards, %d classes, split %s", self.spec, len(self), len(shards)),
            *(self.num_classes, split),
        )

    def _shards(self, path: str, split: Split) -> tuple[list[Path], Split]:
        """The shards to read, and how to divide what is in them further."""
        root = Path(path).expanduser()
        if path and root.is_dir():
            parts = split_folders(root, split)
            folders, split = parts or [root], "all" if parts else split
            shards = [file for folder in folders for file in sorted(folder.glob("*.tar"))]
            shards = [shard for shard in shards if not shard.name.startswith(".")]
            if not shards:
                raise InputError(f"data {self.spec!r}: {', '.join(map(str, folders))} holds no .tar file")
        else:
            shards = [root] if root.exists() else [Path(name) for name in expand_braces(str(root))]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing or not path:
            raise InputError(
                f"data {self.spec!r}: {len(missing)} of {len(shards)} files are missing, as "
                f"{missing[0] if path else 'no name'}; wanted a folder of .tar files, one of them, or a "
                "pattern as train-{000000..000146}.tar"
            )
        return shards, split

    def _scan(self, number: int, path: Path) -> None:
        """Append the samples of a shard to the columns."""
        rows: dict[str, int] = {}
        images, labels, names = array("q"), array("q"), []
        try:
            opened = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        with opened as file:
            self._reader.sizes[number] = os.fstat(file.fileno()).st_size
            for member in members(path, file):
                folder, _, own_name = member.name.rpartition("/")
                stem, _, extension = own_name.partition(".")
                extension = extension.lower()
                if member.isdir() or not stem or not (extension in _IMAGES or extension in LABEL_BYTES):
                    continue
                where = f"{path}/{member.name}"
                if not member.isreg() or member.issparse():
                    self.report_bad(where, "a link, a device or a sparse file in a tar is not followed")
                    continue
                row = rows.setdefault(f"{folder}/{stem}", len(rows))
                if row == len(labels):
                    images.extend((-1, -1))
                    labels.append(-1)
                    names.append("")
                if extension in _IMAGES:
                    if images[2 * row] >= 0:
                        raise InputError(
                            f"{path} holds two images of one sample, {names[row]} and {member.name}"
                        )
                    images[2 * row], images[2 * row + 1] = member.offset_data, member.size
                    names[row] = member.name
                elif (label := _label(file, member, where, extension)) is not None:
                    if labels[row] not in (-1, label):
                        raise InputError(f"{where} has label {label}, another member has {labels[row]}")
                    labels[row] = label
                    names[row] = names[row] or member.name
        self._append(number, path, images, labels, names)

    def _append(self, number: int, path: Path, images: array, labels: array, names: list[str]) -> None:
        before = len(self._columns["shard"])
        for row, (name, label) in enumerate(zip(names, labels, strict=True)):
            offset, size = images[2 * row : 2 * row + 2]
            if offset >= 0:
                self._names += name.encode(errors="surrogateescape")
                values = (number, offset, size, label, len(self._names))
                for column, value in zip(self._columns.values(), values, strict=True):
                    column.append(value)
            elif label >= 0:
                self.report_bad(f"{path}/{name}", "a label without an image")
        if len(self._columns["shard"]) == before:
            raise InputError(f"{path} holds no PNG, JPEG, WebP or BMP image")

    def _member(self, item: int) -> str:
        start = int(self._end[item - 1]) if item else 0
        return self._names[start : int(self._end[item])].decode(errors="surrogateescape")

    def _name(self, item: int) -> str:
        return f"{self._reader.paths[self._shard[item]]}/{self._member(item)}"

    def name(self, index: int) -> str:
        return self._name(int(self._chosen[index]))

    def version(self, index: int) -> str:
        return self._versions[self._shard[self._chosen[index]]]

    def encoded(self, index: int) -> bytes:
        item = self._chosen[index]
        return self._reader.read(int(self._shard[item]), int(self._offset[item]), int(self._size[item]))

    def require_size(self, crop: int) -> None:
        for index in range(len(self)):
            item = self._chosen[index]
            place, size = (int(self._shard[item]), int(self._offset[item])), int(self._size[item])
            for part in (min(HEAD, size), size):
                try:
                    found = header_size(BytesIO(self._reader.read(*place, part)))
                except UnreadableImage:
                    continue  # after the second time: skipped and named when it is its turn
                require_size(found, crop, self.name(index))
                break


def _label(file: BinaryIO, member: tarfile.TarInfo, where: str, kind: str) -> int | None:
    """The label in a ``.cls`` or ``.json`` member, if there is one."""
    if member.size > LABEL_BYTES[kind]:
        raise InputError(f"{where} has {member.size} bytes, wanted a label in at most {LABEL_BYTES[kind]}")
    file.seek(member.offset_data)
    content = file.read(member.size)
    label: object = None
    if kind == "cls":
        match = _INTEGER.fullmatch(content)
        label = int(match[1]) if match else content.decode(errors="replace")
    else:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict) or "label" not in values:
            return None
        label = values["label"]
    if type(label) is not int or not 0 <= label < MOST_CLASSES:
        raise InputError(f"{where} has label {label!r}, wanted an integer from 0 to {MOST_CLASSES - 1}")
    return label
