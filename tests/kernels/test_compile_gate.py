"""The compile gate: what turns it red, and a run. Compiling needs triton without its interpreter, which
the tests' process has chosen, so it happens in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import compile_gate
from benchmarks.compile_gate import Compiled
from benchmarks.launches import launches_of

ROOT = Path(__file__).parents[2]
COMPILE_TOYS = """
import json, torch
from benchmarks.compile_gate import compile_launch
from benchmarks.launches import Launch
from tests.kernels import toy_kernels

def compiled(kernel, constants, **options):
    arguments = (torch.float32, torch.float32, *constants)
    launch = Launch("toy", "spec", "float32", 90, kernel, arguments, tuple(options.items()), (1,))
    row = compile_launch(launch)
    return {"green": row.green, **vars(row)}

def key(arch, *arguments):
    return Launch("toy", "spec", "float32", arch, toy_kernels.corners, arguments, (), (1,)).key

base = (torch.int64, 16, 32, 48, 64, 1)
assert key(90, *base) == key(90, torch.int64, 32, 32, 48, 64, 1)
assert key(90, *base) != key(80, *base)
assert key(90, *base) != key(90, torch.int64, 17, 32, 48, 64, 1)
sizes = [(torch.int64, torch.int64, size) for size in (64, 128)]
assert len({Launch("toy", "", "", 90, toy_kernels.spills, size, (), (1,)).key for size in sizes}) == 2
print(json.dumps({
    "spills": compiled(toy_kernels.spills, (16384,), num_warps=1),
    "enough registers": compiled(toy_kernels.spills, (16384,), num_warps=8),
    "no tensor cores": compiled(toy_kernels.product, (64, "ieee"), num_warps=4),
    "tensor cores": compiled(toy_kernels.product, (64, "tf32"), num_warps=4),
}))
"""


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )


def test_toy_kernels(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", COMPILE_TOYS)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows["spills"]["spills"] > 0
    assert rows["enough registers"]["spills"] == 0
    assert rows["no tensor cores"]["matrix"]
    assert rows["no tensor cores"]["matrix_instructions"] == 0
    assert rows["tensor cores"]["matrix_instructions"] > 0
    green = [name for name, row in rows.items() if row["green"]]
    assert green == ["enough registers", "tensor cores"]


def test_a_run_is_green_and_writes_its_tables(tmp_path: Path) -> None:
    rows_file, page = tmp_path / "rows.json", tmp_path / "kernels.md"
    page.write_text("before\n<!-- compile gate: begin -->\nold\n<!-- compile gate: end -->\nafter\n")
    command = ("-m", "benchmarks.compile_gate", "--op", "philox", "bias_gelu", "--arch", "90")
    done = run(tmp_path, *command, "--out", str(rows_file), "--markdown", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(rows_file.read_text())
    assert {(row["op"], row["arch"]) for row in rows} == {("philox", 90), ("bias_gelu", 90)}
    assert f"{len(rows)} compiled, 0 red" in done.stdout
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert any(line.startswith("| bias_gelu |") for line in lines)


def test_a_launcher_that_reads_a_value_fails() -> None:
    class Spec:
        name = "spec"

        def inputs(self) -> dict:
            return {"x": torch.ones(3)}

    def reads(x: Tensor, implementation: str) -> Tensor:
        return x * x.sum().item()

    with pytest.raises(Exception, match="_local_scalar_dense"):
        list(launches_of("toy", reads, Spec(), None, (90,)))


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "wanted"),
    [
        (90, 32, 4, 0, 1.0),  # 16 blocks of 4 warps
        (90, 128, 4, 0, 0.25),  # 16,384 registers a block: 4 blocks
        (90, 33, 4, 0, 12 / 16),  # 40 registers a thread are taken: 12 blocks of 5,120
        (90, 255, 8, 0, 8 / 64),
        (90, 16, 1, 0, 0.5),  # 32 blocks of one warp
        (80, 32, 4, 100_000, 4 / 64),  # one block's shared memory
        (90, 32, 4, 76_800, 3 * 4 / 64),
        (90, 32, 4, 232_448, 4 / 64),  # all that a block can have
        (90, 32, 4, 232_449, 0.0),
    ],
)
def test_occupancy(arch: int, registers: int, warps: int, shared: int, wanted: float) -> None:
    assert compile_gate.occupancy(arch, registers, warps, shared) == wanted


ROW = Compiled(
    op="toy", kernel="kernel", spec="spec", dtype="bfloat16", arch=90, constants="ROWS=4", programs=2,
    warps=4, stages=3, registers=32, spills=0, shared_bytes=0, instructions=100, matrix=True,
    matrix_instructions=1, occupancy=1.0,
)  # fmt: skip


@pytest.mark.parametrize("change", [{"spills": 1}, {"occupancy": 0.0}, {"matrix_instructions": 0}])
def test_what_is_red(change: dict) -> None:
    assert ROW.green
    assert not replace(ROW, **change).green


def test_table_shows_a_row_once() -> None:
    rows = [ROW, replace(ROW, spec="other"), replace(ROW, instructions=101)]
    assert compile_gate.table(rows).row_count == 2


def test_markdown_holds_a_row_a_tile_and_counts_the_rest() -> None:
    rows = [
        ROW,
        replace(ROW, programs=9, registers=40),
        replace(ROW, dtype="float32", registers=99, spills=1),
        replace(ROW, arch=80),
        replace(ROW, spec="small", constants="ROWS=1"),
    ]
    text = compile_gate.markdown(rows)
    assert "| toy | kernel | ROWS=4 | 4 | 40 | 0 | 0 | 100 | 1 | 100% |" in text
    assert text.count("| toy |") == 1
    assert "- sm_90, float32: 1 compiled, 1 red, at most 99 registers a thread" in text
    assert "- sm_80, bfloat16: 1 compiled, 0 red" in text


def test_markdown_wants_its_markers(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("text")
    with pytest.raises(ValueError, match="has no lines <!-- compile gate: begin -->"):
        compile_gate.write_markdown(tmp_path / "page.md", "table")
