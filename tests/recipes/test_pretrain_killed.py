"""A run that is killed again and again ends as the unbroken one, to the bit."""

from __future__ import annotations

import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mage_fast.recipes import pretrain
from mage_fast.recipes.pictures import read_metrics
from mage_fast.training.checkpoints import read_part, read_state
from tests.ranks import FORKS
from tests.recipes.test_pretrain_ranks import configuration, last, tokenizer  # noqa: F401 (a fixture)

KILLS = 20


def life(config: pretrain.PretrainConfig) -> None:
    torch.set_num_threads(1)
    pretrain.run(config)


def started(config: pretrain.PretrainConfig) -> BaseProcess:
    process = FORKS.Process(target=life, args=(config,))
    process.start()
    return process


def test_killed_twenty_times_ends_as_the_unbroken_run(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """Half of the kills come at random, half while a checkpoint is being written."""
    choices: dict[str, Any] = {"checkpoints": pretrain.CheckpointChoices(every=1), "log_every": 1}
    whole, broken = (configuration(tokenizer, tmp_path / name, **choices) for name in ("whole", "broken"))
    start = time.monotonic()
    process = started(whole)
    process.join()
    seconds = time.monotonic() - start
    assert process.exitcode == 0
    generator, written, resumed = random.Random(0), 0, set()
    checkpoints = broken.out / "checkpoints"
    for kill in range(KILLS):
        process = started(broken)
        if kill % 2:
            process.join(generator.uniform(0.0, 0.5) * seconds)
        else:
            while process.is_alive() and not list(checkpoints.glob(".step-*.tmp")):
                time.sleep(0.0005)
        process.kill()
        process.join()
        written += bool(list(checkpoints.glob(".step-*")))
        resumed |= {read_state(path).step for path in checkpoints.glob("step-*")}
    assert written  # some died with a checkpoint half written
    assert len(resumed) > 1
    process = started(broken)
    process.join()
    assert process.exitcode == 0
    for part in ("model", "optimizer", "ema"):
        got, wanted = (read_part(last(config.out), part) for config in (broken, whole))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    logs = [read_metrics(config.out / "metrics.jsonl") for config in (broken, whole)]
    losses = [[(line["step"], line["loss"], line["gradient_norm"]) for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert not list(checkpoints.glob(".*"))
    assert (broken.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
