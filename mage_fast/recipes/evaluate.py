"""``mage-fast evaluate``: scores of generated images, or of a tokenizer's reconstructions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.evaluation import (
    Accumulator,
    FeatureStatistics,
    PNGFolder,
    Score,
    compare,
    read_statistics,
    score_reconstructions,
    write_statistics,
)
from mage_fast.evaluation.scores import PUBLISHED_IMAGES
from mage_fast.evaluation.statistics import KEPT_FEATURES
from mage_fast.files import write_json
from mage_fast.optional import optional
from mage_fast.recipes.feature_extractors import Extractor, open_extractor
from mage_fast.recipes.loading import load_tokenizer
from mage_fast.recipes.pictures import write_grid
from mage_fast.training.augment import Augmentation
from mage_fast.training.data import batches, open_source, steps_per_epoch
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device
from mage_fast.training.sources import Source, Split, source_fingerprint

#: The short side becomes the wanted one, then the middle is cut out.
CROP = Augmentation(crop="center", flip=False, resize_ratio=1.0)
#: VGG halves its images four times.
LPIPS_SIDE = 16
PACKAGES = ("torch", "torch-fidelity", "torchmetrics", "pillow")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score generated images against real ones (--images, --reference), or a tokenizer (--tokenizer)."""

    #: Folder of generated PNG files, as generate writes them.
    images: Path | None = None
    #: What they are compared with: real images (digits, folder:PATH, ...) or a FILE.npz of mu and sigma.
    reference: str | None = None
    #: A tokenizer or a model with one, whose reconstructions are scored in place of generated images.
    tokenizer: Path | None = None
    #: Real images that it reconstructs.
    data: str = "digits"
    #: Part of the real images.
    split: Split = "test"
    #: inception, inception:FILE (weights), digits, model:PATH or torchscript:FILE; none: no rFID.
    features: str = "inception"
    #: LPIPS of a tokenizer too; its weights are fetched through torchvision.
    lpips: bool = False
    #: JSON file for the result; a tokenizer's pictures get its name with .png. Printed only, without.
    out: Path | None = None
    #: Folder of the references' statistics, which are computed once.
    cache: Path = Path("out/statistics")
    batch_size: int = 64
    #: Processes that load real images.
    workers: int = 0
    device: str = "auto"


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Print a table; returns the scores (None where there is none), notes on each, and the convention.

    Raises:
        InputError: neither or both of images and tokenizer; images, references or features that cannot be
            read or do not fit each other; a missing package.
        CheckpointError: a damaged tokenizer or model.
    """
    if (config.images is None) == (config.tokenizer is None):
        raise InputError("evaluate: wanted --images with --reference, or --tokenizer")
    if config.batch_size < 1 or config.workers < 0:
        raise InputError(
            f"evaluate: batch_size {config.batch_size}, workers {config.workers}: wanted 1 or more, 0 or more"
        )
    if config.out is not None and config.out.suffix != ".json":
        raise InputError(f"evaluate: out is {config.out}, wanted a .json file")
    for name, folder in (("out", config.out and config.out.parent), ("cache", config.cache)):
        if folder is not None:
            _check_folder(name, folder)
    if config.out is not None and config.out.is_dir():
        raise InputError(f"evaluate: out {config.out} is a folder, wanted a .json file")
    for package in ("torch_fidelity", "torchmetrics"):
        optional(package, extra="evaluate")
    device = pick_device(config.device)
    scores, convention = (_generated if config.images else _tokenizer)(config, device)
    convention["packages"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    result: dict[str, Any] = {
        **{score.name: score.value for score in scores},
        "notes": {score.name: score.note for score in scores},
        "convention": convention,
    }
    _print(scores, convention)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, result)
    return result


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, before an hour is spent on what shall lie in it."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():
        raise InputError(f"evaluate: {name} wants the folder {folder}, but {there} is a file")


def _generated(config: EvaluateConfig, device: torch.device) -> tuple[list[Score], dict[str, Any]]:
    assert config.images is not None
    if config.reference is None or config.lpips or config.features == "none":
        raise InputError("evaluate: --images wants --reference and --features, and no --lpips")
    folder = PNGFolder(config.images)
    width, height = folder.size
    if width != height:
        raise InputError(f"{config.images}: images are {width} x {height} pixels, wanted squares")
    if len(folder) < 2:
        raise InputError(f"{config.images} holds 1 image, wanted two or more for a covariance")
    source = None if config.reference.endswith(".npz") else _open(config.reference, width, config.split)
    given = None if source else _given(Path(config.reference).expanduser())
    extractor = open_extractor(config.features, width, device)
    if source:
        reference, described = _computed(config, source, extractor, device)
    else:
        assert given is not None
        reference, described = given
        _fits(config.reference, reference, described, extractor)
    accumulator = Accumulator(extractor.extract, device)
    steps = -(-len(folder) // config.batch_size)
    for images_B3HW in progress(folder.batches(config.batch_size), "images", steps):
        accumulator.update(images_B3HW)
    convention = {
        "features": _features(extractor),
        "images": {
            "folder": str(config.images),
            "count": len(folder),
            "size": width,
            "pixels": "8-bit PNG files as they are; mage-fast generate truncates 255 x",
        },
        "reference": described,
    }
    return compare(accumulator.result(), reference, device=device), convention


def _tokenizer(config: EvaluateConfig, device: torch.device) -> tuple[list[Score], dict[str, Any]]:
    assert config.tokenizer is not None
    if config.reference is not None:
        raise InputError("evaluate: --tokenizer is scored on --data, --reference is for --images")
    tokenizer = load_tokenizer(config.tokenizer, device)
    size = tokenizer.config.image_size
    if config.lpips and size < LPIPS_SIDE:
        raise InputError(f"evaluate: images have {size} pixels a side, LPIPS wants {LPIPS_SIDE} or more")
    source = _open(config.data, size, config.split)
    extractor = None if config.features == "none" else open_extractor(config.features, size, device)
    # shuffled: the pairs then show several classes of a sorted folder
    levels = _levels(config, source, "reconstruct", shuffle=True)
    scores, count, pairs = score_reconstructions(
        tokenizer,
        (levels_B3HW.float() / 255 for levels_B3HW in levels),
        extract=None if extractor is None else extractor.extract,
        lpips=config.lpips,
        device=device,
    )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [part for half in pairs.split(8, 1) for part in half.unbind()]
        write_grid(torch.cat(rows), config.out.with_suffix(".png"), columns=min(8, pairs.shape[1]))
    return scores, {
        "features": extractor and _features(extractor),
        "reconstructions": {"tokenizer": str(config.tokenizer), "pixels": "clamped; truncated for rFID"},
        "reference": _described(source, config.split) | {"count": count},
    }


def _open(spec: str, size: int, split: Split) -> Source:
    source = open_source(spec, image_size=size, split=split)
    if source.kind != "images":
        raise InputError(f"{spec} holds {source.kind}, wanted images")
    return source


def _levels(config: EvaluateConfig, source: Source, task: str, *, shuffle: bool = False) -> Iterator[Tensor]:
    """The source's images as bytes [B, 3, H, W]; damaged files are left out."""
    stream = batches(
        source,
        config.batch_size,
        shuffle=shuffle,
        drop_last=False,
        augment=CROP,
        on_bad_file="drop",
        workers=config.workers,
    )
    for batch in progress(stream, task, steps_per_epoch(source, config.batch_size, drop_last=False)):
        yield (batch.inputs * 255).round().to(torch.uint8)  # they are levels over 255


def _described(source: Source, split: Split) -> dict[str, Any]:
    size = source.image_size
    return {
        "data": source.spec,
        "split": split,
        "count": len(source),
        "size": size,
        "crop": f"short side to {size} (Pillow's bicubic, where it is not yet), centre {size} x {size}",
    }


def _features(extractor: Extractor) -> dict[str, Any]:
    return {"name": extractor.name, "width": extractor.width, "sha256": extractor.fingerprint}


def _computed(
    config: EvaluateConfig, source: Source, extractor: Extractor, device: torch.device
) -> tuple[FeatureStatistics, dict[str, Any]]:
    """Statistics of real images, from the cache's file where it was computed before."""
    wanted = {
        "features": _features(extractor),
        "reference": _described(source, config.split) | {"items": source_fingerprint(source)},
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    kind = source.spec.partition(":")[0]
    path = config.cache / f"{kind}-{config.split}-{source.image_size}px-{extractor.name}-{key}.npz"
    if path.exists():
        statistics, convention = read_statistics(path)
        if convention != wanted:
            raise InputError(f"{path} holds statistics of something else: remove it, or give another --cache")
    else:
        accumulator = Accumulator(extractor.extract, device, keep=KEPT_FEATURES, total=len(source))
        for levels_B3HW in _levels(config, source, "reference"):
            accumulator.update(levels_B3HW)
        statistics = accumulator.result()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(path, statistics, wanted)
    return statistics, wanted["reference"] | {"count": statistics.count, "statistics": str(path)}


def _given(path: Path) -> tuple[FeatureStatistics, dict[str, Any]]:
    """A file of statistics, and what is known of it."""
    statistics, convention = read_statistics(path)
    digest = hashlib.sha256(statistics.mean_D.numpy().tobytes() + statistics.covariance_DD.numpy().tobytes())
    known: dict[str, Any] = {"statistics": str(path), "sha256": digest.hexdigest()}
    if convention is None:
        return statistics, known | {"layout": "mu and sigma (ADM's), images and features not recorded"}
    return statistics, known | {"features": convention.get("features"), "of": convention.get("reference")}


def _fits(name: str, reference: FeatureStatistics, described: dict[str, Any], extractor: Extractor) -> None:
    if len(reference.mean_D) != extractor.width:
        raise InputError(
            f"{name} is of {len(reference.mean_D)} features, {extractor.name} has {extractor.width}: wanted "
            "the same ones"
        )
    if "layout" not in described and described["features"] != _features(extractor):
        raise InputError(f"{name} is of other features ({described['features']}), wanted {extractor.name}'s")


def _print(scores: list[Score], convention: dict[str, Any]) -> None:
    console = Console(stderr=True)
    table = Table(title="Scores", title_justify="left")
    for column in ("score", "value", "how"):
        table.add_column(column)
    for score in scores:
        table.add_row(score.name, "-" if score.value is None else f"{score.value:.5g}", score.note)
    console.print(table)
    for part, values in convention.items():
        if part == "packages" or values is None:
            continue
        said = ", ".join(f"{k} {v[:12] if k in ('sha256', 'items') else v}" for k, v in values.items())
        console.print(f"{part}: {said}", markup=False, highlight=False, soft_wrap=True)
    counted = convention.get("images", {}).get("count", PUBLISHED_IMAGES)
    if counted < PUBLISHED_IMAGES:
        console.print(
            f"{counted} images: not comparable with published figures, which are of {PUBLISHED_IMAGES}",
            markup=False,
            highlight=False,
        )
