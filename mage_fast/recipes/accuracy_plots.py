"""Plots of accuracies: over blocks or numbers of labels as curves, over data sets as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mage_fast.files import atomic_path

COLOURS = ("#3b6ea5", "#c8803a", "#6a9a4b")


def accuracy_curves(
    path: Path,
    x: Sequence[int],
    curves: Mapping[str, Sequence[Sequence[float]]],
    *,
    label: str,
    chance: float,
) -> None:
    """Mean of each curve's values at each ``x``, in percent, the band from the least to the greatest.

    Args:
        path: of the PNG.
        x: what the axis shows, by number and not to scale.
        curves: by name, for each ``x`` accuracies in [0, 1], as of several seeds.
        label: of the axis.
        chance: accuracy in [0, 1] of guessing.
    """
    figure, axes = _axes((5.2, 3.4))
    places = range(len(x))
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        means = [100 * sum(v) / len(v) for v in values]
        axes.plot(places, means, "o-", color=colour, markersize=4, label=name)
        if any(len(v) > 1 for v in values):
            low, high = ([100 * f(v) for v in values] for f in (min, max))
            axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(100 * chance, color="#888888", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(places, [str(value) for value in x])
    axes.set(xlabel=label, ylabel="top-1 accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False, loc="best")
    _save(figure, path)


def accuracy_bars(path: Path, bars: Mapping[str, Sequence[float]], *, chance: Mapping[str, float]) -> None:
    """A bar a data set: the mean of its accuracies in percent, the least and the greatest, and chance.

    Args:
        path: of the PNG.
        bars: by data set, accuracies in [0, 1], as of several seeds.
        chance: by data set, accuracy in [0, 1] of guessing.
    """
    figure, axes = _axes((6.4, 0.9 + 0.5 * len(bars)))
    places = range(len(bars))
    means = [100 * sum(v) / len(v) for v in bars.values()]
    low, high = ([100 * f(v) for v in bars.values()] for f in (min, max))
    errors = [
        [mean - least for mean, least in zip(means, low, strict=True)],
        [most - mean for mean, most in zip(means, high, strict=True)],
    ]
    axes.barh(places, means, xerr=errors, color=COLOURS[0], height=0.6, error_kw={"capsize": 3})
    for place, (name, mean, most) in enumerate(zip(bars, means, high, strict=True)):
        axes.plot([100 * chance[name]] * 2, [place - 0.3, place + 0.3], "--", color="#222222", linewidth=1)
        axes.annotate(f"{mean:.1f}", (most + 1.5, place), va="center", fontsize=9)
    axes.set_yticks(places, list(bars))
    axes.invert_yaxis()
    axes.set(xlabel="top-1 accuracy, % (dashed: chance)", xlim=(0, 110), xticks=range(0, 101, 20))
    _save(figure, path)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
