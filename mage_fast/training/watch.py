"""What a model in training has learned so far: sample pictures of equal noise, and probes of its features.

Neither is part of the training: random generators, modes, gradients and weights stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor, nn

from mage_fast.decoding import Decoding, SamplerConfig, eval_mode
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.probe import knn_accuracy, linear_probe
from mage_fast.sampler import generate
from mage_fast.training.data import batches
from mage_fast.training.metrics import enlarged, image_grid, save_png
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.sources import Source, TokenSource

#: Of the k-NN classifier, see :func:`mage_fast.probe.knn_accuracy`.
NEIGHBOURS = 20
#: Pixels between the pictures of a grid.
GAP = 2


class OnlineProbe:
    """Accuracy of a probe on the frozen features of a part of labelled data, to be asked again and again.

    All items are read and tokenized here, once, so damaged data is found before the training begins and later
    only the encoder runs. The items are the same in every run: all, or as many as are wanted, drawn by
    a fixed generator. Neighbours judge a masked model more harshly than a linear layer does, and early in
    training their accuracy may fall below the untrained model's (so it did on digits).

    Args:
        model: whose tokenizer is used; not kept.
        kind: ``"knn"`` (weighted, k = 20, temperature 0.07) or ``"linear"`` (a solved logistic regression;
            slow with many classes).
        train: labelled images or token cache to fit on, without augmentation (of a cache, its first view).
        test: held-out data of the same classes.
        train_items: at most so many of the first.
        test_items: at most so many of the second.
        batch_size: items encoded at a time.
        workers: processes that decode images here; 0 decodes in this one.

    Raises:
        InputError: data without labels or of other classes, none of it readable, a cache of another
            tokenizer or codebook, images for a model without a tokenizer, a model that sees features, numbers
            out of range.
    """

    def __init__(
        self,
        model: MAGE,
        kind: Literal["knn", "linear"],
        train: Source,
        test: Source,
        *,
        train_items: int = 5000,
        test_items: int = 1000,
        batch_size: int = 128,
        workers: int = 0,
    ) -> None:
        if kind not in ("knn", "linear"):
            raise InputError(f"probe is {kind!r}, wanted knn or linear")
        if model.config.encoder_input != "tokens":
            raise InputError(
                f'probe: the model\'s encoder_input is "{model.config.encoder_input}", wanted "tokens": the '
                "data is kept as ids, which this model's encoder does not see"
            )
        if min(train_items, test_items, batch_size) < 1:
            raise InputError(
                f"probe: train_items {train_items}, test_items {test_items}, batch_size {batch_size}: "
                "wanted 1 or more"
            )
        check_same_classes("probe", train, test)
        for source in (train, test):
            check_labelled("probe", model, source)
        self.kind, self.batch_size = kind, batch_size
        with undisturbed(model):
            self._train = _read(model, train, train_items, batch_size, workers)
            self._test = _read(model, test, test_items, batch_size, workers)
        if len(self._train[1].unique()) < 2:
            raise InputError(
                f"probe: the {len(self._train[1])} items taken of {train.spec} are of one class, wanted more"
            )

    def __call__(self, model: MAGE) -> dict[str, float]:
        """``knn_top1`` or ``linear_top1``, in [0, 1], of the features that the model gives now."""
        with undisturbed(model):
            train_ND, test_MD = (self._features(model, ids) for ids, _ in (self._train, self._test))
        labels_N, labels_M = self._train[1], self._test[1]
        if self.kind == "knn":
            k = min(NEIGHBOURS, len(labels_N))
            return {"knn_top1": knn_accuracy(train_ND, labels_N, test_MD, labels_M, k=k)}
        return {"linear_top1": linear_probe(train_ND, labels_N, test_MD, labels_M).test_top1}

    def _features(self, model: MAGE, ids_NL: Tensor) -> Tensor:
        device = model.head.bias.device
        return torch.cat([model.features(x.to(device)).float() for x in ids_NL.split(self.batch_size)])


class Watch:
    """Looks at a model every so many steps: a picture of samples and, if wanted, a probe.

    >>> watch = Watch(model, "out/pretrain", every_steps=1000, probe=OnlineProbe(model, "knn", train, test))
    >>> if step % watch.every_steps == 0:
    ...     metrics |= watch(step, model_with_whole_or_averaged_weights)

    Pictures are ``samples/step-000001000.png``, of the same noise each time, so that they show progress. In
    a resumed training those after the resumed step are written again. Autocast is the caller's.

    Args:
        model: to check the other arguments with; not kept.
        out: the run's folder.
        every_steps: steps between two looks.
        columns: samples a row; 0 makes no pictures.
        labels: one row of samples for each of these classes, in this order; without, as many rows as columns.
        sampler: how to decode; the published defaults otherwise.
        seed: of the noise.
        probe: asked at each look.

    Raises:
        InputError: numbers out of range, pictures of a model without a tokenizer, labels or a sampler that do
            not fit it.
    """

    def __init__(
        self,
        model: MAGE,
        out: Path | str,
        every_steps: int,
        *,
        columns: int = 4,
        labels: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        probe: OnlineProbe | None = None,
    ) -> None:
        if every_steps < 1 or columns < 0:
            raise InputError(
                f"watch: every_steps is {every_steps}, columns {columns}, wanted 1 or more and 0 or more"
            )
        if columns:
            if model.tokenizer is None:
                raise InputError(
                    "watch: the model has no tokenizer, so there are no pictures; columns=0 wants none"
                )
            if labels is not None and not labels:
                raise InputError("watch: there are no labels, wanted one or more, or None")
            try:
                Decoding(model, sampler)
                if labels is not None:
                    model.class_ids(torch.tensor(labels), len(labels))
            except ValueError as error:
                raise InputError(f"watch: {error}") from error
        self.folder = Path(out) / "samples"
        self.every_steps, self.columns, self.sampler = every_steps, columns, sampler
        self.labels = None if labels is None else tuple(labels)
        self.seed, self.probe = seed, probe

    @property
    def rows(self) -> int:
        """Rows of a picture."""
        return self.columns if self.labels is None else len(self.labels)

    def picture(self, step: int) -> Path:
        """Where the picture after ``step`` steps is."""
        return self.folder / f"step-{step:09d}.png"

    def __call__(self, step: int, model: MAGE) -> dict[str, float]:
        """Look at ``model``, a whole one, after ``step`` steps; the probe's metrics."""
        if self.columns:
            self.folder.mkdir(parents=True, exist_ok=True)
            labels_B = None
            if self.labels is not None:
                labels_B = torch.tensor(self.labels).repeat_interleave(self.columns)
            count = self.rows * self.columns
            with undisturbed(model):
                images = generate(model, count, labels_B=labels_B, config=self.sampler, seed=self.seed)
            save_png(image_grid(enlarged(images), self.columns, gap=GAP), self.picture(step))
        return {} if self.probe is None else self.probe(model)

    def write_progress(self, step: int, most_rows: int = 12) -> Path | None:
        """``samples/progress.png``: one row a look up to ``step``; None if there is no picture yet.

        A row is the first row of that look's picture or, with labels, one sample of each class. Of many looks
        ``most_rows`` are shown, evenly spaced, the first and the last among them.
        """
        found = [path for path in sorted(self.folder.glob("step-*.png")) if path <= self.picture(step)]
        if not found or not self.columns:
            return None
        chosen = np.linspace(0, len(found) - 1, min(most_rows, len(found))).round().astype(int)
        rows = [tiles for index in chosen if (tiles := self._tiles(found[index])) is not None]
        rows = [tiles for tiles in rows if tiles.shape == rows[-1].shape]
        if not rows:
            return None
        path = self.folder / "progress.png"
        grid = image_grid(torch.cat(rows), len(rows[-1]), gap=GAP, background=255)
        save_png(grid, path)
        return path

    def _tiles(self, path: Path) -> UInt8[Tensor, "N 3 h w"] | None:
        """The first row, or first column, of a picture; None if it is of another layout."""
        with Image.open(path) as image:
            grid_HWC = np.asarray(image.convert("RGB"))
        pitch, rest = divmod(grid_HWC.shape[0] + GAP, self.rows)
        if rest or grid_HWC.shape[1] + GAP != pitch * self.columns:
            return None
        first = range(self.columns) if self.labels is None else range(self.rows)
        corners = [(0, i * pitch) if self.labels is None else (i * pitch, 0) for i in first]
        tiles = [grid_HWC[y : y + pitch - GAP, x : x + pitch - GAP] for y, x in corners]
        return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode and no gradients. Afterwards modes and torch's random generators are as before."""
    devices = {x.device for x in model.parameters() if x.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), eval_mode(model), torch.no_grad():
        yield


class _Part(Source):
    """Some items of a source."""

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        super().__init__(source.spec, source.labels[chosen], source.class_names)
        self.kind, self.resize_ratio, self.image_size = source.kind, source.resize_ratio, source.image_size
        self.bad_files = source.bad_files
        self._source, self._chosen = source, chosen

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))

    def image(self, index: int) -> Image.Image:
        return self._source.image(int(self._chosen[index]))

    def tokens(self, indices: np.ndarray, view: int) -> np.ndarray:
        return self._source.tokens(self._chosen[indices], view)


def check_same_classes(what: str, train: Source, test: Source) -> None:
    """Refuse held-out data whose classes have other names.

    Raises:
        InputError: so.
    """
    # shards name their classes up to the largest label they hold: held-out ones may lack the last
    pairs = zip(train.class_names, test.class_names, strict=False)
    if any(one != other for one, other in pairs):
        raise InputError(
            f"{what}: {train.spec} has the classes {_some(train.class_names)}, {test.spec} "
            f"{_some(test.class_names)}, wanted the same"
        )


def check_labelled(what: str, model: MAGE, source: Source) -> None:
    """Refuse data without labels, or that the model cannot read.

    Raises:
        InputError: one class, images for a model without a tokenizer, a cache of another tokenizer.
    """
    if source.num_classes < 2:
        raise InputError(
            f"{what}: {source.spec} has {source.num_classes} class, wanted labelled data of more"
        )
    if source.kind == "images" and model.tokenizer is None:
        raise InputError(
            f"{what}: {source.spec} holds images, but the model has no tokenizer; wanted tokens:PATH"
        )
    if isinstance(source, TokenSource):
        cache, config = source.cache, model.config
        if config.encoder_input != "tokens":
            raise InputError(
                f"{what}: {source.spec} holds tokens, but the model's encoder_input is "
                f'"{config.encoder_input}"; wanted images'
            )
        if (cache.length, cache.codebook_size) != (config.num_tokens, config.codebook_size):
            raise InputError(
                f"{what}: {source.spec} has {cache.length} tokens of {cache.codebook_size} codes an image, "
                f"the model {config.num_tokens} of {config.codebook_size}"
            )
        if isinstance(model.tokenizer, nn.Module) and cache.tokenizer_fingerprint:
            fingerprint = module_fingerprint(model.tokenizer)
            if cache.tokenizer_fingerprint != fingerprint:
                raise InputError(
                    f"{what}: {source.spec} was made by another tokenizer than the model's "
                    f"({cache.tokenizer_fingerprint[:12]} and not {fingerprint[:12]})"
                )


def _read(
    model: MAGE, source: Source, most: int, batch_size: int, workers: int
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N"]]:
    """Ids and labels of at most so many items."""
    chosen = np.arange(len(source))
    if most < len(source):
        chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:most])
    options: dict[str, Any] = {"shuffle": False, "drop_last": False, "augment": "eval", "workers": workers}
    device, ids, labels = model.head.bias.device, [], []
    for batch in batches(_Part(source, chosen), batch_size, **options):
        ids.append(model.tokenize(batch.inputs.to(device)).to("cpu", torch.int32))
        labels.append(batch.labels)
    return torch.cat(ids), torch.cat(labels)


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
