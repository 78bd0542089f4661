"""Every file of ``examples/`` runs as its docstring says, in a folder that is not the checkout."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mage_fast import cli

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What an example prints last, and the files it leaves.
WANTED = {
    "edit_image": ("written: edited.png", {"edited.png"}),
    "export_model": ("away from the model's own", {"encoder.pt2", "step.pt2"}),
    "linear_probe": ("nearest class mean", set()),
    "ops_in_own_model": ("gradient: ", set()),
    "own_tokenizer": ("written: plain.png", {"plain.png", "plain_model"}),
    "train_on_folder": ("samples: out/train_on_folder/samples.png", {"out"}),
}


def run(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_each_says_what_it_is_for_and_how_to_run_it() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == WANTED.keys() | {"accelerate_ddp", "newcomers_hour"}
    for path in EXAMPLES:
        text = path.read_text()
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert f"python examples/{path.name}" in docstring, path
        # tests/test_accelerate_ddp.py runs that one
        assert len(text.splitlines()) <= (180 if path.stem == "newcomers_hour" else 70), path


@pytest.mark.parametrize(
    "name",
    # tests/test_export.py and the next test are as good, in less time
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("export_model", "train_on_folder") else ())
        for x in WANTED
    ],
)
def test_it_runs(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    last, files = WANTED[name]
    assert last in done.stdout.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == files


def test_training_on_a_folder_passes_over_what_is_no_image(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number in range(48):
        path = photos / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (number * 5, 0, 0)).save(path)
    (photos / "0" / "7.png").write_bytes((photos / "0" / "8.png").read_bytes()[:40])
    done = run("train_on_folder", tmp_path, "photos", "made")
    assert done.returncode == 0, done.stderr
    assert "7.png" in done.stderr
    assert (tmp_path / "made/samples.png").is_file()


def test_the_newcomers_hour_wants_a_folder_that_is_there(tmp_path: Path) -> None:
    done = run("newcomers_hour", tmp_path, "--photos", "nowhere")
    assert done.returncode == 1
    assert done.stderr == "newcomers_hour: --photos nowhere: no such folder\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_newcomers_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as each command's start costs seconds; without the demo, which test_flow.py runs."""
    hour = runpy.run_path(str(ROOT / "examples" / "newcomers_hour.py"))
    verbs: list[str] = []

    def mage_fast(verb: str, *options: object) -> None:
        verbs.append(verb)
        if verb != "demo":
            assert cli.main([verb, *map(str, options)]) == 0

    monkeypatch.setitem(hour["main"].__globals__, "mage_fast", mage_fast)
    monkeypatch.setattr(sys, "argv", ["newcomers_hour.py", "--quick"])
    monkeypatch.chdir(tmp_path)
    hour["main"]()
    assert verbs == ["env", "demo", "train-tokenizer", "tokenize", "pretrain", "generate", "edit", "probe"]
    said = capsys.readouterr().out
    made = [line.split(": ")[0] for line in said.split("== Made in this hour")[1].splitlines()[1:-1]]
    assert len(made) == 6  # and the demo's report
    assert all((tmp_path / path).exists() for path in made)
    assert "replaced  (the model)          training step" in said


def test_the_newcomers_hour_shows_a_command_and_ends_with_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    hour = runpy.run_path(str(ROOT / "examples" / "newcomers_hour.py"))
    with pytest.raises(SystemExit, match="mage-fast generate ended with code 2: what it says above is why"):
        hour["mage_fast"]("generate", "--model", "no where")
    said = capfd.readouterr()
    assert said.out == "$ mage-fast generate --model 'no where'\n"
    assert "no where" in said.err
