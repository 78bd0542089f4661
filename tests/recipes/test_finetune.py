"""``mage-fast finetune`` on digits: what it leaves, how it resumes, what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mage_fast import MAGE, MAGEClassifier, MAGEConfig
from mage_fast.cli import main
from mage_fast.errors import InputError
from mage_fast.recipes import tokenize
from mage_fast.recipes.finetune import RECIPES, FinetuneConfig, FinetuneRecipe, _Finetuning, run
from mage_fast.recipes.pictures import read_metrics
from mage_fast.training import augment
from mage_fast.training.checkpoints import read_part
from mage_fast.training.data import Batch
from mage_fast.training.sources import DigitsSource

#: Steps of a run: 5 of 256 digits an epoch.
STEPS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing: 16 x 16 pixels, 4 x 4 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    MAGE(MAGEConfig.tiny()).save_pretrained(folder)
    return folder


def configuration(model: Path, out: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {"epochs": 2, "warmup_epochs": 1, "batch_size": 256, "log_every": 1}
    return FinetuneConfig(**{"model": model, "out": out, **values, **changes})


def images(folder: Path, count: int) -> None:
    """Noise, in a colour of the folder."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(len(folder.name))
    for number in range(count):
        pixels = numbers.integers(0, 256, (20, 24, 3)) * numbers.random(3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes of 25, of which 5 each are held out."""
    folder = tmp_path_factory.mktemp("pictures")
    images(folder / "cats", 25)
    images(folder / "horses", 25)
    return f"folder:{folder}"


#: All that is random, at once; 5 steps an epoch.
RANDOM: dict[str, Any] = {
    **{
        "batch_size": 8,
        "mixup": 0.8,
        "cutmix": 1.0,
        "drop_path": 0.4,
        "rand_augment": "rand-m9-mstd0.5-inc1",
    },
    **{"seed": 3, "precision": "bf16"},
}


def test_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it says is true of what it leaves: losses, rates, accuracies and the classifier."""
    out = tmp_path / "run"
    arguments = ("finetune", "--model", model, "--out", out, "--epochs", 2, "--batch-size", 256)
    options = ("--warmup-epochs", 1, "--base-lr", 4e-3, "--log-every", 1, "--seed", 1)
    assert main([str(x) for x in (*arguments, *options)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == told["total_steps"] == STEPS
    assert told["loss_first"] == pytest.approx(np.log(10), abs=1e-3)
    assert told["loss_last"] < told["loss_first"]

    classifier, source = MAGEClassifier.from_pretrained(out), DigitsSource(image_size=16, split="test")
    pixels = np.stack([np.asarray(source.image(index)) for index in range(len(source))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        log_p = classifier(images).double().log_softmax(1)
    labels = torch.from_numpy(source.labels)
    assert told["test_top1"] == pytest.approx((log_p.argmax(1) == labels).double().mean().item())
    below = (log_p > log_p.gather(1, labels[:, None])).sum(1)  # classes before the right one
    assert told["test_top5"] == pytest.approx((below < 5).double().mean().item())
    assert told["test_loss"] == pytest.approx(-log_p.gather(1, labels[:, None]).mean().item(), rel=1e-5)
    assert told["test_images"] == 359

    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "test_top1" in line] == [5, 10]
    rates = [4e-3 * step / 5 for step in range(5)]
    rates += [1e-6 + (4e-3 - 1e-6) * (1 + np.cos(np.pi * step / 5)) / 2 for step in range(5)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 500
    assert list(out.glob("events.out.tfevents*"))
    assert main([str(x) for x in (*arguments, *options)]) == 0  # it was done
    assert json.loads(capsys.readouterr().out) == told


def test_a_stopped_run_goes_on_to_the_bit(
    model: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in step 3 and again in step 8, with all that is random; in the end nothing shows it."""
    whole, parts = (
        configuration(model, tmp_path / name, data=pictures, **RANDOM) for name in ("whole", "parts")
    )
    wanted = run(whole)
    own_step = _Finetuning._train_step

    def stopping(self: _Finetuning, batches: list[Batch], step: int) -> Mapping[str, Any]:
        if step in (2, 7):
            os.kill(os.getpid(), signal.SIGINT)
        return own_step(self, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(_Finetuning, "_train_step", stopping)
        assert run(parts)["stopped_by"] == "Ctrl-C"
        assert not (parts.out / "model.safetensors").exists()
        # where things lie and how often they are looked at may change
        moved = tmp_path / "moved"
        moved.symlink_to(model)
        assert run(dataclasses.replace(parts, model=moved, workers=1))["steps"] == 8
        with pytest.raises(InputError, match="there is no model at nowhere"):
            run(dataclasses.replace(parts, model=Path("nowhere")))
    got = run(parts)
    assert got | {"out": wanted["out"]} == wanted | {"loss_first": got["loss_first"]}
    for part in ("model", "optimizer"):
        states = [read_part(c.out / "checkpoints" / "step-000000010", part) for c in (whole, parts)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    timed = ("time", "steps_per_second", "images_per_second", "data_wait")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(c.out / "metrics.jsonl")]
        for c in (whole, parts)
    ]
    assert lines[0] == lines[1]


def test_from_a_token_cache_with_others_held_out(model: Path, pictures: str, tmp_path: Path) -> None:
    cache = tmp_path / "tokens"
    tokenize.run(tokenize.TokenizeConfig(tokenizer=model, data=pictures, out=cache, split="train"))
    chosen: dict[str, Any] = {"data": f"tokens:{cache}", "test_data": pictures, "epochs": 3, "batch_size": 8}
    told = run(configuration(model, tmp_path / "run", **chosen, evaluate_every=2, accumulate=2))
    assert told["steps"] == 15
    looks = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "test_loss" in line]
    assert looks == [10, 15]  # the last one though three epochs are no multiple of two
    with pytest.raises(InputError, match=r"was made from the train split, wanted test"):
        run(configuration(model, tmp_path / "other", data=f"tokens:{cache}"))
    with pytest.raises(InputError, match=r"mixup 0\.8 and cutmix 0\.0 mix images, and tokens:"):
        run(configuration(model, tmp_path / "other", **chosen, mixup=0.8))
    assert not (tmp_path / "other").exists()


def test_the_papers_recipes_by_width() -> None:
    config = FinetuneConfig()
    base = FinetuneRecipe(100, 5, 1024, 2.5e-4, 0.65, 0.1, 0.8, 1.0, "strong", "rand-m9-mstd0.5-inc1")
    assert config.recipe(MAGEConfig.vit_b()) == base
    large = dataclasses.replace(base, epochs=50, layer_decay=0.75, drop_path=0.2)
    assert config.recipe(MAGEConfig.vit_l()) == config.recipe(MAGEConfig.vit_h()) == large
    assert config.recipe(MAGEConfig.tiny()) == RECIPES[0]
    given = FinetuneConfig(epochs=7, rand_augment="none").recipe(MAGEConfig.vit_b())
    assert given == dataclasses.replace(base, epochs=7, rand_augment="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": -0.1}, "mixup is -0.1, wanted 0 or more"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
        ({"drop_path": 1.0}, "drop_path is 1.0, wanted 0 <= drop_path < 1"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, wanted 0 < layer_decay <= 1"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"base_lr": -1e-3}, "base_lr is -0.001, wanted 0 or more"),
        ({"min_lr": -1.0}, "min_lr is -1.0"),
        ({"label_smoothing": 1.2}, "label_smoothing is 1.2, wanted at most 1"),
        ({"epochs": 0}, "epochs 0"),
        ({"warmup_epochs": 3}, "warmup_epochs 3"),
        ({"accumulate": 3}, "batch_size is 256, wanted a multiple of 3"),
        ({"seed": -1}, "seed is -1, wanted 0 or more"),
        ({"workers": -1}, "workers is -1, wanted 0 or more"),
        ({"evaluate_every": 0}, "evaluate_every is 0, wanted 1 or more"),
        ({"augment": "wild"}, "augment is 'wild'"),
        ({"rand_augment": "m9"}, "rand_augment is 'm9'"),
        ({"data": "digits2"}, "unknown data source"),
    ],
)
def test_wrong_options(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(configuration(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def shard(path: Path, labels: list[int]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            file = io.BytesIO()
            Image.new("RGB", (20, 20), (number * 9, 50, 90)).save(file, "PNG")
            for name, content in (("png", file.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_wrong_data(model: Path, tmp_path: Path) -> None:
    images(tmp_path / "unlabelled", 10)
    images(tmp_path / "one" / "only", 10)
    images(tmp_path / "others" / "cats", 10)
    images(tmp_path / "others" / "dogs", 10)
    shard(tmp_path / "two" / "0.tar", [0, 1] * 10)
    shard(tmp_path / "three" / "0.tar", [0, 1, 2] * 10)
    chosen: dict[str, Any] = {"batch_size": 4}
    for data, test_data, message in (
        ("folder:unlabelled", None, "has 1 class, wanted labelled data"),
        ("folder:one", None, "has 1 class, wanted labelled data"),
        ("digits", "folder:others", "has the classes 0, 1, 2, 3, 4, ..., folder:.* cats, dogs"),
        ("webdataset:two", "webdataset:three", "has the label 2, wanted those of .*two: 0 to 1"),
    ):
        specs = {
            name: None if spec is None else spec.replace(":", f":{tmp_path}/")
            for name, spec in (("data", data), ("test_data", test_data))
        }
        with pytest.raises(InputError, match=message):
            run(configuration(model, tmp_path / "run", **chosen | specs))
    assert not (tmp_path / "run").exists()


def test_other_runs_and_other_models_are_refused(
    model: Path,
    pictures: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    first = configuration(model, out, data=pictures, epochs=1, batch_size=40)
    run(first)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"holds a run with layer_decay 0\.75 and not 0\.5"):
        run(dataclasses.replace(first, layer_decay=0.5))
    MAGE(MAGEConfig.tiny()).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"holds a run with model_fingerprint '"):
        run(dataclasses.replace(first, model=tmp_path / "other"))
    assert (out / "model.safetensors").read_bytes() == before
    arguments = ["finetune", "--out", str(tmp_path / "new"), "--model"]
    assert main([*arguments, str(out)]) == 2
    assert "holds a classifier, wanted the model that it was made of" in capsys.readouterr().err
    for file in (tmp_path / "other").iterdir():
        before = file.read_bytes()
        with pytest.raises(InputError, match=r"other holds a config.json of something else"):
            run(dataclasses.replace(first, model=tmp_path / "other", out=tmp_path / "other"))
        assert file.read_bytes() == before
    augment._rand_augment.cache_clear()
    monkeypatch.setitem(sys.modules, "timm.data", None)
    assert main([*arguments, str(model), "--rand-augment", "rand-m9"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'mage-fast[finetune]'" in error
    assert not (tmp_path / "new").exists()
