"""How many bytes the Triton kernels ask memory for, beside the bytes that must move, without a GPU.

    TRITON_INTERPRET=1 python -m benchmarks.traffic [--op attention] [--markdown docs/kernels.md]

Triton's interpreter runs the kernels at the real shapes of a batch of 4 in float16 and counts the bytes of
every load and store whose mask is true ("asked"), and the sectors of 32 bytes that a launch touches, each
once ("touched"): what memory serves if the L2 cache serves the rest. The bytes that must move are those of
the roofline, ``Spec.work``; at a ratio of 1 every input is read once and every result written once. Work
that a launcher leaves to torch is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from triton.runtime import interpreter

from benchmarks.compile_gate import write_markdown
from mage_fast.benchmark.cases import Case, directions, module, tensors
from mage_fast.kernels import dispatch, triton_support

_SECTOR = 32
_BEGIN, _END = "<!-- traffic: begin -->", "<!-- traffic: end -->"


@dataclass(frozen=True)
class Traffic:
    """Of one direction of one spec."""

    op: str
    spec: str
    direction: str
    programs: int
    asked_bytes: int
    touched_bytes: int
    floor_bytes: int
    products: int


class Count:
    """Of the kernels launched so far."""

    def __init__(self) -> None:
        self.programs = self.products = self.bytes = self._touched = 0
        self._sectors: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    @property
    def touched(self) -> int:
        self.end_launch()
        return self._touched

    def end_launch(self) -> None:
        for sectors in self._sectors.values():
            if sectors:
                self._touched += _SECTOR * len(np.unique(np.concatenate(sectors)))
                sectors.clear()

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data.astype(bool)]  # a mask may be of integers
        self.bytes += addresses.size * pointers.get_element_ty().primitive_bitwidth // 8
        self._sectors[kind].append(np.unique(addresses // _SECTOR))


@contextmanager
def counted() -> Iterator[Count]:
    """Counts what the interpreter does inside."""
    count = Count()
    builder = interpreter.InterpreterBuilder
    names = ("create_masked_load", "create_masked_store", "create_dot", "set_grid_idx", "set_grid_dim")
    methods = {name: getattr(builder, name) for name in names}

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count.access("load", pointers, mask)
        return methods["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.access("store", pointers, mask)
        return methods["create_masked_store"](self, pointers, value, mask, *rest)

    def dot(self: Any, *args: Any) -> Any:
        count.products += 1
        return methods["create_dot"](self, *args)

    def program(self: Any, *index: Any) -> Any:
        count.programs += 1
        return methods["set_grid_idx"](self, *index)

    def launch(self: Any, *size: Any) -> Any:
        count.end_launch()
        return methods["set_grid_dim"](self, *size)

    for name, method in zip(names, (load, store, dot, program, launch), strict=True):
        setattr(builder, name, method)
    try:
        yield count
    finally:
        for name, method in methods.items():
            setattr(builder, name, method)


def traffic(op: str, spec: Any, dtype: torch.dtype = torch.float16) -> list[Traffic]:
    """Forward and, where there is one, backward."""
    case = Case(op, spec, "fwd", "cpu")
    inputs = spec.inputs(dtype=dtype) if case.dtype.is_floating_point else case.inputs()
    dtype = dtype if case.dtype.is_floating_point else case.dtype
    with counted() as forward:
        outputs = tensors(case.function("triton")(**inputs))
    counts = {"fwd": forward}
    if "fwd+bwd" in directions(op):
        leaves = [x for x in tensors(inputs) if x.requires_grad]
        outputs = [y for y in outputs if y.requires_grad]
        with counted() as backward:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        counts["bwd"] = backward
    return [
        Traffic(op, spec.name, way, n.programs, n.bytes, n.touched, spec.work(dtype, way).bytes, n.products)
        for way, n in counts.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", default=list(dispatch.OPS), choices=dispatch.OPS)
    parser.add_argument("--markdown", type=Path, help="also write the table between the file's markers")
    options = parser.parse_args()
    if not triton_support.INTERPRETED:
        parser.error("set TRITON_INTERPRET=1: it is read when triton is imported")
    head = ("op", "spec", "direction", "programs", "bytes a program", "asked", "touched", "products")
    table, lines = Table(*head), [head, ("---",) * 3 + ("---:",) * 5]
    for op in options.op:
        for spec in [s for s in module(op, "specs").SPECS if not s.name.startswith(("tiny", "small"))][:2]:
            for row in traffic(op, spec):
                cells = (
                    row.op, row.spec, row.direction, str(row.programs),
                    f"{row.asked_bytes / row.programs:,.0f}", f"{row.asked_bytes / row.floor_bytes:.2f}",
                    f"{row.touched_bytes / row.floor_bytes:.2f}", str(row.products or ""),
                )  # fmt: skip
                table.add_row(*cells)
                lines.append(cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if options.markdown:
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        write_markdown(options.markdown, text, _BEGIN, _END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
