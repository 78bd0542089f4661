"""Tokenizer training end to end, tiny: files, resumption to the bit, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mage_fast.config import TokenizerConfig
from mage_fast.errors import InputError, TrainingError
from mage_fast.recipes import train_tokenizer
from mage_fast.recipes.tokenizer_trainer import Trainer
from mage_fast.recipes.train_tokenizer import TrainTokenizerConfig
from mage_fast.storage import read_safetensors
from mage_fast.tokenizer import VQGAN
from mage_fast.training.data import batches, open_source
from mage_fast.training.metrics import psnr_db

TINY = TokenizerConfig(
    image_size=8,
    codebook_size=12,
    codebook_dim=4,
    base_width=4,
    width_multipliers=(1, 2),
    blocks_per_level=1,
    norm_groups=2,
)
WRITTEN = ("config.json", "model.safetensors", "reconstructions.png", "metrics.jsonl")


def state_of(out: Path) -> Path:
    """The newest state of a run."""
    return max((out / "checkpoints").iterdir()) / "state.safetensors"


def tiny(out: Path, **changes: Any) -> TrainTokenizerConfig:
    values: dict[str, Any] = {
        "steps": 8,
        "batch_size": 16,
        "log_every": 1,
        "discriminator_width": 4,
        "device": "cpu",
    }
    return TrainTokenizerConfig(out=out, model=TINY, **(values | changes))


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step."""
    whole = Trainer.step

    def interrupted(self: Trainer, batch: Any, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, batch, number)

    monkeypatch.setattr(Trainer, "step", interrupted)


def never_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was trained"))


def test_writes_a_tokenizer_that_learned(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train_tokenizer.run(tiny(out, steps=40))
    assert (result["folder"], result["steps"], result["stopped_by"]) == (str(out), 40, None)
    assert all((out / name).is_file() for name in WRITTEN)
    assert list(out.glob("events.out.tfevents.*"))

    lines = logged(out)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    for name in ("reconstruction", "commitment", "perplexity", "codes", "revived", "gradient_norm", "lr"):
        assert lines[0][name] >= 0
    last = lines[-1]
    assert last["loss"] == pytest.approx(last["reconstruction"] + 0.25 * last["commitment"])

    # the measures of the result, from the written tokenizer
    tokenizer = VQGAN.from_pretrained(out)
    assert tokenizer.config == TINY
    source = open_source("digits", image_size=8, split="test")
    images = next(batches(source, len(source), image_size=8, shuffle=False)).inputs
    ids = tokenizer.encode(images)
    assert result["images"] == len(images) == 359
    assert result["codes_used"] == len(ids.unique())
    assert result["psnr_db"] == pytest.approx(psnr_db(tokenizer.decode(ids).clamp(0, 1), images), rel=1e-4)
    with Image.open(out / "reconstructions.png") as grid:  # 16 pairs, 8 images a row, 8-fold, 2 apart
        assert grid.size == (8 * 66 - 2, 4 * 66 - 2)


@pytest.mark.parametrize(
    "settings",
    [
        # few features, short averages: codes die and are revived in these few steps
        {"batch_size": 4, "ema_decay": 0.1, "dead_below": 0.9},
        {"codebook": "loss", "batch_size": 4, "ema_decay": 0.1, "dead_below": 0.9, "warmup_steps": 2},
        {"adversarial_weight": 0.5, "adversarial_start": 4, "augment": "strong"},
    ],
    ids=["ema", "loss", "adversarial"],
)
def test_interrupted_and_resumed_is_the_unbroken_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train_tokenizer.run(tiny(whole, **settings))
    if "dead_below" in settings:
        assert sum(line["revived"] for line in logged(whole)) > 0
    for step in (2, 5):
        with monkeypatch.context() as patch:
            interrupt_at(step, patch)
            stopped = train_tokenizer.run(tiny(broken, **settings))
        assert (stopped["steps"], stopped["stopped_by"]) == (step + 1, "Ctrl-C")
        assert not (broken / "model.safetensors").exists()
    # what does not belong to the training may change
    resumed = train_tokenizer.run(tiny(broken, **settings, log_every=2, save_every=3, workers=1))
    assert resumed == result | {"folder": str(broken)}
    states = [read_safetensors(state_of(out)) for out in (whole, broken)]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert (whole / "reconstructions.png").read_bytes() == (broken / "reconstructions.png").read_bytes()


def test_the_weights_come_from_the_seed_alone(tmp_path: Path) -> None:
    config = tiny(tmp_path, adversarial_weight=1.0)
    state = torch.random.get_rng_state()
    first = Trainer(config, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    second = Trainer(config, torch.device("cpu"))
    other = Trainer(dataclasses.replace(config, seed=1), torch.device("cpu"))
    for name in ("model", "discriminator"):
        mine, same, different = (getattr(t, name).state_dict() for t in (first, second, other))
        assert all(torch.equal(mine[key], same[key]) for key in mine)
        assert not all(torch.equal(mine[key], different[key]) for key in mine)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    result = train_tokenizer.run(tiny(out, steps=2))
    weights = (out / "model.safetensors").read_bytes()
    never_train(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "open_source", lambda *_, **__: pytest.fail("the data was opened"))
        assert train_tokenizer.run(tiny(out, steps=2)) == result
    (out / "model.safetensors").unlink()  # as if the last step was saved, and then the power failed
    assert train_tokenizer.run(tiny(out, steps=2)) == result
    assert (out / "model.safetensors").read_bytes() == weights


def test_refuses_a_run_with_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train_tokenizer.run(tiny(out, steps=2))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    never_train(monkeypatch)
    for changes, named in (
        ({"lr": 1e-3}, "lr 0.002 and not 0.001"),
        ({"steps": 3}, "steps 2 and not 3"),
        ({"codebook": "loss"}, "codebook 'ema' and not 'loss'"),
    ):
        with pytest.raises(InputError, match=named):
            train_tokenizer.run(tiny(out, **({"steps": 2} | changes)))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "mnist"}, "unknown data source 'mnist'"),
        ({"data": "folder:nowhere"}, "no such folder"),
        ({"data": "tokens:nowhere"}, "nowhere"),
        ({"steps": -1}, "steps is -1, wanted 1 or more"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 100_000}, "1438 items, wanted at least batch_size 100000"),
        ({"warmup_steps": 9}, "warmup_steps is 9, wanted 0 to 8"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ema_decay": 1.0}, "decay 1.0"),
        ({"augment": "none"}, "augment is 'none'"),
        ({"codebook": "gumbel"}, "codebook is 'gumbel'"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
    ids=str,
)
def test_refuses_wrong_input_before_any_work(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        train_tokenizer.run(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_refuses_a_size_that_does_not_halve() -> None:
    with pytest.raises(ValueError, match="image_size is 9, wanted a multiple of 2"):
        TINY.replace(image_size=9)


def test_refuses_folders_that_are_not_its_own(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below"):
        with pytest.raises(InputError, match="is a file, wanted a folder"):
            train_tokenizer.run(tiny(out))
    other = tmp_path / "other"
    VQGAN(TINY).save_pretrained(other)
    before = (other / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"holds a config.json of something else"):
        train_tokenizer.run(tiny(other))
    assert (other / "model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step"):
        train_tokenizer.run(tiny(tmp_path, lr=1e30))
    assert not (tmp_path / "checkpoints").exists()


def test_adversarial_terms_set_in_at_their_step(tmp_path: Path) -> None:
    train_tokenizer.run(tiny(tmp_path, steps=4, adversarial_weight=0.5, adversarial_start=2))
    lines = logged(tmp_path)
    assert ["adversarial" in line for line in lines] == [False, False, True, True]
    for line in lines[2:]:
        wanted = line["reconstruction"] + 0.25 * line["commitment"]
        wanted += 0.5 * line["adaptive_weight"] * line["adversarial"]
        assert line["loss"] == pytest.approx(wanted, rel=1e-5)
        assert line["discriminator"] > 0


def test_neither_loss_reaches_the_other_network(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path, adversarial_weight=0.5), torch.device("cpu"))
    source = open_source("digits", image_size=8)
    batch = next(batches(source, 16, image_size=8))
    gradients = {}
    whole = trainer._discriminate

    def watched(images: torch.Tensor, decoded: torch.Tensor, lr: float) -> torch.Tensor:
        assert not decoded.requires_grad
        assert all(p.grad is None for p in trainer.discriminator.parameters())  # type: ignore[union-attr]
        gradients["decoder"] = trainer.model.decoder.conv_out.weight.grad.clone()
        return whole(images, decoded, lr)

    trainer._discriminate = watched  # type: ignore[method-assign]
    trainer.step(batch, 0)
    assert torch.equal(trainer.model.decoder.conv_out.weight.grad, gradients["decoder"])


def test_the_loss_codebook_moves_by_its_gradient(tmp_path: Path) -> None:
    train_tokenizer.run(tiny(tmp_path, steps=30, codebook="loss"))
    lines = logged(tmp_path)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    line = lines[-1]
    wanted = line["reconstruction"] + 0.25 * line["commitment"] + line["codebook"]
    assert line["loss"] == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_learns_too(tmp_path: Path) -> None:
    result = train_tokenizer.run(tiny(tmp_path, steps=30, precision="bf16", adversarial_weight=0.1))
    lines = logged(tmp_path)
    assert lines[-1]["reconstruction"] < 0.7 * lines[0]["reconstruction"]
    assert result["psnr_db"] > 5
    assert VQGAN.from_pretrained(tmp_path).encoder.conv_in.weight.dtype == torch.float32


def test_perceptual_loss_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)  # an import of it fails
    with pytest.raises(InputError, match=r"pip install mage-fast\[lpips\]"):
        train_tokenizer.run(tiny(tmp_path / "run", perceptual_weight=1.0))
    assert not (tmp_path / "run").exists()


def test_perceptual_loss_calls_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the package's interface: images in [-1, 1], one distance an image, [B, 1, 1, 1]."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "vgg"
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert not self.scale.requires_grad
            assert second.min() == -1  # digits have black corners
            assert second.max() <= 1
            return self.scale * (first - second).square().mean((1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    train_tokenizer.run(tiny(tmp_path, steps=20, perceptual_weight=0.5))
    lines = logged(tmp_path)
    assert lines[-1]["perceptual"] < lines[0]["perceptual"]
    for line in lines:
        wanted = line["reconstruction"] + 0.25 * line["commitment"] + 0.5 * line["perceptual"]
        assert line["loss"] == pytest.approx(wanted, rel=1e-5)
    assert not [key for key in read_safetensors(state_of(tmp_path)) if "scale" in key]


def test_a_folder_of_mixed_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for label, sizes in {"wide": [(40, 12), (9, 8), (30, 20)], "tall": [(5, 20), (16, 17)]}.items():
        (folder / label).mkdir(parents=True)
        for number, size in enumerate(sizes * 2):
            image = Image.radial_gradient("L").resize(size)
            mode = ("RGB", "L", "P", "RGBA", "1")[number % 5]
            image.convert(mode).save(folder / label / f"{number}.png")
    (folder / "wide" / "broken.png").write_bytes(b"not an image")
    result = train_tokenizer.run(
        tiny(tmp_path / "run", data=f"folder:{folder}", batch_size=3, steps=5, augment="strong")
    )
    assert result["images"] == 2
    assert VQGAN.from_pretrained(tmp_path / "run").codebook_size == 12
