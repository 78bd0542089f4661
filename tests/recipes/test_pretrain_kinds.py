"""``mage-fast pretrain`` of every kind of model, from every kind of data, with all that watches it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mage_fast import MAGE
from mage_fast.cli import main
from mage_fast.contrastive import MAGEC
from mage_fast.errors import CheckpointError, InputError, TrainingError
from mage_fast.recipes import pretrain, tokenize
from mage_fast.recipes.pictures import read_metrics
from mage_fast.recipes.pretrain import ContrastiveChoices, ModelChoices, WatchChoices
from mage_fast.training.checkpoints import read_part
from mage_fast.training.sources import DigitsSource
from mage_fast.training.step import TrainStep
from tests.recipes.test_pretrain_ranks import configuration, last, tokenizer  # noqa: F401 (a fixture)


def test_contrastive_from_a_cache_of_views(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    cache = tmp_path / "tokens"
    tokenize.run(
        tokenize.TokenizeConfig(tokenizer=tokenizer, out=cache, views=2, augment="weak", split="train")
    )
    out = tmp_path / "run"
    chosen: dict[str, Any] = {"data": f"tokens:{cache}", "contrastive": ContrastiveChoices(enabled=True)}
    config = configuration(tokenizer, out, **chosen, log_every=1)
    pretrain.run(config)
    line = read_metrics(out / "metrics.jsonl")[0]
    parts = line["reconstruction_loss"] + 0.1 * line["contrastive_loss"]
    assert line["loss"] == pytest.approx(parts, rel=1e-6)
    assert line["contrastive_loss"] == pytest.approx(np.log(256), rel=0.2)  # of 256 pairs, hardly told apart
    trained = read_part(last(out))
    model = MAGE.from_pretrained(out)
    assert type(model) is MAGE
    assert {k for k in trained if k not in model.state_dict()} == {
        f"projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert isinstance(MAGEC(model.config, model.tokenizer), MAGE)
    one = tmp_path / "one"
    tokenize.run(tokenize.TokenizeConfig(tokenizer=tokenizer, out=one, split="train"))
    with pytest.raises(InputError, match=r"1 view"):
        pretrain.run(configuration(tokenizer, tmp_path / "other", **chosen | {"data": f"tokens:{one}"}))
    assert not (tmp_path / "other").exists()


def test_labels_after_an_unconditional_start(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """With looks at the model: pictures of every class, and neighbours."""
    start, out = tmp_path / "start", tmp_path / "run"
    pretrain.run(configuration(tokenizer, start, epochs=1, warmup_epochs=0))
    watch = WatchChoices(every_epochs=1, columns=2, probe="knn")
    chosen: dict[str, Any] = {"conditional": True, "init": start, "watch": watch, "epochs": 2}
    pretrain.run(configuration(tokenizer, out, **chosen, warmup_epochs=0, log_every=1))
    first, begun = (read_metrics(folder / "metrics.jsonl")[0] for folder in (out, start))
    assert first["loss"] < begun["loss"] - 0.05  # it did not start anew
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if "knn_top1" in line] == [5, 10]
    with Image.open(out / "samples" / "step-000000005.png") as picture:
        assert picture.height > 4 * picture.width  # ten classes, two samples each
    assert (out / "samples" / "progress.png").exists()
    assert MAGE.from_pretrained(out).config.num_classes == 10
    made = tmp_path / "made"
    arguments = ("--model", out, "--out", made, "--count", 2, "--label", 3, "--sampler.guidance-scale", 1.5)
    assert main([str(x) for x in ("generate", *arguments, "--sampler.steps", 3)]) == 0
    assert len(list(made.glob("*.png"))) >= 2
    with pytest.raises(CheckpointError, match="nowhere"):
        pretrain.run(configuration(tokenizer, tmp_path / "other", init=tmp_path / "nowhere"))


def test_features_as_inputs(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    chosen: dict[str, Any] = {
        "model": ModelChoices(encoder_input="features"),
        "epochs": 1,
        "warmup_epochs": 0,
    }
    result = pretrain.run(configuration(tokenizer, out, **chosen))
    assert np.isfinite(result["loss_last"])
    assert (out / "curves.png").exists()
    assert not (out / "samples.png").exists()  # such a model generates nothing
    assert MAGE.from_pretrained(out).config.encoder_input == "features"
    assert (
        pretrain.run(configuration(tokenizer, out, **chosen))["steps"] == result["steps"]
    )  # finished before


def test_tar_shards_give_what_their_folder_gives(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    digits = DigitsSource(image_size=16, split="train")
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    shards.mkdir()
    (folder / "0").mkdir(parents=True)
    for index in range(96):
        digits.image(index).save(folder / "0" / f"{index:03d}.png")
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for path in sorted((folder / "0").iterdir())[number * 48 : number * 48 + 48]:
                tar.add(path, path.name)
    found = []
    for name, spec in (("a", f"folder:{folder}"), ("b", f"webdataset:{shards}")):
        chosen = {"data": spec, "split": "all", "batch_size": 32, "augment": "eval"}
        pretrain.run(configuration(tokenizer, tmp_path / name, **chosen, log_every=1))
        found.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_gradients_that_stay_broken_stop_the_run(
    tokenizer: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two steps are skipped and counted; three in a row end the run with the last good state on the disk."""
    gradients, calls, bad = TrainStep._gradients, [0], {2, 4, 6, 7, 8}

    def broken(self: TrainStep, *arguments: Any, **options: Any) -> Any:
        metrics = gradients(self, *arguments, **options)
        if calls[0] in bad:
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], torch.nan)
        calls[0] += 1
        return metrics

    monkeypatch.setattr(TrainStep, "_gradients", broken)
    out = tmp_path / "run"
    choices = {"max_skipped": 3, "checkpoints": pretrain.CheckpointChoices(every=6), "log_every": 1}
    with pytest.raises(
        TrainingError, match=r"not finite in 3 steps in a row, the last one step 8; .* step 6"
    ):
        pretrain.run(configuration(tokenizer, out, **choices))
    assert [line["skipped"] for line in read_metrics(out / "metrics.jsonl")] == [0, 0, 1, 0, 1, 0, 1, 1]
    bad.clear()
    assert pretrain.run(configuration(tokenizer, out, **choices))["steps"] == 10
    state = read_part(last(out), "optimizer")
    steps = {int(value) for name, value in state.items() if name.endswith(".step")}
    assert steps == {8}  # of 10, two were skipped before the checkpoint that it went on from
    assert json.loads((last(out) / "state.json").read_text())["step"] == 10
    capsys.readouterr()
