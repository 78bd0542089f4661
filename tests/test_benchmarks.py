"""Every benchmark runs once on its tiny specs, the gate refuses wrong values, timings and records hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import report, test_ops
from mage_fast.benchmark import cases, limits, measure, plots, records, tables, timing
from mage_fast.benchmark.cases import Case
from mage_fast.benchmark.gate import Gate, Incorrect
from mage_fast.errors import InputError
from mage_fast.kernels import dispatch

ROOT = Path(__file__).parent.parent
#: For programs that run every op: Triton's interpreter, which the op suite is for, would take minutes; and
#: as one of several test processes pytest-benchmark would not time.
NOT_INTERPRETED = {
    name: value
    for name, value in os.environ.items()
    if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_XDIST")
}


def case_of(op: str, name: str = "tiny", direction: str = "fwd") -> Case:
    spec = next(spec for spec in cases.specs(op, "cpu", smoke=True) if spec.name == name)
    return Case(op, spec, direction, "cpu")


def run(*arguments: str) -> str:
    pytest_quiet = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_quiet, "benchmarks", "--smoke", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=NOT_INTERPRETED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


# Under pytest-benchmark


def test_every_op_has_a_tiny_bench_and_it_runs() -> None:
    every = [parameter.values for parameter in test_ops.PAIRS]
    tiny = [(case, name) for case, name in every if case.spec.name.startswith("tiny")]
    assert {case.op for case, _ in tiny} == set(dispatch.OPS)
    summary = run()
    passed, skipped = (
        int(match[1]) if (match := re.search(rf"(\d+) {word}", summary)) else 0
        for word in ("passed", "skipped")
    )
    assert passed + skipped == len(tiny)
    assert passed >= 2 * len({case for case, _ in tiny}), "the reference and plain PyTorch run everywhere"


def test_records_have_the_documented_fields(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    run("--benchmark-enable", "--benchmark-max-time", "0.05", "--out", str(out), "-k", "philox")
    found = json.loads(out.read_text())
    assert all(tuple(r) == records.FIELDS for r in found)
    kernels = [r for r in found if r["suite"] == "kernels"]
    assert {r["implementation"] for r in kernels} >= {"reference", "torch"}
    for r in kernels:
        assert r["ratio"] == pytest.approx(r["baseline_median_ms"] / r["median_ms"])
        assert r["percent_of_floor"] == pytest.approx(100 * r["floor_ms"] / r["median_ms"])
    assert list(tmp_path.iterdir()) == [out]


# The gate


def bad_norm(branch_TD: torch.Tensor, residual_TD: torch.Tensor, **other: Any) -> tuple:
    out = branch_TD + residual_TD
    return out, F.layer_norm(out, out.shape[-1:], other["weight_D"], other["bias_D"], eps=1e-2)


def bad_step(logits_NC: torch.Tensor, ids_BL: torch.Tensor, **other: Any) -> tuple:
    return logits_NC.argmax(2), ids_BL


def bad_code(x_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x_ND, codebook_KD).argmax(1)


@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [
        ("add_norm", bad_norm, "add_norm/tiny/fwd: result 1 is off by"),
        ("sample_confident", bad_step, "sample_confident/tiny/fwd: result 0 differs"),
        ("nearest_code", bad_code, "nearest_code/tiny/fwd: result 0 is off by"),
        ("bias_gelu", lambda x_TF, **other: x_TF[:, :3], r"result 0 has shape \(5, 3\), wanted \(5, 24\)"),
        ("bias_gelu", lambda x_TF, **other: (x_TF, x_TF), "2 results, the reference has 1"),
        ("bias_gelu", lambda x_TF, **other: x_TF * torch.nan, "is off by nan"),
    ],
)
def test_gate_refuses_wrong_values(
    monkeypatch: pytest.MonkeyPatch, op: str, wrong: Callable, message: str
) -> None:
    monkeypatch.setattr(cases.module(op, "specs"), "baseline", wrong)
    case = case_of(op)
    with pytest.raises(Incorrect, match=message):
        Gate(case, case.inputs()).check("torch")


def test_gate_accepts_another_of_two_equally_near_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("nearest_code")
    inputs = case.inputs()
    inputs["codebook_KD"][4] = inputs["codebook_KD"][0]

    def last_of_equal(x_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
        return 4 - torch.cdist(x_ND, codebook_KD.flip(0)).argmin(1)

    monkeypatch.setattr(cases.module("nearest_code", "specs"), "baseline", last_of_equal)
    Gate(case, inputs).check("torch")


def test_a_wrong_implementation_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.module("add_norm", "specs"), "baseline", bad_norm)
    rows = {row.implementation: row for row in measure.measure(case_of("add_norm"), None, 0.001)}
    wrong = rows["torch"].record()
    assert wrong["correct"] is False
    assert (wrong["median_ms"], wrong["ratio"], wrong["rounds"]) == (None, None, 0)
    assert rows["reference"].timing is not None
    assert rows["reference"].ratio is None, "its baseline is wrong"


def test_peers_draw_their_own_numbers_and_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**inputs: Any) -> torch.Tensor:
        raise RuntimeError("only half precision")

    def its_own_dropout(x_TF: torch.Tensor, bias_F: torch.Tensor, dropout: float, **_: Any) -> torch.Tensor:
        return F.dropout(F.gelu(x_TF + bias_F), dropout)

    peers = {"other": its_own_dropout, "picky": refuses}
    monkeypatch.setattr(cases, "_peers", lambda op: peers)
    rows = {row.implementation: row for row in measure.measure(case_of("bias_gelu"), None, 0.001)}
    assert rows["other"].timing is not None
    assert rows["other"].ratio is not None
    assert (rows["picky"].correct, rows["picky"].reason) == (None, "only half precision")


def test_every_op_has_a_plain_chain() -> None:
    for op in dispatch.OPS:
        assert "torch" in cases.implementations(op, "cpu"), f"{op}/specs.py has no baseline"
        assert "torch.compile" in cases.implementations(op, "cuda")
        assert "torch.compile" not in cases.implementations(op, "cuda", compiled=False)


def test_the_plain_sampling_chain_has_the_law_of_the_op() -> None:
    """It draws numbers of its own, so what the gate cannot see is tested here: which codes, how often."""
    module = cases.module("sample_confident", "specs")
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    inputs = module.Spec("law", 40, 500, 4, 500).inputs()
    inputs |= {"logits_NC": p.log().expand(40, 500, 4), "choice_temperature": 1.0}

    def shares(**options: Any) -> torch.Tensor:
        sampled_BL, _ = module.baseline(**inputs | options)
        return torch.bincount(sampled_BL.flatten(), minlength=4) / sampled_BL.numel()

    torch.manual_seed(0)
    close = {"rtol": 0.0, "atol": 0.02}
    torch.testing.assert_close(shares(), p, **close)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), **close)
    torch.testing.assert_close(shares(top_p=0.65), torch.tensor([4 / 7, 3 / 7, 0, 0]), **close)
    twice = {"guidance_logits_NC": torch.zeros(40, 500, 4), "guidance_scale": 1.0}
    torch.testing.assert_close(shares(**twice), p.square() / p.square().sum(), **close)


# Timing


def test_rounds_alternate() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(runs, "cpu", seconds=0.001)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(calls) == 2 * (2 + len(times["a"].samples_ms))
    assert len(times["a"].samples_ms) >= timing.FEWEST_ROUNDS


def test_quantiles() -> None:
    times = timing.Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0), graph_samples_ms=(2.0, 9.0, 1.0))
    assert (times.quantile_ms(20), times.median_ms, times.quantile_ms(80)) == (2.0, 3.5, 5.0)
    assert times.graph_ms == 2.0


class FakeGPU:
    """The parts of torch.cuda that timing calls; an event's time is the number of calls so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capturable: bool) -> None:
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = len(gpu.log)
                gpu.log.append("event")

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        class Context:
            def __init__(self, *_: object) -> None:
                pass

            def __enter__(self) -> None:
                gpu.log.append("enter")

            def __exit__(self, *_: object) -> None:
                if not capturable:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")

            def wait_stream(self, other: object) -> None:
                pass

        class Graph:
            def replay(self) -> None:
                gpu.log.append("replay")

        fakes = {
            **{"Event": Event, "Stream": Context, "graph": Context, "CUDAGraph": Graph},
            **{"stream": lambda _: torch.no_grad(), "current_stream": Context},
            **{"synchronize": lambda: None, "_sleep": lambda cycles: gpu.log.append("sleep")},
            **{"memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 4 * 2**20},
            "reset_peak_memory_stats": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(8, dtype=dtype))


@pytest.mark.parametrize("capturable", [True, False])
def test_events_surround_each_call_behind_a_sleep(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    gpu = FakeGPU(monkeypatch, capturable=capturable)
    runs = {name: lambda name=name: gpu.log.append(name) for name in ("ours", "theirs")}
    times = timing.interleaved(runs, "cuda", seconds=1e-4, graphed=["ours"])
    a_round = ["sleep"] + ["event", "ours", "event"] * timing.CALLS
    after = len(gpu.log) - gpu.log[::-1].index("sleep") - 1
    first = gpu.log.index("sleep")
    assert gpu.log[first : first + len(a_round)] == a_round
    assert (
        gpu.log[after:] == ["sleep"] + ["event", "replay" if capturable else "theirs", "event"] * timing.CALLS
    )
    assert set(times["ours"].samples_ms) == {2.0}
    assert len(times["ours"].samples_ms) % timing.CALLS == 0
    assert times["ours"].peak_mib == 3.0
    assert times["theirs"].graph_ms is None
    assert times["ours"].graph_ms == (2.0 if capturable else None)
    expected = "" if capturable else "operation not permitted when stream is capturing"
    assert times["ours"].graph_error == expected


def test_limits_are_bytes_and_flops_a_second() -> None:
    found = [
        {"suite": "device", "name": "copy", "shape": {"bytes": 10**9}, "median_ms": 2.0},
        {
            "suite": "device",
            "name": "gemm/float32",
            "shape": {"m": 100, "n": 100, "k": 100},
            "median_ms": 1.0,
        },
    ]
    device = limits.as_device(found)
    assert device is not None
    assert device.bandwidth_bytes_s == 1e12
    assert device.peak_flops == {"float32": 2e9}
    assert limits.as_device(found[:1]) is None
    names = [r["name"] for r in limits.measure("cpu", 0.001, smoke=True)]
    assert names == ["copy", "gemm/bfloat16", "gemm/float32"]


# Records, plots, README


def taken(**changes: Any) -> dict[str, Any]:
    made = {
        "suite": "kernels",
        "name": "add_norm/tiny/fwd",
        "dtype": "float32",
        "shape": {},
        "baseline": "torch",
    }
    made |= {"implementation": "triton", "median_ms": 1.0, "baseline_median_ms": 2.0, "ratio": 2.0}
    return records.complete([made | changes], "cpu")[0]


def test_the_same_measurement_is_replaced_and_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "new" / "records.json"
    records.update(out, [taken(), taken(implementation="reference")])
    records.update(out, [taken(median_ms=3.0)])
    assert [(r["implementation"], r["median_ms"]) for r in records.read(out)] == [
        ("triton", 3.0),
        ("reference", 1.0),
    ]
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json does not hold records"):
        records.update(tmp_path / "list.json", [taken()])
    assert (tmp_path / "list.json").read_text() == "[1]"


def test_plots_are_drawn_from_the_records_alone(tmp_path: Path) -> None:
    measured = records.complete(limits.measure("cpu", 0.001, smoke=True), "cpu")
    known, gone = taken(), taken(name="add_norm/renamed/fwd+bwd")
    drawn = plots.draw([*measured, known, gone], tmp_path / "x.json")
    assert [path.name for path in drawn] == ["x-ratios.png", "x-roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw(measured, tmp_path / "y.json") == []


def test_readme_is_in_step_with_the_results() -> None:
    readme = report.README.read_text(encoding="utf-8")
    assert report.rendered(readme) == readme, "run python -m benchmarks.report"
    full = report.FULL.read_text(encoding="utf-8")
    assert report.rendered(full, short=False) == full, "run python -m benchmarks.report"


def test_readme_table_holds_what_was_compared(tmp_path: Path) -> None:
    made = [taken(), taken(implementation="torch", ratio=1.0), taken(implementation="cpp", ratio=None)]
    (tmp_path / "a.json").write_text(json.dumps(made))
    lines = report.table(tmp_path).splitlines()
    assert lines[-1] == "| `add_norm/tiny/fwd` | float32 | triton | 1.000 | torch, 2.000 ms | 2.00 | - |"
    assert len(lines) == 5
    with pytest.raises(ValueError, match="no markers"):
        report.rendered("# nothing")


def test_the_short_table_has_the_steps_and_the_first_shape_of_each_op() -> None:
    names = ["a/x/fwd", "a/x/fwd+bwd", "a/y/fwd", "b/x/fwd"]
    made = [
        {"suite": "kernels", "name": name, "dtype": dtype, "implementation": implementation, "ratio": 2.0}
        for dtype in ("float32", "bfloat16")
        for name in names
        for implementation in ("reference", "cpp")
    ]
    made.append({"suite": "train", "name": "s", "dtype": "float32", "implementation": "m", "ratio": 1.0})
    kept = [(r["name"], r["dtype"], r["implementation"]) for r in tables.summary(made)]
    assert kept == [("a/x/fwd+bwd", "float32", "cpp"), ("b/x/fwd", "float32", "cpp"), ("s", "float32", "m")]
