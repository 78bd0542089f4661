"""``mage-fast bench``: how fast every implementation of every op is here, and how fast it could be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mage_fast.benchmark import cases, limits, measure, plots, records, tables
from mage_fast.errors import InputError
from mage_fast.kernels import dispatch
from mage_fast.kernels.roofline import DEVICES
from mage_fast.training.logs import progress
from mage_fast.training.run import pick_device


@dataclass(frozen=True)
class BenchConfig:
    """Time every implementation of the ops side by side, behind a correctness gate."""

    suite: Literal["kernels"] = "kernels"
    #: Only these ops; all of them without.
    op: tuple[str, ...] = ()
    device: str = "auto"
    #: Record file, to which measurements are added; out/bench/<device>.json without. Plots go beside it.
    out: Path | None = None
    #: About how long each implementation is timed.
    seconds: float = 0.2
    #: On CUDA: also the plain PyTorch chain under torch.compile, which takes a while to compile.
    compile: bool = True
    #: The tiny shapes, to see that everything runs.
    smoke: bool = False
    #: Measure nothing: print what the ops must move and compute, and this device's floors by its data sheet.
    roofline: Literal["a100", "h100", "h200"] | None = None


def run(config: BenchConfig) -> dict[str, Any]:
    """Print the tables, write the records after each case, draw the plots; returns counts and paths.

    Raises:
        InputError: an unknown op, a time that is not positive, a record file that is none.
    """
    unknown = sorted(set(config.op) - set(dispatch.OPS))
    if unknown:
        raise InputError(f"bench: no op named {unknown[0]!r}; the ops are {', '.join(dispatch.OPS)}")
    if not config.seconds > 0:
        raise InputError(f"bench: seconds is {config.seconds}, wanted more than 0")
    ops = config.op or dispatch.OPS
    console = Console(width=None if Console().is_terminal else 160)
    if config.roofline is not None:
        console.print(tables.paper(DEVICES[config.roofline], ops))
        return {}
    device = pick_device(config.device).type
    if device not in cases.DTYPE:
        raise InputError(f"bench: device is {device!r}, wanted one of {', '.join(cases.DTYPE)}")
    out = config.out or Path("out/bench") / f"{records.slug(device)}.json"
    records.update(out, [])  # a file that cannot be written is found now
    return _measure(config, ops, device, out, console)


def _measure(
    config: BenchConfig, ops: tuple[str, ...], device: str, out: Path, console: Console
) -> dict[str, Any]:
    measured = limits.measure(device, config.seconds, smoke=config.smoke)
    kept = records.update(out, records.complete(measured, device))
    ceiling = limits.as_device(measured)
    assert ceiling is not None
    rows: list[measure.Row] = []
    for case in progress(cases.cases(ops, device, smoke=config.smoke), "bench"):
        new = measure.measure(case, ceiling, config.seconds, compiled=config.compile)
        rows += new
        written = [row.record() for row in new if row.correct is not None]
        kept = records.update(out, records.complete(written, device))
    name = records.device_name(device)
    console.print(tables.limits(ceiling, f"Measured limits of {name}"))
    console.print(tables.measured(rows, f"Kernels on {name}"))
    for remark in tables.remarks(rows):
        console.print(remark, markup=False, highlight=False)
    pictures = plots.draw([r for r in kept if r["device"] == name], out)
    console.print(f"records: {out}", *(f"plot: {path}" for path in pictures), sep="\n", highlight=False)
    wrong = sum(row.correct is False for row in rows)
    timed = sum(row.timing is not None for row in rows)
    return {"timed": timed, "incorrect": wrong, "out": str(out), "plots": [str(p) for p in pictures]}
