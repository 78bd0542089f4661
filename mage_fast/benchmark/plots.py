"""Pictures of a record file: ratios to the baseline as bars, and the measured points under the roofline."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mage_fast.benchmark import cases
from mage_fast.benchmark.limits import as_device
from mage_fast.benchmark.suites import SUITES, work_of
from mage_fast.files import atomic_path
from mage_fast.kernels import dispatch
from mage_fast.kernels.roofline import Device, Work

_COLOURS = ("#3b6ea5", "#d1495b", "#66a182", "#edae49", "#8d6a9f", "#5c5c5c", "#2f4858", "#c38d9e", "#a1c181")


KINDS = ("end-to-end", "ratios", "roofline")


def draw(records: list[dict[str, Any]], out: Path, kinds: Collection[str] = KINDS) -> list[Path]:
    """Write ``<out>-<kind>.png`` of each kind that there is something to draw for; their paths."""
    drawn = []
    timed = [r for r in records if r["suite"] in ("kernels", *SUITES) and r["median_ms"]]
    steps = [r for r in timed if r["suite"] != "kernels" and r["ratio"]]
    if "end-to-end" in kinds and any(r["implementation"] != r["baseline"] for r in steps):
        drawn.append(_end_to_end(steps, out.with_name(f"{out.stem}-end-to-end.png")))
    kernels = [r for r in timed if r["suite"] == "kernels"]
    compared = [r for r in kernels if r["ratio"] and r["implementation"] != r["baseline"]]
    if "ratios" in kinds and compared:
        drawn.append(_ratios(compared, out.with_name(f"{out.stem}-ratios.png")))
    limits = as_device(records)
    if "roofline" in kinds and limits and timed:
        drawn.append(_roofline(timed, limits, out.with_name(f"{out.stem}-roofline.png")))
    return drawn


def _colours(records: list[dict[str, Any]]) -> dict[str, str]:
    names = sorted({_series(r) for r in records})
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _end_to_end(records: list[dict[str, Any]], path: Path) -> Path:
    """Times as fast as the baseline, a bar an implementation and dtype; images a second at its end."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    items = list(dict.fromkeys((r["suite"], r["name"]) for r in records))
    lines = [r for item in items for r in records if (r["suite"], r["name"]) == item]
    figure = Figure(figsize=(9, 1.2 + 0.28 * (len(lines) + len(items))), layout="constrained")
    axes = figure.subplots()
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(sorted({_who(r) for r in records}))}
    at, ticks = 0.0, []
    for item in items:
        mine = [r for r in lines if (r["suite"], r["name"]) == item]
        ticks.append((at + (len(mine) - 1) / 2, f"{item[0]}\n{item[1]}"))
        for r in mine:
            axes.barh(at, r["ratio"], color=colours[_who(r)], height=0.9)
            images = 1e3 * r["shape"]["batch"] / r["median_ms"]
            axes.text(r["ratio"], at, f" {r['ratio']:.2f} x, {images:.3g} img/s", va="center", fontsize=7)
            at += 1
        at += 0.6
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(
        xlabel="times as fast as the baseline", title=f"Whole steps on {records[0]['device']}",
        xlim=(0, 1.25 * max(r["ratio"] for r in records)),
    )  # fmt: skip
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=3)
    return _save(figure, path)


def _who(record: dict[str, Any]) -> str:
    return f"{record['implementation']}, {record['dtype']}"


def _ratios(records: list[dict[str, Any]], path: Path) -> Path:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(9, 1.2 + 0.2 * len(records)), layout="constrained")
    axes = figure.subplots()
    colours = _colours(records)
    for name, colour in colours.items():
        mine = [(i, r["ratio"]) for i, r in enumerate(records) if r["implementation"] == name]
        # from 1 on: a longer bar is a larger change, either way
        axes.barh([i for i, _ in mine], [ratio - 1 for _, ratio in mine], left=1, color=colour, label=name)
    names = [r["name"] for r in records]
    first = ["" if name == before else name for before, name in pairwise(["", *names])]
    axes.set_yticks(range(len(records)), first, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast as the baseline", title=f"Ratios on {records[0]['device']}")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which("{x:g}")
    axes.tick_params(which="both", labelsize=7)
    axes.margins(y=0.01)
    axes.legend(fontsize=7)
    return _save(figure, path)


def _roofline(records: list[dict[str, Any]], limits: Device, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = list(_points(records))
    colours = _colours(records)
    for name, colour in colours.items():
        mine = [(x, y) for implementation, x, y in points if implementation == name]
        axes.scatter(
            [x for x, _ in mine], [y for _, y in mine], s=12, color=colour, label=name, alpha=0.8, zorder=3
        )
    reach = [x for _, x, _ in points] or [1.0]
    peaks = dict(limits.peak_flops)
    left = min(*reach, min(peaks.values()) / limits.bandwidth_bytes_s) / 2
    right = max(*reach, max(peaks.values()) / limits.bandwidth_bytes_s) * 2
    for name, peak in peaks.items():
        ridge = max(left, peak / limits.bandwidth_bytes_s)
        axes.plot([ridge, right], [peak, peak], color="black", linewidth=0.8)
        axes.text(right, peak, name, fontsize=7, ha="right", va="bottom")
    top = max(peaks.values())
    slope = [left * limits.bandwidth_bytes_s, top]
    axes.plot([left, top / limits.bandwidth_bytes_s], slope, color="black", linewidth=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP a byte that must move", ylabel="FLOP/s achieved",
        title=f"Roofline of {records[0]['device']}, limits measured",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, path)


def _points(records: list[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    for r in records:
        work = _work(r)
        if work is not None:
            yield _series(r), work.intensity, work.flops / r["median_ms"] * 1e3


def _series(record: dict[str, Any]) -> str:
    return record["implementation"] if record["suite"] == "kernels" else f"whole steps: {_who(record)}"


def _work(record: dict[str, Any]) -> Work | None:
    """From the spec, or the item, of the record's name; None where it is gone."""
    if record["suite"] != "kernels":
        return work_of(record)
    op, name, direction = record["name"].split("/")
    if op not in dispatch.OPS:
        return None
    everything = cases.module(op, "specs")
    specs = (*everything.SPECS, *getattr(everything, "GPU_SPECS", ()))
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        return None
    dtype = getattr(torch, record["dtype"])
    forward = spec.work(dtype, "fwd")
    return forward + spec.work(dtype, "bwd") if direction == "fwd+bwd" else forward


def _save(figure: Any, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
