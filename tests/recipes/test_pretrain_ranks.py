"""``mage-fast pretrain`` under torchrun: equal to one process, resumed by other numbers, bereft of one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.recipes import pretrain, train_tokenizer
from mage_fast.recipes.pictures import read_metrics
from mage_fast.recipes.pretrain import CheckpointChoices, ContrastiveChoices, ProcessChoices
from mage_fast.training.checkpoints import read_part, read_state
from tests.recipes.test_flow import SIZE

ROOT = Path(__file__).resolve().parents[2]
#: Steps of a run: 5 of 256 digits an epoch.
STEPS = 10

#: The command line, whose rank 1 kills itself as step 7 begins, if told to.
SCRIPT = """
import os, signal, sys
import torch
from mage_fast import cli
from mage_fast.recipes.pretrain import _Pretraining
torch.set_num_threads(1)
if sys.argv[1] == "dies":
    train_step = _Pretraining._train_step
    def dying(self, batches, step):
        if step == 7 and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, batches, step)
    _Pretraining._train_step = dying
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    train_tokenizer.run(train_tokenizer.TrainTokenizerConfig(model=SIZE, out=out, steps=4, batch_size=16))
    return out


def configuration(tokenizer: Path, out: Path, **changes: Any) -> pretrain.PretrainConfig:
    values = {"tokenizer": tokenizer, "out": out, "epochs": 2, "warmup_epochs": 1, "batch_size": 256}
    return pretrain.PretrainConfig(**{"base_lr": 1e-3, "ema_decay": 0.9, **values, **changes})


def arguments(tokenizer: Path, out: Path, *more: object) -> list[str]:
    """The command line of :func:`configuration`."""
    own = ("--tokenizer", tokenizer, "--out", out, "--epochs", 2, "--warmup-epochs", 1, "--batch-size", 256)
    return [str(x) for x in ("pretrain", *own, "--base-lr", 1e-3, "--ema-decay", 0.9, *more)]


def torchrun(tmp_path: Path, how: str, *command: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), how, *command),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, error = process.communicate(timeout=300)
    return out, error


def parameters(path: Path, part: str = "model") -> dict[str, Tensor]:
    return {k: v for k, v in read_part(path, part).items() if not k.startswith("tokenizer.")}


def last(out: Path) -> Path:
    return out / "checkpoints" / f"step-{STEPS:09d}"


def assert_near(got: Path, wanted: Path) -> None:
    """Adam divides gradients by their size, so rounding in the smallest grows to part of a step."""
    for part in ("model", "ema"):
        torch.testing.assert_close(parameters(got, part), parameters(wanted, part), rtol=1e-3, atol=3e-4)


@pytest.fixture(scope="module")
def alone(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that computes two micro-batches a step."""
    out = tmp_path_factory.mktemp("alone") / "run"
    pretrain.run(configuration(tokenizer, out, processes=ProcessChoices(accumulate=2)))
    return out


def test_two_processes_equal_one(tokenizer: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = torchrun(tmp_path, "lives", *arguments(tokenizer, out, "--log-every", 5))
    said, error = finished(process)
    assert process.returncode == 0, error
    result = json.loads(said)  # once, and not by each
    assert (result["steps"], result["skipped_steps"]) == (STEPS, 0)
    assert_near(last(out), last(alone))
    first, wanted = (read_metrics(path / "metrics.jsonl")[0] for path in (out, alone))
    assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert first["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-5)
    assert (out / "samples.png").exists()
    assert (out / "ema" / "model.safetensors").exists()


def test_a_stopped_run_goes_on_with_other_processes(tokenizer: Path, alone: Path, tmp_path: Path) -> None:
    """FSDP2 and sharded checkpoints in two processes, SIGTERM, then one process that has it all."""
    out = tmp_path / "run"
    more = ("--processes.parallel", "fsdp", "--checkpoints.sharded", "--checkpoints.every", 1)
    process = torchrun(tmp_path, "lives", *arguments(tokenizer, out, *more))
    while not list(out.glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = finished(process)
    assert process.returncode != 0
    newest = max(out.glob("checkpoints/step-*"))
    stopped_after = read_state(newest).step
    if stopped_after < STEPS:  # else it was done before the signal came
        assert f"SIGTERM: stopped after step {stopped_after} of {STEPS}; the state is saved" in error
    assert len(list(newest.glob("*.safetensors"))) == 2
    result = pretrain.run(configuration(tokenizer, out, processes=ProcessChoices(accumulate=2)))
    assert result["steps"] == STEPS
    assert_near(last(out), last(alone))


def test_survivors_of_a_killed_process_stop_and_the_run_resumes(
    tokenizer: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = torchrun(tmp_path, "dies", *arguments(tokenizer, out, "--checkpoints.every", 3))
    _, error = finished(process)
    assert process.returncode != 0
    assert "mage-fast: error: rank 1 of 2 (this is rank 0) died or hangs: it does not answer" in error
    assert max(out.glob("checkpoints/step-*")).name == "step-000000006"
    pretrain.run(configuration(tokenizer, out, processes=ProcessChoices(accumulate=2)))
    assert_near(last(out), last(alone))


def test_bad_combinations_are_refused_before_any_work(tokenizer: Path, tmp_path: Path) -> None:
    for changes, error in (
        ({"batch_size": 255, "processes": ProcessChoices(accumulate=2)}, "255, wanted a multiple of 2"),
        (
            {"contrastive": ContrastiveChoices(enabled=True), "processes": ProcessChoices(accumulate=2)},
            "contrastive with processes.accumulate 2, wanted 1",
        ),
        ({"processes": ProcessChoices(accumulate=0)}, "processes.accumulate is 0, wanted 1 or more"),
        ({"processes": ProcessChoices(timeout=math.nan)}, "processes.timeout is nan, wanted 1 or more"),
        ({"graph": True, "processes": ProcessChoices(accumulate=2)}, "graph with processes.accumulate 2"),
        ({"max_skipped": 0}, "max_skipped is 0, wanted 1 or more"),
        ({"log_every": 0}, "log_every is 0, wanted 1 or more"),
        ({"checkpoints": CheckpointChoices(keep_last=0)}, "keep_last 0"),
        ({"ema_decay": 1.0}, r"decay is 1.0, wanted 0 <= decay < 1"),
        ({"resume": tmp_path / "nowhere"}, "there is no checkpoint"),
        (
            {"batch_size": None, "preset": "vit_b", "processes": ProcessChoices(accumulate=1500)},
            "digits has 1438 items, wanted at least batch_size 1500",
        ),
    ):
        with pytest.raises(InputError, match=error):
            pretrain.run(configuration(tokenizer, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
