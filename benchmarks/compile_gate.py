"""The compile gate: every Triton kernel, as it is launched at the real shapes, compiled without a GPU.

The launchers run on fake tensors (so a launcher that reads a value, that is waits for the GPU, fails here)
and their launches are recorded and compiled for each architecture. From the machine code come registers,
spills, shared memory and the count of tensor-core instructions.

    python -m benchmarks.compile_gate [--arch 80 90 100] [--op attention] [--out FILE] [--markdown FILE]

The gate is red, and the exit status 1, if a kernel spills, if not one of its programs fits on a
multiprocessor, or if a kernel with a matrix product holds no HGMMA instruction on sm_90 (HMMA on sm_80,
UTCHMMA on sm_100).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from benchmarks.launches import Launch, launches
from mage_fast.kernels import dispatch

ARCHITECTURES = (80, 90, 100)
#: The instructions by which a matrix product runs on tensor cores.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
#: Of one multiprocessor: shared memory in bytes, threads; 65,536 registers on all.
SHARED_MEMORY = {80: 167_936, 90: 233_472, 100: 233_472}
REGISTERS, THREADS, BLOCKS = 65_536, 2048, 32
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a launch holds."""

    op: str
    kernel: str
    spec: str
    dtype: str
    arch: int
    constants: str
    programs: int
    warps: int
    stages: int
    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    matrix: bool
    matrix_instructions: int
    occupancy: float

    @property
    def green(self) -> bool:
        tensor_cores = self.matrix_instructions > 0 or not self.matrix
        return self.spills == 0 and self.occupancy > 0 and tensor_cores


class _Driver:
    """Stands in for a GPU of the architecture: Triton compiles for it and launches nothing."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch) -> Compiled:
    """Compile one launch and read its machine code."""
    arch = launch.arch
    triton.runtime.driver.set_active(_Driver(arch))
    args = tuple(map(MockTensor.wrap_dtype, launch.args))
    kwargs = {name: MockTensor.wrap_dtype(x) for name, x in launch.kwargs}
    kernel = launch.kernel.run(*args, grid=launch.grid, warmup=True, **kwargs)
    code = disassemble(kernel.asm["cubin"])
    # a wait for or a hint about tensor-core work is no product
    matrix = re.findall(rf"\b{MATRIX_INSTRUCTION[arch]}\b", code.text)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    names = launch.kernel.arg_names
    bound = dict(zip(names, launch.args, strict=False)) | dict(launch.kwargs)
    constants = {p.name: bound[p.name] for p in launch.kernel.params if p.is_constexpr and p.name in bound}
    return Compiled(
        op=launch.op, kernel=launch.kernel.fn.__name__.lstrip("_"), spec=launch.spec, dtype=launch.dtype,
        arch=arch, constants=" ".join(f"{name}={_short(value)}" for name, value in constants.items()),
        programs=launch.programs, warps=warps, stages=kernel.metadata.num_stages,
        registers=code.registers, spills=code.spills, shared_bytes=shared, instructions=code.instructions,
        matrix="tt.dot" in kernel.asm["ttir"], matrix_instructions=len(matrix),
        occupancy=occupancy(arch, code.registers, warps, shared),
    )  # fmt: skip


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value).removeprefix("torch.")


@dataclass(frozen=True)
class Code:
    registers: int
    spills: int
    instructions: int
    text: str


def disassemble(cubin: bytes) -> Code:
    """Registers a thread, local loads and stores (spills), instructions and text of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        text = _run(_TOOLS / "cuobjdump", "--dump-sass", file.name)
    instructions = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE
    )
    local = sum(op.split(".")[0] in ("STL", "LDL") for op in instructions)
    stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    padding = sum(op == "NOP" for op in instructions)
    return Code(registers, max(local, stack), len(instructions) - padding, "\n".join(instructions))


def _run(*command: Any) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def occupancy(arch: int, registers: int, warps: int, shared: int) -> float:
    """Resident warps over the most that fit: registers come in 256s a warp, a block takes 1 KiB more.

    0 if not even one block fits.
    """
    a_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        REGISTERS // (a_warp * warps), SHARED_MEMORY[arch] // (shared + 1024), THREADS // (32 * warps), BLOCKS
    )
    return blocks * warps * 32 / THREADS


_pending: list[Launch] = []


def _compile_index(index: int) -> Compiled:
    return compile_launch(_pending[index])


def gate(
    ops: Iterable[str] = dispatch.OPS, architectures: Iterable[int] = ARCHITECTURES
) -> tuple[list[Compiled], list[str]]:
    """Compile every launch of the ops for every architecture, on all cores; and what was declined."""
    _pending[:], declined = launches(ops, architectures)
    indices = range(len(_pending))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        done = pool.map(_compile_index, indices)
        console = Console(stderr=True)
        return list(track(done, "compiling", len(_pending), console=console)), declined


def table(rows: list[Compiled]) -> Table:
    out = Table(
        "op", "kernel", "dtype", "constants", "sm", "warps", "regs", "spills", "shared", "instr.", "matrix",
        "occ.",
    )  # fmt: skip
    cells = {}  # rows that differ in nothing that is shown are shown once
    for row in rows:
        matrix = str(row.matrix_instructions) if row.matrix else "-"
        cells[
            row.op, row.kernel, row.dtype, row.constants, str(row.arch), str(row.warps), str(row.registers),
            str(row.spills), str(row.shared_bytes), str(row.instructions), matrix, f"{row.occupancy:.0%}",
        ] = row.green  # fmt: skip
    for texts, green in cells.items():
        out.add_row(*texts, style=None if green else "red")
    return out


_BEGIN, _END = "<!-- compile gate: begin -->", "<!-- compile gate: end -->"


def markdown(rows: list[Compiled], arch: int = 90) -> str:
    """The kernels on one architecture in bfloat16 (or their only dtype): a row a kernel and tile, at the
    real shape of the most programs. The other dtypes and architectures have a line each below.
    """
    tiles: dict[tuple, Compiled] = {}
    for row in rows:
        key = (row.op, row.kernel, row.constants)
        real = not row.spec.startswith("small")  # shapes for the tests only
        if real and row.arch == arch and row.dtype not in ("float16", "float32"):
            tiles[key] = max(tiles.get(key, row), row, key=lambda r: r.programs)
    head = (
        "op", "kernel", "tile", "warps", "registers", "spills", "shared bytes", "instructions",
        MATRIX_INSTRUCTION[arch], "occupancy",
    )  # fmt: skip
    lines = [f"sm_{arch}:", "", _cells(head), _cells(["---"] * 3 + ["---:"] * 7)]
    for row in tiles.values():
        numbers = (row.warps, row.registers, row.spills, row.shared_bytes, row.instructions)
        matrix = row.matrix_instructions if row.matrix else ""
        lines.append(_cells((row.op, row.kernel, row.constants, *numbers, matrix, f"{row.occupancy:.0%}")))
    lines.append("")
    groups: dict[tuple[int, str], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.arch, row.dtype), []).append(row)
    for (number, dtype), group in sorted(groups.items()):
        most, red = max(row.registers for row in group), sum(not row.green for row in group)
        lines.append(
            f"- sm_{number}, {dtype}: {len(group)} compiled, {red} red, at most {most} registers a thread"
        )
    return "\n".join(lines)


def _cells(values: Iterable[Any]) -> str:
    return "| " + " | ".join(str(value) for value in values) + " |"


def write_markdown(file: Path, text: str, begin: str = _BEGIN, end: str = _END) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: a file without the markers.
    """
    before, found, rest = file.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{file} has no lines {begin} and {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--op", nargs="*", default=dispatch.OPS, choices=dispatch.OPS)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the table between the file's markers")
    options = parser.parse_args()
    rows, declined = gate(options.op, options.arch)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        write_markdown(options.markdown, markdown(rows))
    for line in declined:
        print(f"declined: {line}")
    red = [row for row in rows if not row.green]
    print(f"{len(rows)} compiled, {len(red)} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
