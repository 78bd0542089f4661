"""``mage-fast bench`` and the script of all GPU checks, on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mage_fast.benchmark import measure, records
from mage_fast.cli import main
from mage_fast.kernels import dispatch
from tests.test_benchmarks import NOT_INTERPRETED, bad_norm

ROOT = Path(__file__).parent.parent
QUICK = ("bench", "--smoke", "--seconds", "0.001", "--device", "cpu")


def test_tables_records_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "records.json"
    assert main([*QUICK, "--op", "philox", "bias_gelu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Measured limits" in printed
    assert "bias_gelu/tiny_no_dropout/fwd+bwd" in printed
    assert str(out) in printed.replace("\n", "")
    found = json.loads(out.read_text())
    assert all(tuple(r) == records.FIELDS for r in found)
    assert {r["name"] for r in found if r["suite"] == "device"} == {"copy", "gemm/bfloat16", "gemm/float32"}
    kernels = [r for r in found if r["suite"] == "kernels"]
    assert {r["name"].split("/")[0] for r in kernels} == {"philox", "bias_gelu"}
    for r in kernels:
        assert r["correct"] is True
        assert r["baseline"] == "torch"
        assert r["ratio"] == pytest.approx(r["baseline_median_ms"] / r["median_ms"])
        assert r["percent_of_floor"] > 0
    assert {path.name for path in out.parent.iterdir()} == {
        *("records.json", "records-ratios.png", "records-roofline.png", "records.html")
    }


def test_a_spec_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "records.json"
    assert main([*QUICK, "--op", "bias_gelu", "--spec", "tiny_no_dropout", "--out", str(out)]) == 0
    names = {r["name"] for r in json.loads(out.read_text()) if r["suite"] == "kernels"}
    assert names == {"bias_gelu/tiny_no_dropout/fwd", "bias_gelu/tiny_no_dropout/fwd+bwd"}


def test_the_ops_in_bfloat16(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    assert main([*QUICK, "--op", "bias_gelu", "--dtype", "bfloat16", "--out", str(out)]) == 0
    assert {r["dtype"] for r in json.loads(out.read_text()) if r["suite"] == "kernels"} == {"bfloat16"}


def test_a_wrong_result_is_red_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mage_fast.kernels.ops.add_norm import specs

    monkeypatch.setattr(specs, "baseline", bad_norm)
    out = tmp_path / "records.json"
    assert main([*QUICK, "--op", "add_norm", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "incorrect: torch, add_norm/tiny/fwd: result 1 is off by" in printed
    wrong = [r for r in json.loads(out.read_text()) if r["correct"] is False]
    assert {r["implementation"] for r in wrong} == {"torch"}
    assert {r["ratio"] for r in wrong} == {None}


@pytest.mark.parametrize("device", ["a100", "h100", "h200"])
def test_the_roofline_of_a_data_sheet_runs_nothing(
    device: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "measure", None)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--roofline", device]) == 0
    printed = capsys.readouterr().out
    assert device.upper() in printed
    assert all(f"{op}/" in printed for op in dispatch.OPS)
    assert "tiny" not in printed
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("not records")
    cases = {
        "no op named 'attentoin'; the ops are philox": ("--op", "attentoin"),
        "no spec named 'huge'; there are tiny": ("--op", "philox", "--spec", "huge"),
        "device is 'gpu'": ("--device", "gpu"),
        "device is 'meta', wanted one of cuda, cpu": ("--device", "meta"),
        "seconds is 0.0": ("--seconds", "0"),
        f"{tmp_path} is a folder": ("--out", str(tmp_path)),
        "file is a file, wanted a folder": ("--out", str(file / "records.json")),
        "file does not hold records": ("--out", str(file)),
    }
    for message, options in cases.items():
        assert main([*QUICK, *options]) == 2, message
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("mage-fast: error: ")
        assert message in line
    assert file.read_text() == "not records"


@pytest.mark.parametrize("options", [("--suite", "trains"), ("--roofline", "b300")])
def test_an_unknown_name_is_one_line(options: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *options])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"mage-fast: error: invalid choice '{options[1]}' for argument '{options[0]}'")


@pytest.mark.slow
def test_all_gpu_checks_run_to_the_end_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--smoke", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=NOT_INTERPRETED, capture_output=True, text=True
    )
    said = done.stdout + "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert done.returncode == 0, said[-6000:]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("environment.txt", "correctness.txt", "table.txt"),
        *("results.json", "results-ratios.png", "results-roofline.png", "results-end-to-end.png"),
        "results.html",
    }
    whole = ("train", "generate", "tokenize")
    for step in ("environment", "tests", "gradients", "graphs", "large", *whole, "bench"):
        assert step in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    timed = {r["name"].split("/")[0] for r in found if r["suite"] == "kernels"}
    assert timed == set(dispatch.OPS)
    assert {r["suite"] for r in found if r["ratio"]} >= {"kernels", *whole}
    text = (tmp_path / "correctness.txt").read_text()
    assert "dK" in text
    assert "FAILED" not in text


def test_gpu_checks_that_run_out_of_time_say_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--smoke", "--minutes", "0"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no time left" in done.stdout
