"""Pictures that runs leave behind: grids of images, curves of metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mage_fast.files import atomic_path
from mage_fast.training.metrics import enlarged, image_grid, save_png, to_uint8


def write_grid(
    images: Float[Tensor, "N 3 H W"], path: Path, *, columns: int | None = None, zoom: int = 0
) -> None:
    """One PNG of all images, about square unless ``columns`` says otherwise.

    Small images are enlarged by whole pixels, ``zoom`` times or until their side is about 64.
    """
    save_png(image_grid(enlarged(images, zoom), columns or math.ceil(math.sqrt(len(images)))), path)


#: Milliseconds that a picture of an animation is shown, and the last one.
FRAME_MS, LAST_FRAME_MS = 200, 2000


def write_animation(frames: Iterable[Float[Tensor, "N 3 H W"]], path: Path) -> None:
    """An animated WebP file without end, a grid as :func:`write_grid` makes it for each frame."""
    pictures = []
    for images in frames:
        grid_CHW = image_grid(enlarged(images), math.ceil(math.sqrt(len(images))))
        pictures.append(Image.fromarray(to_uint8(grid_CHW).permute(1, 2, 0).contiguous().numpy()))
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            quality=90,
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_curve(metrics: Path, path: Path, *, title: str = "Pre-training loss") -> None:
    """Plot ``loss`` over steps."""
    _plot(metrics, path, {"loss": title})


#: What :func:`curves` shows where it was logged, with its title.
CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
    "images_per_second": "images/s",
    "samples_per_second": "samples/s",
    "data_wait": "share of time waiting for data",
    "mfu": "model FLOPs utilisation",
    "peak_memory_mib": "peak memory, MiB",
    "knn_top1": "k-NN accuracy",
    "linear_top1": "linear probe accuracy",
    "test_loss": "held-out loss",
    "test_top1": "held-out accuracy",
    "test_top5": "held-out top-5 accuracy",
}


def curves(metrics: Path, path: Path) -> None:
    """One picture of all that a run logged, a plot for each of :data:`CURVES` that ``metrics.jsonl`` has."""
    _plot(metrics, path, CURVES)


def _plot(metrics: Path, path: Path, titles: Mapping[str, str]) -> None:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    lines = read_metrics(metrics)
    found = {
        name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in titles
    }
    shown = {name: points for name, points in found.items() if points} or {"loss": []}
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (6, 3.2) if len(shown) == 1 else (4.4 * columns, 2.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (name, points), axes in zip(shown.items(), grid, strict=False):
        # a few points, as of probes, would look like many on a line
        marker = "o" if len(points) < 30 else None
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color="#3b6ea5", marker=marker, markersize=3)
        axes.set(xlabel="step", title=titles[name])
        if len(shown) == 1:
            axes.set_ylabel(name)
        if name == "data_wait":
            axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid:  # left over
        axes.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
