"""What a data source is, and three of them: handwritten digits, image folders, token caches.

A source knows its labels at once and reads an image or a row of tokens when asked for it by index.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mage_fast.errors import InputError
from mage_fast.training.augment import EVALUATION_RESIZE, require_size
from mage_fast.training.images import EXTENSIONS, UnreadableImage, header_size, read_file, read_rgb
from mage_fast.training.token_cache import TokenCache

Split = Literal["train", "test", "all"]
#: Part of every class that is held out where a source has no split of its own.
TEST_FRACTION = 0.2
#: Skipped files that get a line of their own in the log.
LOGGED_FILES = 20

log = logging.getLogger(__name__)


class Source:
    """Labelled images (``image``) or token sequences (``tokens``), read by index.

    ``bad_files`` maps the name of every file that was skipped to the reason.
    """

    kind: Literal["images", "tokens"] = "images"
    #: Whether its images are files, see ``encoded``.
    has_files = False
    #: False where the mirror image of an example means something else.
    can_flip = True
    #: Short side before the evaluation's centre crop, over the crop.
    resize_ratio = EVALUATION_RESIZE
    #: Pixels along a side of the inputs to be made.
    image_size = 256
    #: Images with a shorter side are skipped as damaged files are.
    min_side = 1

    def __init__(self, spec: str, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> None:
        self.spec = spec
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)
        self.bad_files: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes that the labels tell apart; 1 for unlabelled data."""
        return len(self.class_names)

    def name(self, index: int) -> str:
        """What messages call item ``index``."""
        return f"{self.spec}[{index}]"

    def version(self, index: int) -> str:
        """What changes when the file of item ``index`` is written anew; nothing where that is not known."""
        return ""

    def encoded(self, index: int) -> bytes:
        """The content of the image file of item ``index``.

        Raises:
            UnreadableImage: it cannot be read.
        """
        raise NotImplementedError(f"{self.spec} holds no image files")

    def image(self, index: int) -> Image.Image:
        """Item ``index`` in RGB.

        Raises:
            UnreadableImage: its file is damaged, or the image smaller than ``min_side``.
        """
        image = read_rgb(BytesIO(self.encoded(index)))
        if min(image.size) < self.min_side:
            raise UnreadableImage(f"{image.width} x {image.height} pixels, min_side is {self.min_side}")
        return image

    def tokens(self, indices: np.ndarray, view: int) -> np.ndarray:
        """Ids [B, L], uint16 or int32, of view ``view mod K``."""
        raise NotImplementedError(f"{self.spec} holds {self.kind}")

    def require_size(self, crop: int) -> None:
        """Check before training that every image is at least as large as a crop that does not resize.

        Raises:
            InputError: an image is smaller; the message names it.
        """

    def require_views(self, views: int) -> None:
        """Check before training that an item has so many different views.

        Raises:
            InputError: a token cache has fewer.
        """

    @property
    def bad_count(self) -> int:
        """Files skipped so far, as far as this process has seen them."""
        return len(self.bad_files)

    def report_bad(self, name: str, reason: str) -> None:
        """Note a skipped file. The first ones are logged, one line each; ``bad_files`` names all."""
        if name not in self.bad_files:
            self.bad_files[name] = reason
            if len(self.bad_files) <= LOGGED_FILES:
                log.warning("skipped %s: %s", name, reason)
            elif len(self.bad_files) == LOGGED_FILES + 1:
                log.warning("skipped more files of %s, which are counted and not named here", self.spec)


def source_fingerprint(source: Source) -> str:
    """SHA-256 over the labels, names and versions of a source's items, and the size that images are made."""
    digest = hashlib.sha256(f"{source.image_size} {source.class_names}\n".encode(errors="surrogateescape"))
    digest.update(source.labels.tobytes())
    for index in range(len(source)):
        item = f"{source.name(index)}\0{source.version(index)}\0"
        digest.update(item.encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_version(path: Path) -> str:
    """Size and time of a file, as long as there is one."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def summary_of_bad_files(names: Collection[str], first: int = 5) -> str:
    """Count and first names of skipped files, as of the ``bad_files`` of all processes together."""
    return f"{len(names)} files in all: {', '.join([*names][:first])}{', ...' if len(names) > first else ''}"


def split_indices(
    labels: np.ndarray, names: Iterable[str], split: Split, test_fraction: float = TEST_FRACTION
) -> np.ndarray:
    """Indices of a fixed, stratified split, ascending.

    In every class the items whose hashed name comes first are the test items, ``test_fraction`` of them
    rounded to the nearest: it depends on no random generator, and adding files moves few of the others.
    """
    if split == "all":
        return np.arange(len(labels))
    digests = (hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names)
    hashed = np.fromiter((int.from_bytes(digest[:8]) for digest in digests), np.uint64, len(labels))
    order = np.lexsort((hashed, labels))
    is_test = np.zeros(len(labels), dtype=bool)
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        is_test[members[: round(len(members) * test_fraction)]] = True
    return np.flatnonzero(is_test if split == "test" else ~is_test)


def split_folders(root: Path, split: Split) -> list[Path]:
    """The folders of a split where ``root`` holds ``train`` with ``val`` or ``test``; else none."""
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    train = root / "train"
    if held_out is None or not train.is_dir():
        return []
    return {"train": [train], "test": [held_out], "all": [train, held_out]}[split]


class DigitsSource(Source):
    """scikit-learn's 1797 handwritten digits: 8 x 8 pixels in 17 levels, scaled (bicubic) to ``image_size``.

    Three equal channels; a fixed stratified 80 / 20 split. Never flipped: a mirrored digit is another sign.
    """

    can_flip = False
    resize_ratio = 1.0

    def __init__(self, *, image_size: int, split: Split = "train") -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        chosen = split_indices(data.target, [str(index) for index in range(len(data.target))], split)
        super().__init__("digits", data.target[chosen], [str(digit) for digit in range(10)])
        self._pixels = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
        self.image_size = image_size

    def image(self, index: int) -> Image.Image:
        small = Image.fromarray(self._pixels[index])
        return small.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC).convert("RGB")


class FolderSource(Source):
    """PNG, JPEG, WebP and BMP files of a folder: one sub-folder a class, or one unlabelled class.

    * ``PATH/<class>/**/*.png``: a class a sub-folder, in alphabetical order. Images that lie beside the
      sub-folders form a class of their own, ``.``, after the others.
    * ``PATH/*.png`` alone: one unlabelled class, 0.
    * ``PATH/train/<class>`` with ``PATH/val`` or ``PATH/test``: these are the splits, whose classes are those
      of both. Otherwise ``train`` and ``test`` are a fixed stratified 80 / 20 split by file name.

    Hidden files and files of other types are ignored. A link that leads out of the folder and a linked
    sub-folder are not followed, but named in ``bad_files``, as are images smaller than ``min_side``.

    Raises:
        InputError: no such folder, not a folder, or no image in it.
    """

    has_files = True

    def __init__(
        self, path: str, *, image_size: int = 256, split: Split = "train", min_side: int = 1
    ) -> None:
        self.image_size = image_size
        self.root = Path(path).expanduser()
        self.min_side = min_side
        spec = f"folder:{path}"
        if not path or not self.root.exists():
            raise InputError(f"data {spec!r}: there is no such folder")
        if not self.root.is_dir():
            raise InputError(f"data {spec!r} is a file, wanted a folder of images")
        super().__init__(spec, [], [])
        self._resolved = self.root.resolve()
        self._ignored: list[str] = []
        parts = split_folders(self.root, split)
        found = [item for part in parts or [self.root] for item in self._scan(part)]
        split = "all" if parts else split
        # a class that one of the parts lacks has its number in both
        folders = [path for part in split_folders(self.root, "all") for path in part.iterdir()]
        classes = {x.name for x in folders if x.is_dir() and x.name[0] != "." and not x.is_symlink()}
        if not found:
            others = [*self._ignored, *self.bad_files]
            example = f"; it holds {len(others)} other files, as {others[0]}" if others else ""
            raise InputError(f"data {spec!r} holds no PNG, JPEG, WebP or BMP image{example}")
        classes |= {name for name, _ in found}
        self.class_names = tuple(sorted(classes, key=lambda name: (name == ".", name)))
        number = {class_name: label for label, class_name in enumerate(self.class_names)}
        labels = np.array([number[class_name] for class_name, _ in found], dtype=np.int64)
        files = [file for _, file in found]
        chosen = split_indices(labels, files, split)
        self.labels, self._files = labels[chosen], [files[index] for index in chosen]
        if not self._files:
            raise InputError(f"data {spec!r}: the {split} split of {len(files)} images is empty")
        log.info("%s: %d images, %d classes, split %s", spec, len(self), self.num_classes, split)

    def _scan(self, start: Path) -> list[tuple[str, str]]:
        """(class name, path from the root) of every image under a part of the root, in a fixed order."""
        found = []
        for folder, subfolders, files in os.walk(start):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inside = Path(folder).relative_to(start)
            class_name = inside.parts[0] if inside.parts else "."
            for name in subfolders:
                if os.path.islink(os.path.join(folder, name)):
                    self.report_bad(os.path.join(folder, name), "a linked folder is not followed")
            for name in sorted(files):
                relative = self._relative(folder, name)
                if name.startswith("."):
                    continue
                if os.path.splitext(name)[1].lower() not in EXTENSIONS:
                    self._ignored.append(relative)
                elif self._escapes(relative):
                    self.report_bad(
                        os.path.join(folder, name), "a link that leads out of the folder is not followed"
                    )
                else:
                    found.append((class_name, relative))
        return found

    def _relative(self, folder: str, name: str) -> str:
        return os.path.relpath(os.path.join(folder, name), self.root)

    def _escapes(self, relative: str) -> bool:
        path = self.root / relative
        return path.is_symlink() and not path.resolve().is_relative_to(self._resolved)

    def name(self, index: int) -> str:
        return str(self.root / self._files[index])

    def version(self, index: int) -> str:
        return file_version(self.root / self._files[index])

    def encoded(self, index: int) -> bytes:
        if self._escapes(self._files[index]):
            raise UnreadableImage("a link that leads out of the folder is not followed")
        return read_file(self.root / self._files[index])

    def require_size(self, crop: int) -> None:
        for index in range(len(self)):
            try:
                size = header_size(self.name(index))
            except UnreadableImage:
                continue  # skipped and named when it is its turn
            require_size(size, crop, self.name(index))


class TokenSource(Source):
    """A token cache (:mod:`mage_fast.training.token_cache`), its K views in turn.

    A cache made from one split is that split; one made from everything is split as a folder is.

    Raises:
        InputError: a missing, unfinished or damaged cache; the other split of a cache made from one.
    """

    kind = "tokens"

    def __init__(self, path: str, *, split: Split = "train", verify: bool = True) -> None:
        if not path:
            raise InputError("data 'tokens:' names no folder, wanted tokens:PATH")
        self.cache = TokenCache(Path(path).expanduser(), verify=verify)
        spec = f"tokens:{path}"
        if self.cache.split == "all":
            items = [str(index) for index in range(len(self.cache))]
            self._chosen = split_indices(self.cache.labels, items, split)
        elif split in (self.cache.split, "all"):
            self._chosen = np.arange(len(self.cache))
        else:
            raise InputError(f"data {spec!r} was made from the {self.cache.split} split, wanted {split}")
        if not len(self._chosen):
            raise InputError(f"data {spec!r}: the {split} split of {len(self.cache)} items is empty")
        super().__init__(spec, self.cache.labels[self._chosen], self.cache.class_names)

    def version(self, index: int) -> str:
        return ",".join(self.cache.checksums) if index == 0 else ""  # of all items alike

    def tokens(self, indices: np.ndarray, view: int) -> np.ndarray:
        return self.cache.batch(self._chosen[indices], view=view % self.cache.views)

    def require_views(self, views: int) -> None:
        if views > self.cache.views:
            raise InputError(
                f"{self.spec} has {self.cache.views} views an image, wanted at least the {views} of a batch"
            )
