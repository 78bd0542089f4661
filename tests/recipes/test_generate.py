"""Images streamed to disk: killed runs, full disks, what stays in memory."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mage_fast import MAGE, MAGEConfig
from mage_fast.cli import main
from mage_fast.recipes import outputs
from mage_fast.recipes.outputs import PNGWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MAGE(MAGEConfig.tiny()).save_pretrained(folder)
    return folder


def pictures(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[0-9]*.png")}


@pytest.mark.slow
def test_killed_at_random_it_goes_on(model: Path, tmp_path: Path) -> None:
    options = [
        *("generate", "--model", str(model), "--count", "60", "--batch-size", "7"),
        *("--sampler.steps", "3", "--seed", "5"),
    ]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "broken"
    before: dict[Path, tuple[int, int]] = {}
    for _ in range(3):
        wanted = len(before) + random.randrange(1, 18)
        with subprocess.Popen(
            [sys.executable, "-m", "mage_fast.cli", *options, "--out", str(out)], stderr=subprocess.DEVNULL
        ) as process:
            while len(pictures(out)) < wanted and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        after = pictures(out)
        assert len(after) >= wanted
        assert all(after[path] == stamp for path, stamp in before.items()), (
            "a finished image is written again"
        )
        before = after
    (out / ".000059.png.tmp").write_bytes(b"cut")
    assert main([*options, "--out", str(out)]) == 0
    assert all(pictures(out)[path] == stamp for path, stamp in before.items())
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("broken", "whole")
    )
    assert ours == theirs, "to the byte, and no temporary file is left"


def test_a_grid_that_is_missing_is_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a run that was killed after its last image; and a seed that is none leaves nothing."""
    options = ["generate", "--model", str(model), "--count", "2", "--sampler.steps", "1"]
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    whole = (tmp_path / "out" / "grid.png").read_bytes()
    (tmp_path / "out" / "grid.png").unlink()
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "grid.png").read_bytes() == whole
    assert '"new": 0' in capsys.readouterr().out
    assert main([*options, "--seed", str(2**63), "--out", str(tmp_path / "other")]) == 2
    assert f"seed is {2**63}, wanted" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_full_disk_is_one_line_that_names_the_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of a file stands for the end of the disk: writing fails in the same place."""
    options = [
        "generate",
        "--model",
        str(model),
        "--count",
        "12",
        "--batch-size",
        "4",
        "--sampler.steps",
        "2",
    ]
    options += ["--out", str(tmp_path)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = PNGWriter.write

    def full_at_the_second(self: PNGWriter, images: torch.Tensor, paths: list[Path]) -> None:
        written(self, images, paths)
        if paths[0].name == "000000.png":
            self._wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PNGWriter, "write", full_at_the_second)
        try:
            assert main(options) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "File too large" in lines[0]
    assert f"{tmp_path}/00000" in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "generate.json",
        *(f"{n:06d}.png" for n in range(4)),
    }
    assert main(options) == 0
    assert '"new": 8' in capsys.readouterr().out


def test_two_batches_are_in_memory_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that take their time hold the third batch back."""
    gate = threading.Semaphore(0)
    saved: list[int] = []

    def slow(image: torch.Tensor, path: Path) -> None:
        assert gate.acquire(timeout=60)
        saved.append(int(image[0, 0, 0]))

    monkeypatch.setattr(outputs, "save_png", slow)
    accepted: list[int] = []

    def produce(writer: PNGWriter) -> None:
        for batch in range(3):
            images = torch.full((5, 3, 2, 2), batch, dtype=torch.uint8)
            writer.write(images, [tmp_path / f"{batch}-{n}.png" for n in range(5)])
            accepted.append(batch)

    with PNGWriter() as writer:
        producer = threading.Thread(target=produce, args=(writer,))
        producer.start()
        gate.release(4)
        while len(saved) < 4 or not accepted:
            time.sleep(0.001)
        assert accepted == [0], "the second waits for the fifth file of the first"
        gate.release(11)
        producer.join(60)
    assert sorted(saved) == [0] * 5 + [1] * 5 + [2] * 5
    assert accepted == [0, 1, 2]
