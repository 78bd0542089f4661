"""The gallery of kernels, docs/gallery.md, and its pictures: from docstrings, specs and benchmarks/results.

python -m benchmarks.gallery          # writes the page and docs/pictures/kernels/*.svg
python -m benchmarks.gallery --check  # exit status 1 if one of them is another
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

import mage_fast
from benchmarks.report import RESULTS, ROOT
from benchmarks.tile_svg import draw
from benchmarks.tilings import TILINGS
from mage_fast.benchmark import cases, records
from mage_fast.benchmark.tables import OWN
from mage_fast.files import atomic_path
from mage_fast.kernels.dispatch import OPS
from mage_fast.kernels.roofline import DEVICES

PAGE = ROOT / "docs" / "gallery.md"
PICTURES = "pictures/kernels"
PAPER = DEVICES["h100"]

HEAD = f"""<!-- written by python -m benchmarks.gallery: edit that, or the docstrings and specs it reads -->

# Gallery of kernels

One section an op: what it computes (the docstring of its `reference.py`), what one program of its kernels
owns, what it must move and compute at the least, and what was measured. Every op is a function of
`mage_fast.ops` and works alone, in any model; its arguments are in the [reference of the ops](api_ops.md),
its design in [kernels.md](kernels.md), all its shapes in [benchmarks.md](benchmarks.md).

*Must* is the work that benchmarks.md defines, at the first of the op's shapes for a GPU: inputs read once,
results written once, FLOPs of the products, else one an elementwise operation. *floor* is
max(bytes / bandwidth, FLOPs / peak) by the data sheet of an {PAPER.name}: a limit on paper, not measured.
Measured figures are medians beside the same op in plain PyTorch calls; *% of floor* is of limits measured in
the same run, which small shapes can beat from warm caches.
"""


def section(op: str, results: Path = RESULTS) -> str:
    """The Markdown of one op."""
    function = getattr(mage_fast.ops, op)
    parts = [f"## {op}", (inspect.getdoc(function) or "").split("\n", 1)[0]]
    parts.append(equation(op))
    parts.append(f"![What one program of {op} owns]({PICTURES}/{op}.svg)")
    parts += [must(op), *measured(op, results), links(op)]
    return "\n\n".join(parts)


def equation(op: str) -> str:
    """What the docstring of the op's reference says after its first sentence: equations, then sentences."""
    _, *rest = (inspect.getdoc(cases.module(op, "reference")) or "").split("\n\n")
    equations = [textwrap.dedent(paragraph) for paragraph in rest if not paragraph.endswith(".")]
    sentences = [paragraph for paragraph in rest if paragraph.endswith(".")]
    block = "\n\n".join(equations)
    return "\n\n".join([f"```text\n{block}\n```", *sentences])


def must(op: str) -> str:
    """Bytes, operations and the floor on paper, forward and backward."""
    spec = cases.specs(op, "cuda")[0]
    dtype = cases.DTYPE["cuda"] if cases.is_floating(spec) else torch.int32
    columns = ("MB read", "MB written", "GFLOP", "FLOP/byte", "floor µs", "bound by")
    lines = [
        f"| must, at `{spec.name}`, {_name(dtype)} | {' | '.join(columns)} |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for direction, title in (("fwd", "forward"), ("bwd", "backward"))[: len(cases.directions(op))]:
        work = spec.work(dtype, direction)
        moved = f"{work.read_bytes / 1e6:,.1f} | {work.written_bytes / 1e6:,.1f} | {work.flops / 1e9:,.3f}"
        floor = f"{1e6 * PAPER.floor_seconds(work, dtype):,.1f} | {PAPER.bound(work, dtype)}"
        lines.append(f"| {title} | {moved} | {work.intensity:,.1f} | {floor} |")
    return "\n".join(lines)


def measured(op: str, results: Path = RESULTS) -> list[str]:
    """A table for each device that has records of the op, at its first published shape."""
    tables = []
    by_device: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        for record in records.read(path):
            if record["suite"] == "kernels" and record["name"].startswith(f"{op}/"):
                by_device.setdefault(record["device"], []).append(record)
    for device, found in by_device.items():
        spec = next(r["name"].split("/")[1] for r in found if "batch" in r["name"])
        columns = ("dtype", "implementation", "ms", "plain PyTorch ms", "times as fast", "% of floor")
        lines = [f"| {device}, `{spec}` | {' | '.join(columns)} |", "|---|---|---|--:|--:|--:|--:|"]
        for r in found:
            if r["name"].startswith(f"{op}/{spec}/") and r["implementation"] in OWN and r["ratio"]:
                way = r["name"].rsplit("/", 1)[1].replace("fwd", "forward").replace("+bwd", ", backward")
                lines.append(
                    f"| {way} | {r['dtype']} | {r['implementation']} | {r['median_ms']:.3f} "
                    f"| {r['baseline_median_ms']:.3f} | {r['ratio']:.2f} | {r['percent_of_floor']:.0f} |"
                )
        tables.append("\n".join(lines))
    if all(record["implementation"] != "triton" for found in by_device.values() for record in found):
        tables.append("Not measured on a GPU.")
    return tables


def links(op: str) -> str:
    """The op's files, relative to the page."""
    folder = ROOT / "kernels" / "ops" / op
    files = [(name, folder / f"{name}.py") for name in ("api", "reference", "specs", "triton")]
    files += [("C++ launcher", folder / "cpp.py"), ("C++ kernel", ROOT / "kernels" / "csrc" / f"{op}.cpp")]
    files.append(("tests", ROOT / "tests" / "kernels" / f"test_{op}.py"))
    found = [f"[{name}](../{path.relative_to(ROOT)})" for name, path in files if path.is_file()]
    return f"Files: {', '.join(found)}. Timed by `mage-fast bench --op {op}`."


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(section(op, results) for op in OPS)]) + "\n"


def wanted(results: Path = RESULTS) -> dict[Path, str]:
    """Every file and what it should hold."""
    pictures = {
        PAGE.parent / PICTURES / f"{op}.svg": draw(f"What one program of {op} owns", TILINGS[op])
        for op in OPS
    }
    return {PAGE: page(results)} | pictures


def behind(files: dict[Path, str]) -> list[Path]:
    """Files that hold something else, or are not there."""
    return [p for p, text in files.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]


def _name(dtype: torch.dtype) -> str:
    return re.sub(r"^torch\.", "", str(dtype))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    files = wanted()
    check = parser.parse_args().check
    for path in behind(files):
        if check:
            print(f"{path.relative_to(ROOT)} is behind: run python -m benchmarks.gallery", file=sys.stderr)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(files[path], encoding="utf-8")
    return int(check and bool(behind(files)))


if __name__ == "__main__":
    sys.exit(main())
