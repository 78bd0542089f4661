"""A whole benchmark: the device's limits, then case after case, each kept as soon as it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from mage_fast.benchmark import cases, limits, measure, plots, records, tables
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

    def cases(self) -> list[cases.Case]:
        found = cases.cases(tuple(self.ops), self.device, smoke=self.smoke)
        return [case for case in found if not self.specs or case.spec.name in self.specs]

    def run(self, console: Console) -> dict[str, Any]:
        """Measure and print the tables; returns counts and the record file."""
        records.update(self.out, [])  # a file that cannot be written is found now
        measured = limits.measure(self.device, self.seconds, smoke=self.smoke)
        records.update(self.out, records.complete(measured, self.device))
        ceiling = limits.as_device(measured)
        assert ceiling is not None
        name = records.device_name(self.device)
        console.print(tables.limits(ceiling, f"Measured limits: {name}"))
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
        name = records.device_name(self.device)
        return plots.draw([r for r in records.read(self.out) if r["device"] == name], self.out)
