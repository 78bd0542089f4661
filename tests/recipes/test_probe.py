"""The linear probe's recipes on a folder of small digits, against a plain loop and against each other."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks import linear_probe as benchmark
from mage_fast.config import MAGEConfig
from mage_fast.errors import CheckpointError, InputError, TrainingError
from mage_fast.model import MAGE
from mage_fast.probe import knn_accuracy, linear_probe
from mage_fast.recipes import tokenize
from mage_fast.recipes.features import FeatureReader, Features, extract_features, open_labelled
from mage_fast.recipes.probe import ProbeConfig, run
from mage_fast.recipes.probe_training import FreshFeatures, HeadChoices, HeadTraining, KeptFeatures
from mage_fast.storage import read_safetensors
from mage_fast.training.data import batches, open_source

CLASSES, IMAGES = 3, 25
HEAD = HeadChoices(epochs=4, warmup_epochs=1, batch_size=16, base_lr=30.0, augment="weak")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``: 25 images of each of three digits; ``model`` and ``other``, tiny ones."""
    folder = tmp_path_factory.mktemp("probe")
    digits = load_digits()
    for label in range(CLASSES):
        (folder / "data" / str(label)).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:IMAGES]):
            image = Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8))
            image.resize((20, 20)).save(folder / "data" / str(label) / f"{number}.png")
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        MAGE(MAGEConfig.tiny()).save_pretrained(folder / name)
    return folder


def config(made: Path, **changes: Any) -> ProbeConfig:
    options = {"model": made / "model", "data": f"folder:{made / 'data'}", "head": HEAD, "device": "cpu"}
    return ProbeConfig(**(options | changes))


def test_the_exact_recipe_is_a_plain_loop(made: Path, tmp_path: Path) -> None:
    """LARS and its schedule, the head and the crops of each epoch, spelled out."""
    found = run(config(made, recipe="exact", out=tmp_path / "exact", batch_size=8))
    model = MAGE.from_pretrained(made / "model")
    source = open_source(f"folder:{made / 'data'}", image_size=16)
    head = nn.Sequential(
        nn.LayerNorm(32, eps=1e-6, elementwise_affine=False),
        nn.BatchNorm1d(32, eps=1e-6, affine=False),
        nn.Linear(32, CLASSES),
    )
    weight, bias = head[2].weight, head[2].bias
    nn.init.normal_(weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(bias)
    sums = [torch.zeros_like(x) for x in (weight, bias)]
    steps, highest = len(source) // 16, 30.0 * 16 / 256
    for step, batch in enumerate(batches(source, 16, epochs=4, augment="weak", shuffle=True)):
        lr = highest * step / steps
        if step >= steps:
            lr = highest * (1 + np.cos(np.pi * (step - steps) / (3 * steps))) / 2
        with torch.no_grad():
            features = model.features(batch.inputs)
        loss = F.cross_entropy(head(features), batch.labels)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            trusts = (0.001 * weight.norm() / gradients[0].norm(), 1.0)
            for x, m, g, trust in zip((weight, bias), sums, gradients, trusts, strict=True):
                m.mul_(0.9).add_(trust * g)
                x -= lr * m
    assert found["steps"] == 4 * steps
    for name, x in (("heads.0.2.weight", weight), ("heads.0.2.bias", bias)):
        torch.testing.assert_close(saved_head(tmp_path / "exact")[name], x.detach(), rtol=1e-4, atol=1e-6)
    test = open_source(f"folder:{made / 'data'}", image_size=16, split="test")
    batch = next(batches(test, len(test), shuffle=False))
    with torch.no_grad():
        right = (head.eval()(model.features(batch.inputs)).argmax(1) == batch.labels).double().mean().item()
    assert found["test_top1"] == pytest.approx(right)
    lines = [json.loads(x) for x in (tmp_path / "exact" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["linear_top1"] == found["test_top1"]
    assert Image.open(tmp_path / "exact" / "curves.png").size[0] > 300


def saved_head(out: Path) -> dict[str, Tensor]:
    path = max((out / "checkpoints").iterdir()) / "model.safetensors"
    return read_safetensors(path if path.exists() else next(path.parent.glob("*.safetensors")))


def test_as_many_kept_views_as_epochs_are_the_exact_recipe(made: Path, tmp_path: Path) -> None:
    exact = run(config(made, recipe="exact", out=tmp_path / "exact"))
    head = dataclasses.replace(HEAD, views=HEAD.epochs)
    cached = run(config(made, recipe="cached", out=tmp_path / "cached", head=head))
    assert cached["test_top1"] == exact["test_top1"]
    ours, theirs = (saved_head(tmp_path / name) for name in ("cached", "exact"))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-6, msg=name)
    views = [
        read_safetensors(path)["features"] for path in (tmp_path / "cached").glob("features/train-view*")
    ]
    assert len(views) == HEAD.epochs
    assert not torch.equal(views[0], views[1])


def test_all_blocks_are_each_block(made: Path, tmp_path: Path) -> None:
    """Solved: the accuracies of one pass are those of probing each block by itself."""
    found = run(config(made, block="all", out=tmp_path / "all"))
    assert json.loads((tmp_path / "all" / "probe.json").read_text()) == found
    assert Image.open(tmp_path / "all" / "blocks.png").size[0] > 300
    model, parts = MAGE.from_pretrained(made / "model"), []
    for split in ("train", "test"):
        source = open_source(f"folder:{made / 'data'}", image_size=16, split=split)  # type: ignore[arg-type]
        parts.append(next(batches(source, len(source), shuffle=False, augment="eval")))
    for block, of_block in enumerate(found["blocks"]):
        with torch.no_grad():
            train, test = (model.features(x.inputs, block=block) for x in parts)
        by_hand = linear_probe(train, parts[0].labels, test, parts[1].labels)
        assert (of_block["train_top1"], of_block["test_top1"]) == by_hand
        assert of_block["knn_top1"] == knn_accuracy(train, parts[0].labels, test, parts[1].labels)
    assert len(found["blocks"]) == model.config.encoder_depth
    alone = run(config(made, block=0))
    assert alone["test_top1"] == found["blocks"][0]["test_top1"]
    assert found["test_top1"] == found["blocks"][-1]["test_top1"]


def heads(features: Features, test: Features, folder: Path, stream: Any = None) -> HeadTraining:
    training = HeadTraining(
        HEAD, len(features.features_HND), 6, 3, len(features.labels_N), test, torch.device("cpu")
    )
    training.run(folder, {}, stream or KeptFeatures([features], HEAD, torch.device("cpu")))
    return training


def random_features(blocks: int, count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(blocks, count, 6, generator=generator)
    return Features(noise + F.one_hot(labels, 6), labels)


def test_heads_trained_together_are_those_trained_alone(tmp_path: Path) -> None:
    train, test = random_features(3, 50, 0), random_features(3, 40, 1)
    together = heads(train, test, tmp_path / "together")
    for block in range(3):
        one, its = (Features(x.features_HND[block : block + 1], x.labels_N) for x in (train, test))
        alone = heads(one, its, tmp_path / str(block))
        for x, y in zip(together.heads[block].parameters(), alone.heads[0].parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
        assert alone.accuracies()[0] == together.accuracies()[block]


def test_a_stopped_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    train, test = random_features(2, 50, 0), random_features(2, 40, 1)
    whole = heads(train, test, tmp_path / "whole")
    kept = KeptFeatures([train], HEAD, torch.device("cpu"))

    def stopping(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(kept(step)):
            if number == 4:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    heads(train, test, tmp_path / "run", stopping)
    steps = [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 5
    resumed = heads(train, test, tmp_path / "run")
    for name, x in whole.heads.state_dict().items():
        assert torch.equal(resumed.heads.state_dict()[name], x), name


def test_kept_features_are_read_and_refused_where_they_are_not_the_model_s(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "probe"
    found = run(config(made, out=out))
    with monkeypatch.context() as patch:
        patch.setattr(FeatureReader, "encode", None)
        assert run(config(made, out=out)) == found
    with pytest.raises(InputError, match=r"features/test.safetensors holds .* model '.* give another --out"):
        run(config(made, out=out, model=made / "other"))
    for change in ({"precision": "bf16"}, {"block": 0}, {"recipe": "cached"}):
        with pytest.raises(InputError, match=f"holds a run with {next(iter(change))}"):
            run(config(made, out=out, **change))
    path = out / "features" / "test.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        run(config(made, out=out))


def test_damaged_images_are_left_out(made: Path, tmp_path: Path) -> None:
    """Of the cached recipe; the exact one shows another image in their place."""
    data = tmp_path / "data"
    for label in range(CLASSES):
        (data / str(label)).mkdir(parents=True)
        for file in (made / "data" / str(label)).iterdir():
            (data / str(label) / file.name).write_bytes(file.read_bytes())
    source = open_source(f"folder:{data}", image_size=16)
    Path(source.name(0)).write_bytes(b"no image")
    head = dataclasses.replace(HEAD, views=2, epochs=2)
    for recipe in ("cached", "exact"):
        changes = {"recipe": recipe, "out": tmp_path / recipe, "head": head}
        found = run(config(made, data=f"folder:{data}", **changes))
        assert found["test_images"] == CLASSES * 5
        assert 0 < found["test_top1"] <= 1
    kept = read_safetensors(tmp_path / "cached" / "features" / "train-view-1.safetensors")
    assert len(kept["labels"]) == kept["features"].shape[1] == len(source) - 1


def test_a_loss_that_is_not_finite_ends_the_training(made: Path, tmp_path: Path) -> None:
    head = dataclasses.replace(HEAD, base_lr=1e38)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step"):
        run(config(made, recipe="cached", out=tmp_path / "probe", head=head))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 2}, "block is 2, wanted 0 <= block < 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"recipe": "exact", "out": None}, "recipe exact trains a head, wanted --out"),
        ({"data": "unlabelled"}, "has 1 class, wanted labelled data"),
        ({"head": HeadChoices(epochs=3)}, "warmup_epochs 10"),
        ({"head": HeadChoices(base_lr=0.0)}, "base_lr 0.0"),
        ({"head": HeadChoices(views=-1)}, "views -1"),
        ({"head": HeadChoices(augment="much")}, "augment is 'much'"),
        ({"head": HeadChoices(batch_size=1)}, "batch_size 1, .* batch_size 2 or more"),
        (
            {"recipe": "cached", "head": HeadChoices(batch_size=61)},
            "60 training images, wanted head.batch",
        ),
        ({"out": "a file"}, "is a file, wanted a folder"),
        ({"out": "below a file"}, "file is a file, wanted a folder"),
    ],
)
def test_bad_input(made: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes = {"out": tmp_path / "out"} | changes
    if changes.get("data"):
        changes["data"] = f"folder:{made / 'data' / '0'}"
    (tmp_path / "file").write_text("")
    for name, path in (("a file", "file"), ("below a file", "file/out")):
        if changes["out"] == name:
            changes["out"] = tmp_path / path
    with pytest.raises(InputError, match=message):
        run(config(made, **changes))
    assert not (tmp_path / "out").exists()


def test_another_run_is_refused_before_features_are_computed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, head = tmp_path / "out", dataclasses.replace(HEAD, views=1, epochs=1)
    run(config(made, recipe="cached", out=out, head=head))
    before = sorted(out.rglob("*"))
    (out / "probe.json").unlink()
    monkeypatch.setattr(FeatureReader, "read", None)
    with pytest.raises(InputError, match=r"holds a run with .*views 1 and not 2"):
        run(config(made, recipe="cached", out=out, head=dataclasses.replace(head, epochs=2, views=2)))
    (out / "probe.json").write_text("{")
    with pytest.raises(InputError, match=r"probe.json is no result of a probe"):
        run(config(made, recipe="cached", out=out, head=head))
    assert sorted(out.rglob("*")) == before


def test_a_step_is_encoded_in_parts_as_it_is_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more images are in memory than are encoded at a time, and no fewer, of a prime number either."""
    model = MAGE.from_pretrained(made / "model")
    source = open_labelled("probe", model, f"folder:{made / 'data'}", "train")
    read, parts, own_image = 0, [], type(source).image

    def image(self: Any, index: int) -> Image.Image:
        nonlocal read
        read += 1
        return own_image(self, index)

    monkeypatch.setattr(type(source), "image", image)
    reader = FeatureReader(model, batch_size=8)
    own_encode = FeatureReader.encode

    def encode(self: FeatureReader, inputs: Tensor) -> Tensor:
        parts.append((len(inputs), read))
        return own_encode(self, inputs)

    monkeypatch.setattr(FeatureReader, "encode", encode)
    for batch_size, wanted in ((17, [(8, 8), (8, 16), (1, 17)]), (16, [(8, 8), (8, 16)]), (5, [(5, 5)])):
        read = 0
        parts.clear()
        choices = dataclasses.replace(HEAD, batch_size=batch_size, augment="eval").checked(32, len(source))
        features, labels = next(FreshFeatures(reader, source, choices)(0))
        assert parts == wanted
        batch = next(batches(source, batch_size))
        assert torch.equal(labels, batch.labels)
        with torch.no_grad():
            torch.testing.assert_close(features[0], model.features(batch.inputs), rtol=1e-4, atol=1e-5)
    steps, step = FreshFeatures(reader, source, choices), 2 * (len(source) // batch_size) + 1
    for (x, _), (y, _) in zip(islice(steps(0), step, step + 2), islice(steps(step), 2), strict=True):
        assert torch.equal(x, y), "as a run that goes on in the third epoch sees it"


def test_features_are_the_eval_mode_s(made: Path) -> None:
    model = MAGE.from_pretrained(made / "model")
    assert model.config.dropout > 0
    data = f"folder:{made / 'data'}"
    wanted, labels = extract_features(model, data, "test")
    got, _ = extract_features(model.train(), data, "test")
    assert torch.equal(got, wanted)
    assert model.encoder.training
    assert labels.tolist() == sorted(labels.tolist())


def test_features_of_a_cache_made_anew_are_refused(made: Path, tmp_path: Path) -> None:
    """Its items have the same names and labels."""
    data, cache, out = f"folder:{made / 'data'}", tmp_path / "tokens", tmp_path / "out"
    options = {"tokenizer": made / "model", "data": data, "out": cache}
    tokenize.run(tokenize.TokenizeConfig(**options))  # type: ignore[arg-type]
    found = run(config(made, data=f"tokens:{cache}", out=out))
    assert run(config(made, data=f"tokens:{cache}", out=out)) == found
    shutil.rmtree(cache)
    tokenize.run(tokenize.TokenizeConfig(**options, augment="strong"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"test.safetensors holds a run with items"):
        run(config(made, data=f"tokens:{cache}", out=out))


def test_the_paper_s_head_by_default() -> None:
    for width, images, wanted in ((768, 10**6, (4096, 0.1)), (1024, 1438, (1438, 0.05))):
        choices = HeadChoices().checked(width, images)
        assert (choices.batch_size, choices.base_lr) == wanted
        assert (choices.epochs, choices.warmup_epochs, choices.augment) == (90, 10, "strong")


def test_the_benchmark_s_table() -> None:
    records = [
        {"recipe": name, "seed": seed, "test_top1": top1 + seed / 100, "seconds": 2.0, "cpu_seconds": cpu}
        for name, top1, cpu in (("cached", 0.9, 2.0), ("exact", 0.91, 50.0))
        for seed in range(3)
    ]
    _, _, cached, exact = benchmark.table(records).splitlines()
    times = "2.0 (2.0 to 2.0) | 2.0 (2.0 to 2.0)"
    assert cached == f"| cached | 3 | 91.0% (90.0% to 92.0%) | {times} | 25.0 |"
    assert exact.endswith("| 1.0 |")


def test_the_benchmark_tells_models_apart(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure(model: Path, recipe: str, head: HeadChoices) -> dict[str, Any]:
        asked.append(recipe)
        return {"recipe": recipe, "seed": head.seed, "test_top1": 0.5, "seconds": 1.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "run", lambda config: None)
    for _ in range(2):
        arguments = ["--model", str(made / "model"), "--out", str(tmp_path), "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", ["linear_probe", *arguments])
        benchmark.main()
        assert asked == ["solved", "cached", "exact"], "each once"
    assert capsys.readouterr().out.count("| exact | 1 | 50.0%") == 2
    monkeypatch.setattr(sys, "argv", ["linear_probe", "--model", str(made / "other"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds other settings"):
        benchmark.main()
