"""Pictures that runs leave behind: grids of images, curves of metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from mage_fast.files import atomic_path
from mage_fast.training.metrics import image_grid, save_png


def write_grid(
    images: Float[Tensor, "N 3 H W"], path: Path, *, columns: int | None = None, zoom: int = 0
) -> None:
    """One PNG of all images, about square unless ``columns`` says otherwise.

    Small images are enlarged by whole pixels, ``zoom`` times or until their side is about 64.
    """
    zoom = zoom or max(1, round(64 / images.shape[-1]))
    images = images.clamp(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    save_png(image_grid(images, columns or math.ceil(math.sqrt(len(images)))), path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_curve(metrics: Path, path: Path, *, title: str = "Pre-training loss") -> None:
    """Plot ``loss`` over steps."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    lines = read_metrics(metrics)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="#3b6ea5")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
