"""The benchmarks' report: one HTML file of everything in a record file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from mage_fast.benchmark import limits, plots, tables
from mage_fast.benchmark.end_to_end import OURS
from mage_fast.benchmark.suites import SUITES
from mage_fast.recipes.page import embedded, write_page

_TITLES = {
    "train": "Training steps",
    "generate": "Generating images",
    "tokenize": "The tokenizer",
    "kernels": "Kernels",
}
_PICTURES = {
    "end-to-end": "whole steps beside the baseline",
    "ratios": "kernels beside the baseline",
    "roofline": "measured points under the device's limits",
}
_LEGEND = """<p class="note">ratio: the baseline's median time over this one's, timed in turns in one process.
% of floor: of what the measured limits allow for the matrix products and bytes that the results need. MFU: of
the data sheet's peak, with the same operations. kept: what a forward pass saves for the backward pass. peak:
what a call allocates beside its inputs. Results that failed the check against the reference are not
timed.</p>"""
_KERNEL_COLUMNS = [
    ("median ms", "median_ms", ",.4f"),
    ("ratio", "ratio", ".2f"),
    ("% of floor", "percent_of_floor", ".1f"),
    ("peak MiB", "peak_mib", ",.1f"),
]


def write(records: list[dict[str, Any]], path: Path) -> Path:
    """Write the page: limits, tables and plots of every device in the records; every picture is inside it."""
    devices = list(dict.fromkeys(r["device"] for r in records))
    body = "".join(_device([r for r in records if r["device"] == device]) for device in devices)
    write_page("How fast mage_fast is", _LEGEND + body, path, width=72)
    return path


def _device(records: list[dict[str, Any]]) -> str:
    taken = sorted({r["date"] for r in records})
    versions = {f"{name} {version}" for r in records for name, version in r["versions"].items()}
    parts = [f"<h2>{escape(records[0]['device'])}</h2>"]
    parts.append(f'<p class="note">{escape(", ".join(sorted(versions)))}; taken {", ".join(taken)}</p>')
    if ceiling := limits.as_device(records):
        peaks = {"memory": f"{ceiling.bandwidth_bytes_s / 1e9:,.0f} GB/s"}
        peaks |= {name: f"{flops / 1e12:,.2f} TFLOP/s" for name, flops in ceiling.peak_flops.items()}
        cells = [([name], [figure], "") for name, figure in peaks.items()]
        parts.append(f"<h3>Measured limits</h3>{_table(['limit'], ['figure'], cells)}")
    for suite in (*SUITES, "kernels"):
        if mine := [r for r in records if r["suite"] == suite]:
            parts.append(f"<h3>{_TITLES[suite]}</h3>{_suite(suite, mine)}")
    with tempfile.TemporaryDirectory() as folder:
        for picture in plots.draw(records, Path(folder) / "bench.json"):
            said = _PICTURES[picture.stem.removeprefix("bench-")]
            parts.append(f"<h3>{said.capitalize()}</h3>{embedded(picture, said, kind='plot')}")
    return "\n".join(parts)


def _suite(suite: str, records: list[dict[str, Any]]) -> str:
    columns = _KERNEL_COLUMNS if suite == "kernels" else tables.step_columns(records)
    rows = []
    for r in records:
        texts = [r["name"], r["implementation"], r["dtype"], str(r["baseline"])]
        look = "wrong" if r["correct"] is False else "ours" if r["implementation"].startswith(OURS) else ""
        rows.append((texts, tables.step_cells(r, columns), look))
    head = ["name", "implementation", "dtype", "baseline"]
    notes = dict.fromkeys(
        f"{r['name']}, {r['implementation']}, {r['dtype']}: {r['note']}" for r in records if r["note"]
    )
    remarks = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return _table(head, [title for title, _, _ in columns], rows) + remarks


def _table(texts: list[str], numbers: list[str], rows: Iterable[tuple[list[str], list[str], str]]) -> str:
    """A table of text columns, then of numbers; each row has a class, or none."""
    head = "".join(f"<th>{escape(x)}</th>" for x in texts)
    head += "".join(f"<th class=number>{escape(x)}</th>" for x in numbers)
    lines = []
    for left, right, look in rows:
        cells = "".join(f"<td>{escape(x)}</td>" for x in left)
        cells += "".join(f"<td class=number>{escape(x)}</td>" for x in right)
        lines.append(f'<tr class="{look}">{cells}</tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
