"""Every benchmark runs once on its tiny specs, the gate refuses wrong values, the records are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases

ROOT = Path(__file__).parent.parent
FIELDS = {
    *("suite", "name", "device", "dtype", "shape", "implementation", "baseline", "median_ms"),
    *("baseline_median_ms", "ratio", "floor_ms", "percent_of_floor", "peak_mib", "correct", "rounds"),
    *("versions", "date"),
}


def run(*arguments: str) -> str:
    pytest_quiet = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_quiet, "benchmarks", "--smoke", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_every_op_has_a_tiny_bench_and_it_runs() -> None:
    every = cases.cases()
    tiny = [case for case in every if case.spec.name.startswith("tiny")]
    assert {case.op for case in tiny} == {case.op for case in every}
    assert f"{len(tiny)} passed" in run()


def test_records_have_the_documented_fields(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    run("--benchmark-enable", "--benchmark-max-time", "0.05", "--out", str(out), "-k", "philox")
    records = json.loads(out.read_text())
    assert {r["implementation"] for r in records} >= {"reference"}
    for r in records:
        assert set(r) == FIELDS
        assert r["ratio"] == pytest.approx(r["baseline_median_ms"] / r["median_ms"])
    assert list(tmp_path.iterdir()) == [out]


def test_gate_refuses_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from mage_fast.kernels.ops.add_norm import specs

    def wrong(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = inputs["branch_TD"] + inputs["residual_TD"]
        normed = torch.nn.functional.layer_norm(
            out, out.shape[-1:], inputs["weight_D"], inputs["bias_D"], eps=1e-2
        )
        return out, normed

    monkeypatch.setattr(specs, "baseline", wrong, raising=False)
    spec = next(spec for spec in specs.SPECS if spec.dropout == 0)
    case = cases.Case("add_norm", spec, "torch", "fwd")
    with pytest.raises(AssertionError, match=r"add_norm/.*result 1 is off"):
        cases.check(case)
