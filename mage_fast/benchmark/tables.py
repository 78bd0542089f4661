"""Tables of measurements and of the data sheets' floors, for a terminal and for README.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.table import Table

from mage_fast.benchmark import cases
from mage_fast.benchmark.measure import Row
from mage_fast.benchmark.suites import SUITES
from mage_fast.kernels.roofline import Device


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def measured(rows: Iterable[Row], title: str) -> Table:
    """One line an implementation; wrong ones in red, declined ones left out (see :func:`declined`)."""
    rows = [row for row in rows if row.correct is not None]
    in_graphs = any(row.timing and row.timing.graph_ms for row in rows)
    table = Table(title=title, title_justify="left")
    for column in ("op / spec / direction", "implementation"):
        table.add_column(column, overflow="fold")
    for column in ("median ms", "20% - 80%", *(["graph ms"] * in_graphs), "ratio", "% of floor", "peak MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        name = row.case.name if row.case.name != before else ""
        table.add_section() if name and before else None
        before = row.case.name
        if row.timing is None:
            table.add_row(name, row.implementation, "incorrect", style="red")
            continue
        timing = row.timing
        spread = f"{timing.quantile_ms(20):.4f} - {timing.quantile_ms(80):.4f}"
        graph = [_number(timing.graph_ms, ".4f")] * in_graphs
        ratio = "baseline" if row.implementation == row.case.baseline else _number(row.ratio, ".2f")
        numbers = (ratio, _number(row.percent_of_floor, ".1f"), _number(timing.peak_mib, ".1f"))
        table.add_row(name, row.implementation, f"{timing.median_ms:.4f}", spread, *graph, *numbers)
    return table


#: Title of a column, field of a record, form.
_STEP_COLUMNS = (
    ("median ms", "median_ms", ",.1f"),
    ("img/s", "images_s", ",.2f"),
    ("ratio", "ratio", ".2f"),
    ("floor ms", "floor_ms", ",.2f"),
    ("% of floor", "percent_of_floor", ".1f"),
    ("MFU %", "mfu_percent", ".1f"),
    ("kept MiB", "activation_mib", ",.0f"),
    ("peak MiB", "peak_mib", ",.0f"),
    ("rounds", "rounds", "d"),
)


def step_columns(records: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The columns of whole steps that some record fills."""
    found = list(records)
    return [column for column in _STEP_COLUMNS if any(r[column[1]] is not None for r in found)]


def step_cells(record: dict[str, Any], columns: Iterable[tuple[str, str, str]]) -> list[str]:
    """The numbers of one record; the baseline's ratio is said so."""
    if record["correct"] is False:
        return ["incorrect", *("" for _ in list(columns)[1:])]
    is_baseline = record["implementation"] == record["baseline"]
    return [
        "baseline" if field == "ratio" and is_baseline else _number(record[field], form)
        for _, field, form in columns
    ]


def end_to_end(records: Iterable[dict[str, Any]], title: str) -> Table:
    """One line a record of a suite of whole steps; wrong ones in red, the baseline is among them."""
    records = list(records)
    columns = step_columns(records)
    table = Table(title=title, title_justify="left")
    for column in ("name", "implementation", "dtype"):
        table.add_column(column)
    for column, _, _ in columns:
        table.add_column(column, justify="right", no_wrap=True)
    before = ""
    for r in records:
        name = r["name"] if r["name"] != before else ""
        table.add_section() if name and before else None
        before = r["name"]
        style = "red" if r["correct"] is False else None
        table.add_row(name, r["implementation"], r["dtype"], *step_cells(r, columns), style=style)
    return table


def remarks(rows: Iterable[Row]) -> list[str]:
    """What the table has no room for: wrong results, who declined what and why, graphs that failed."""
    found: dict[str, None] = {}  # each remark once, in order
    for row in rows:
        if row.correct is False:
            found[f"incorrect: {row.implementation}, {row.reason}"] = None
        elif row.correct is None:
            found[f"declined: {row.case.op}, {row.implementation}: {row.reason}"] = None
        elif row.timing and row.timing.graph_error:
            found[f"no graph: {row.case.name}, {row.implementation}: {row.timing.graph_error}"] = None
    return list(found)


def limits(device: Device, title: str) -> Table:
    """A device's bandwidth and peaks."""
    table = Table(title=title, title_justify="left")
    table.add_column("limit")
    table.add_column("figure", justify="right")
    table.add_row("memory", f"{device.bandwidth_bytes_s / 1e9:,.0f} GB/s")
    for name, flops in device.peak_flops.items():
        table.add_row(name, f"{flops / 1e12:,.2f} TFLOP/s")
    return table


def paper(device: Device, ops: Iterable[str]) -> Table:
    """What every op must move and compute at its real shapes, and the device's floor for it."""
    table = Table(title=f"Floors on {device.name}, from its data sheet", title_justify="left")
    table.add_column("op / spec", overflow="fold")
    for column in ("direction", "dtype"):
        table.add_column(column)
    for column in ("MB", "MFLOP", "FLOP/byte", "floor us"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound by")
    for op in ops:
        for spec in cases.specs(op, "cuda"):
            dtype = cases.DTYPE["cuda"] if cases.is_floating(spec) else torch.int32
            for direction in ("fwd", "bwd")[: len(cases.directions(op))]:
                work = spec.work(dtype, direction)
                table.add_row(
                    f"{op}/{spec.name}", direction, str(dtype).removeprefix("torch."),
                    f"{work.bytes / 1e6:.3f}", f"{work.flops / 1e6:,.1f}", f"{work.intensity:.1f}",
                    f"{1e6 * device.floor_seconds(work, dtype):.2f}", device.bound(work, dtype),
                )  # fmt: skip
        table.add_section()
    return table


#: Our own implementations of ops, of which the short table takes the first that there is.
OWN = ("triton", "cpp")


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one device's records the whole steps and, of each op, its first shape in the dtype timed first."""
    kept: dict[str, dict[str, Any]] = {}
    for r in records:
        if r["suite"] != "kernels":
            kept[f"{r['name']} {r['dtype']} {r['implementation']}"] = r
        elif r["implementation"] in OWN and r["ratio"]:
            op, spec, _ = r["name"].split("/")
            first = kept.setdefault(op, r)
            if first["name"].startswith(f"{op}/{spec}/") and first["dtype"] == r["dtype"]:
                kept[op] = r  # fwd, then fwd+bwd where there is a backward
    return list(kept.values())


def markdown(records: list[dict[str, Any]]) -> str:
    """The timed implementations of one device's records, whole steps first; references are left out."""
    steps = [r for r in records if r["suite"] in SUITES and r.get("images_s")]
    compared = [
        r
        for r in records
        if r not in steps and r["implementation"] not in (r["baseline"], "reference") and r["ratio"]
    ]
    tables = [_markdown_steps(steps)] if steps else []
    if compared or not steps:
        tables.append(_markdown_kernels(compared))
    return "\n\n".join(tables)


def _markdown_steps(records: list[dict[str, Any]]) -> str:
    columns = step_columns(records)
    lines = [
        "| "
        + " | ".join(("suite / name", "dtype", "implementation", *(title for title, _, _ in columns)))
        + " |",
        "|---|---|---|" + "--:|" * len(columns),
    ]
    for r in records:
        cells = (f"`{r['suite']}/{r['name']}`", r["dtype"], r["implementation"], *step_cells(r, columns))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _markdown_kernels(compared: list[dict[str, Any]]) -> str:
    lines = [
        "| op / spec / direction | dtype | implementation | ms | baseline | ratio | % of floor |",
        "|---|---|---|--:|---|--:|--:|",
    ]
    for r in sorted(compared, key=lambda r: r["suite"] == "kernels"):  # whole steps first
        floor = _number(r["percent_of_floor"], ".0f")
        lines.append(
            f"| `{r['name']}` | {r['dtype']} | {r['implementation']} | {r['median_ms']:.3f} "
            f"| {r['baseline']}, {r['baseline_median_ms']:.3f} ms | {r['ratio']:.2f} | {floor} |"
        )
    return "\n".join(lines)
