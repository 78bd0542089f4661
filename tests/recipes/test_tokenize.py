"""The token cache's recipe: processes, kills, and what bf16 costs in agreement."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mage_fast import VQGAN
from mage_fast.cli import main
from mage_fast.config import MAGEConfig, TokenizerConfig
from mage_fast.errors import InputError
from mage_fast.recipes import train_tokenizer
from mage_fast.recipes.tokenize import TokenizeConfig, run
from mage_fast.training.processes import in_processes
from mage_fast.training.token_cache import TokenCache


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "tokenizer"
    torch.manual_seed(0)
    assert MAGEConfig.tiny().tokenizer is not None
    tokenizer = VQGAN(MAGEConfig.tiny().tokenizer)
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    tokenizer.save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def command(*arguments: object) -> Iterator[subprocess.Popen]:
    """A verb in a process of its own, killed at the end of the block where it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "mage_fast.cli", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until the condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def test_bf16_agrees_with_fp32_on_a_trained_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = TokenizerConfig(
        image_size=16,
        codebook_size=64,
        codebook_dim=8,
        base_width=8,
        width_multipliers=(1, 1, 2),
        blocks_per_level=1,
        norm_groups=8,
    )
    tokenizer = tmp_path / "tokenizer"
    trained = train_tokenizer.run(
        train_tokenizer.TrainTokenizerConfig(model=size, out=tokenizer, steps=100, log_every=50)
    )
    assert trained["codes_used"] > 40
    common = {"tokenizer": tokenizer, "split": "test"}
    exact = run(TokenizeConfig(**common, out=tmp_path / "fp32"))  # type: ignore[arg-type]
    result = run(TokenizeConfig(**common, out=tmp_path / "bf16", precision="bf16", batch_size=359))  # type: ignore[arg-type]
    ids = [TokenCache(tmp_path / name).batch(range(359)) for name in ("fp32", "bf16")]
    agreement = float((ids[0] == ids[1]).mean())
    with capsys.disabled():
        print(f"\nids in bf16 that are those of fp32: {agreement:.2%} of {ids[0].size}")
    assert 0.99 <= agreement < 1, "equal everywhere would mean that bf16 was not used"
    assert result["agreement_with_fp32"] == pytest.approx(agreement), "one batch is all of it here"
    assert "agreement_with_fp32" not in exact


def test_processes_write_what_one_writes(untrained: Path, tmp_path: Path) -> None:
    common = {"tokenizer": untrained, "split": "test", "views": 2, "augment": "weak", "shard_size": 100}
    one = TokenizeConfig(**common, out=tmp_path / "one", batch_size=32)  # type: ignore[arg-type]
    two = TokenizeConfig(**common, out=tmp_path / "two", batch_size=32, processes=2)  # type: ignore[arg-type]
    assert run(one) == run(two) == {"items": 359, "views": 2, "bad_files": 0}
    assert files(one.out) == files(two.out)
    assert "weak, seed 0, fp32, of digits" in (one.out / "index.json").read_text()
    with pytest.raises(InputError, match=r"begun with augmentation 'weak, seed 0.*wanted 'weak, seed 1"):
        run(TokenizeConfig(**common, out=tmp_path / "two", seed=1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="begun with views 2, wanted 3"):
        run(TokenizeConfig(**common | {"views": 3}, out=tmp_path / "two"))  # type: ignore[arg-type]
    assert files(one.out) == files(two.out)


@pytest.mark.slow
def test_killed_at_random_it_goes_on(untrained: Path, tmp_path: Path) -> None:
    options: tuple[object, ...] = (
        *("tokenize", "--tokenizer", untrained, "--augment", "weak", "--views", 2),
        *("--shard-size", 40, "--batch-size", 10),
    )
    assert main([str(option) for option in (*options, "--out", tmp_path / "whole")]) == 0
    whole = files(tmp_path / "whole")
    out = tmp_path / "broken"
    done: dict[Path, tuple[int, int]] = {}
    for processes in (2, 1, 3):
        before = len(list(out.glob("shard-*")))
        wanted = before + random.randrange(1, 8)
        with command(*options, "--out", out, "--processes", processes) as process:
            wait_until(lambda wanted=wanted: len(list(out.glob("shard-*"))) >= wanted, process)  # type: ignore[misc]
            time.sleep(random.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        now = {path: path.stat() for path in out.glob("*-?????.*")}
        assert all((now[path].st_ino, now[path].st_mtime_ns) == stamp for path, stamp in done.items())
        finished = {path.stem[-5:] for path in out.glob("shard-*.json")}
        assert len(finished) >= wanted
        done = {
            path: (stat.st_ino, stat.st_mtime_ns) for path, stat in now.items() if path.stem[-5:] in finished
        }
    assert main([str(option) for option in (*options, "--out", out, "--processes", 2)]) == 0
    assert files(out) == whole, "to the byte, with no temporary file left"
    kept = [path for path in done if path.suffix == ".bin"]
    assert kept
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == done[path] for path in kept)


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_work(untrained: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", untrained, "--split", "test", "--shard-size", 60)
    assert main([str(o) for o in ("tokenize", *options, "--out", tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    verb = ["-m", "mage_fast.cli", "tokenize", *map(str, options), "--out", str(tmp_path / "two")]
    done = subprocess.run([*launch, *verb], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")


def fail(number: int, error: str) -> int:
    if error == "input":
        raise InputError(f"call {number} is wrong")
    if error == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if error == "slow":
        time.sleep(3600)
    return number * number


def test_calls_in_processes_end_together() -> None:
    assert in_processes(fail, [(2, ""), (3, "")]) == [4, 9]
    with pytest.raises(InputError, match="call 7 is wrong"):
        in_processes(fail, [(6, "slow"), (7, "input")])
    with pytest.raises(ChildProcessError, match="process 1 of 2 died with exit code -9"):
        in_processes(fail, [(6, "killed"), (7, "slow")])


def test_damaged_images_are_counted_once_over_processes(untrained: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in (1, 4):
        (folder / f"{number}.png").write_bytes(b"not an image")
    common = {"data": f"folder:{folder}", "tokenizer": untrained, "shard_size": 2, "batch_size": 4}
    one = TokenizeConfig(**common, out=tmp_path / "one")  # type: ignore[arg-type]
    two = TokenizeConfig(**common, out=tmp_path / "two", processes=2)  # type: ignore[arg-type]
    assert run(one) == run(two) == {"items": 8, "views": 1, "bad_files": 2}
    assert files(one.out) == files(two.out)
