"""The picture of a run's curves: what was logged is shown, by what matplotlib drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mage_fast.recipes.pictures import curves, loss_curve


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def noted(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    return saved


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Points of every visible plot, by its title."""
    axes = [axes for axes in figure.axes if axes.get_visible()]
    return {x.get_title(): [tuple(point) for point in x.lines[0].get_xydata()] for x in axes}


def test_all_that_was_logged_is_shown(tmp_path: Path, figures: list[Figure]) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "time": 5.0, "loss": 4.0, "lr": 0.1, "steps_per_second": 3.0, "data_wait": 0.25},
        {"step": 10, "time": 6.0, "loss": None, "lr": 0.2, "data_wait": 0.5, "knn_top1": 0.75},
        {"step": 20, "time": 7.0, "loss": 3.0, "lr": 0.3, "data_wait": 0.125},
    ]
    curves(write(tmp_path / "metrics.jsonl", lines), tmp_path / "curves.png")
    assert drawn(figures[0]) == {
        "loss": [(1, 4.0), (20, 3.0)],
        "learning rate": [(1, 0.1), (10, 0.2), (20, 0.3)],
        "share of time waiting for data": [(1, 0.25), (10, 0.5), (20, 0.125)],
        "k-NN accuracy": [(10, 0.75)],
    }
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="Loss of it")
    assert drawn(figures[1]) == {"Loss of it": [(1, 4.0), (20, 3.0)]}


def test_a_run_that_logged_nothing_has_an_empty_picture(tmp_path: Path, figures: list[Figure]) -> None:
    curves(write(tmp_path / "metrics.jsonl", []), tmp_path / "curves.png")
    assert drawn(figures[0]) == {"loss": []}
