"""Whole benchmarks: the device's limits, then case after case, each kept as soon as it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from mage_fast.benchmark import cases, limits, measure, plots, records, tables, trace
from mage_fast.benchmark.end_to_end import Item, Measured
from mage_fast.benchmark.end_to_end import measure as measure_item
from mage_fast.kernels.roofline import Device


@dataclass(frozen=True)
class Session:
    """What to time, how long, and where the records go."""

    ops: Sequence[str]
    device: str
    out: Path
    seconds: float
    #: Only specs of these names; all without.
    specs: Sequence[str] = ()
    compiled: bool = True
    smoke: bool = False
    #: What floating inputs are computed in; the device's own choice without.
    dtype: torch.dtype | None = None

    def cases(self) -> list[cases.Case]:
        found = cases.cases(tuple(self.ops), self.device, smoke=self.smoke, dtype=self.dtype)
        return [case for case in found if not self.specs or case.spec.name in self.specs]

    def run(self, console: Console) -> dict[str, Any]:
        """Measure and print the tables; returns counts and the record file."""
        ceiling = _ceiling(self.device, self.out, self.seconds, console, smoke=self.smoke)
        name = records.device_name(self.device)
        rows: list[measure.Row] = []
        try:
            for case in track(self.cases(), "bench", console=Console(stderr=True)):
                rows += self._measure(case, ceiling, console)
        finally:  # also where it is stopped
            console.print(tables.measured(rows, f"Kernels: {name}"))
            for remark in tables.remarks(rows):
                console.print(remark, markup=False, highlight=False)
        return {
            "timed": sum(row.timing is not None for row in rows),
            "incorrect": sum(row.correct is False for row in rows),
            "out": str(self.out),
        }

    def _measure(self, case: cases.Case, ceiling: Device, console: Console) -> list[measure.Row]:
        try:
            rows = measure.measure(case, ceiling, self.seconds, compiled=self.compiled)
        except torch.OutOfMemoryError as error:  # the gate's float64 needs the most
            console.print(f"not measured: {case.name}: {str(error).splitlines()[0]}", markup=False)
            return []
        written = [row.record() for row in rows if row.correct is not None]
        records.update(self.out, records.complete(written, self.device))
        return rows

    def plot(self) -> list[Path]:
        """Draw what the record file holds of this device."""
        return plot(self.out, self.device)


def plot(out: Path, device: str) -> list[Path]:
    """Draw what the record file holds of this device."""
    name = records.device_name(device)
    return plots.draw([r for r in records.read(out) if r["device"] == name], out)


def end_to_end(
    suite: str, items: Sequence[Item], out: Path, seconds: float, console: Console, **options: bool
) -> dict[str, Any]:
    """Measure whole steps and print their table; returns counts and the record file.

    Each candidate is timed for ``seconds``, a few rounds at least. ``options``: ``smoke``, ``compiled`` and
    ``profiled``, which also writes a trace of the first item beside the records.
    """
    device = items[0].device
    ceiling = _ceiling(device, out, min(seconds, 0.5), console, smoke=options["smoke"])
    found: list[Measured] = []
    try:
        for item in track(items, "bench", console=Console(stderr=True)):
            found.append(measured := measure_item(item, ceiling, seconds, compiled=options["compiled"]))
            records.update(out, records.complete(measured.records, device))
    finally:  # also where it is stopped
        taken = [record for measured in found for record in measured.records]
        console.print(tables.end_to_end(taken, f"{suite}: {records.device_name(device)}"))
        for measured in found:
            for remark in measured.remarks():
                console.print(remark, markup=False, highlight=False, soft_wrap=True)
    traces = []
    if options["profiled"]:
        traces.append(str(trace.write(items[0], out, console)))
    return {
        "timed": sum(record["median_ms"] is not None for record in taken),
        "incorrect": sum(len(measured.incorrect) for measured in found),
        "out": str(out),
        "traces": traces,
    }


def _ceiling(device: str, out: Path, seconds: float, console: Console, *, smoke: bool) -> Device:
    """The device's limits: measured, recorded, printed."""
    records.update(out, [])  # a file that cannot be written is found now
    measured = limits.measure(device, seconds, smoke=smoke)
    records.update(out, records.complete(measured, device))
    ceiling = limits.as_device(records.complete(measured, device))
    assert ceiling is not None
    console.print(tables.limits(ceiling, f"Measured limits: {records.device_name(device)}"))
    return ceiling
