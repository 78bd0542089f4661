"""The whole flow through the command line on small data: tokenizer, tokens, model, images, probe, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from mage_fast import MAGE, MAGEConfig
from mage_fast.cli import main
from mage_fast.config import TokenizerConfig
from mage_fast.errors import InputError
from mage_fast.recipes import pretrain, tokenize, train_tokenizer
from mage_fast.training.checkpoints import read_part
from mage_fast.training.token_cache import TokenCache

SIZE = TokenizerConfig(
    image_size=16,
    codebook_size=16,
    codebook_dim=4,
    base_width=8,
    width_multipliers=(1, 1, 2),
    blocks_per_level=1,
    norm_groups=4,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer after eight steps on digits."""
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    train_tokenizer.run(train_tokenizer.TrainTokenizerConfig(model=SIZE, out=out, steps=8, batch_size=16))
    return out


@pytest.fixture(scope="module")
def model(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after one epoch on digits."""
    out = tmp_path_factory.mktemp("model") / "run"
    config = pretrain.PretrainConfig(
        tokenizer=tokenizer, out=out, epochs=1, warmup_epochs=0, batch_size=256, augment="weak"
    )
    result = pretrain.run(config)
    assert result["steps"] == result["total_steps"] == 5
    return out


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An ordinary folder: photographs and drawings of many sizes and modes, and one truncated file."""
    folder = tmp_path / "pictures"
    (folder / "photographs").mkdir(parents=True)
    (folder / "drawings").mkdir()
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    china.save(folder / "photographs" / "china.jpg")
    flower.resize((97, 61)).save(folder / "photographs" / "flower.webp")
    flower.convert("L").save(folder / "photographs" / "grey.png")
    china.crop((0, 0, 40, 300)).save(folder / "photographs" / "narrow.png")
    rgba = np.zeros((33, 45, 4), np.uint8)
    rgba[8:20, 5:30] = (200, 30, 60, 255)
    Image.fromarray(rgba).save(folder / "drawings" / "rgba.png")
    Image.fromarray(rgba).convert("P").save(folder / "drawings" / "palette.png")
    Image.fromarray(rgba[..., 0]).convert("1").save(folder / "drawings" / "bilevel.png")
    Image.new("RGB", (3, 5), "white").save(folder / "drawings" / "dot.bmp")
    whole = (folder / "photographs" / "china.jpg").read_bytes()
    (folder / "photographs" / "truncated.jpg").write_bytes(whole[: len(whole) // 3])
    return folder


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """The JSON that a verb prints."""
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_pretrain_on_an_ordinary_folder(
    tokenizer: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    result = run_command(
        capsys,
        *("pretrain", "--data", f"folder:{pictures}", "--tokenizer", tokenizer, "--out", out),
        *("--preset", "small", "--epochs", 3, "--warmup-epochs", 1, "--batch-size", 4),
    )
    assert result["steps"] == result["total_steps"] == 3
    assert "truncated.jpg" in caplog.text
    assert np.isfinite(result["loss_last"])
    for name in (
        "config.json",
        "model.safetensors",
        "checkpoints/step-000000003/state.json",
        "metrics.jsonl",
        "loss.png",
        "samples.png",
    ):
        assert (out / name).exists(), name
    assert MAGE.from_pretrained(out).config.encoder_width == 96


def test_tokenize_goes_on_where_it_stopped(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tokenize.TokenizeConfig(
        tokenizer=tokenizer,
        out=tmp_path / "whole",
        split="test",
        views=2,
        augment="weak",
        shard_size=100,
        batch_size=48,
    )
    assert tokenize.run(config) == {"items": 359, "views": 2, "bad_files": 0}
    broken = tokenize.TokenizeConfig(**{**config.__dict__, "out": tmp_path / "broken"})
    encode, calls = tokenize._encode, iter(range(100))

    def dies(*arguments: object) -> torch.Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return encode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(tokenize, "_encode", dies)
        with pytest.raises(KeyboardInterrupt):
            tokenize.run(broken)
    tokenize.run(broken)
    whole, resumed = TokenCache(config.out), TokenCache(broken.out)
    for view in range(2):
        np.testing.assert_array_equal(whole.batch(range(359), view), resumed.batch(range(359), view))
    np.testing.assert_array_equal(whole.labels, resumed.labels)
    before = {path: path.read_bytes() for path in config.out.iterdir()}
    assert tokenize.run(config) == {"items": 359, "views": 2}, "a complete cache is left as it is"
    assert {path: path.read_bytes() for path in config.out.iterdir()} == before
    assert (whole.batch(range(359), 0) != whole.batch(range(359), 1)).any(), "the views differ"


def test_pretrain_from_a_cache_resumes_to_the_bit(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize.run(tokenize.TokenizeConfig(tokenizer=tokenizer, out=tmp_path / "tokens", split="train"))
    common = {
        "data": f"tokens:{tmp_path / 'tokens'}",
        "tokenizer": tokenizer,
        "epochs": 2,
        "warmup_epochs": 1,
    }
    whole = pretrain.PretrainConfig(**common, out=tmp_path / "whole", batch_size=400)
    broken = pretrain.PretrainConfig(**common, out=tmp_path / "broken", batch_size=400)
    pretrain.run(whole)
    forward, calls = MAGE.forward, iter(range(100))

    def dies(self: MAGE, *arguments: object, **options: object) -> object:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(MAGE, "forward", dies)
        every = pretrain.CheckpointChoices(every_seconds=0.0)
        settings = pretrain.PretrainConfig(**{**broken.__dict__, "checkpoints": every})
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(settings)
    result = pretrain.run(broken)
    assert result["steps"] == 6
    ours, theirs = (
        read_part(tmp_path / name / "checkpoints" / "step-000000006") for name in ("whole", "broken")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)), "every step is logged once"


def test_a_finished_run_is_not_trained_again(model: Path, tokenizer: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    config = pretrain.PretrainConfig(
        tokenizer=tokenizer, out=model, epochs=1, warmup_epochs=0, batch_size=256, augment="weak"
    )
    assert pretrain.run(config)["steps"] == 5
    assert (model / "model.safetensors").read_bytes() == before


def test_generate_makes_the_same_images_in_any_batches(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("generate", "--model", model, "--count", 5, "--sampler.steps", 3, "--seed", 3)
    assert run_command(capsys, *options, "--out", tmp_path / "a", "--batch-size", 2)["new"] == 5
    assert run_command(capsys, *options, "--out", tmp_path / "b", "--batch-size", 5)["new"] == 5
    for index in range(5):
        ours, theirs = (np.asarray(Image.open(tmp_path / name / f"{index:06d}.png"), int) for name in "ab")
        assert ours.shape == (16, 16, 3)
        assert abs(ours - theirs).max() <= 1, "rounding of a convolution may move a truncated value by one"
    assert Image.open(tmp_path / "a" / "grid.png").size[0] > 16
    (tmp_path / "a" / "000003.png").unlink()
    assert run_command(capsys, *options, "--out", tmp_path / "a", "--batch-size", 2)["new"] == 1
    more = ("generate", "--model", model, "--count", 7, "--sampler.steps", 3, "--seed", 3, "--batch-size", 5)
    before = Image.open(tmp_path / "b" / "grid.png").size
    assert run_command(capsys, *more, "--out", tmp_path / "b")["new"] == 2
    assert Image.open(tmp_path / "b" / "grid.png").size != before, "the grid shows the new ones too"
    assert main([*map(str, options[:-1]), "4", "--out", str(tmp_path / "a")]) == 2
    assert "seed 3 and not 4" in capsys.readouterr().err


def test_probe_reports_both_splits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = run_command(capsys, "probe", "--model", model, "--out", tmp_path / "probe", "--block", 0)
    assert json.loads((tmp_path / "probe" / "probe.json").read_text()) == result
    assert (result["train_images"], result["test_images"]) == (1438, 359)
    assert result["chance"] < result["test_top1"] <= 1


def test_convert_to_the_published_layout_and_back(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_command(capsys, "convert", "--source", model, "--out", tmp_path / "published.pth")
    state = torch.load(tmp_path / "published.pth", weights_only=True)["model"]
    assert "token_emb.word_embeddings.weight" in state
    assert main(["convert", "--source", str(model), "--out", str(tmp_path / "published.pth")]) == 2
    assert "exists, wanted a new path" in capsys.readouterr().err
    assert (
        main(["convert", "--source", str(tmp_path / "published.pth"), "--out", str(tmp_path / "back")]) == 2
    )
    assert "number of heads" in capsys.readouterr().err, "32 is no published width"


def test_env_names_what_runs_and_why(capsys: pytest.CaptureFixture) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "attention", "cpp", "triton", "C++ extension"):
        assert word in text


def test_published_checkpoint_serves_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A ViT-B-wide published file, one block deep, with a small tokenizer of 32 groups."""
    config = MAGEConfig.vit_b(
        **{"grid_size": 2, "codebook_size": 8, "encoder_depth": 1, "decoder_depth": 1},
        tokenizer=TokenizerConfig(
            image_size=4, codebook_size=8, codebook_dim=4, base_width=32, width_multipliers=(1, 1)
        ),
    )
    MAGE(config).save_pretrained(tmp_path / "ours")
    run_command(capsys, "convert", "--source", tmp_path / "ours", "--out", tmp_path / "mage.pth")
    run_command(capsys, "convert", "--source", tmp_path / "mage.pth", "--out", tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    run_command(
        capsys, "generate", "--model", tmp_path / "mage.pth", "--out", tmp_path / "images", "--count", 1
    )


@pytest.mark.slow
def test_demo_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from mage_fast.recipes import classifier, demo

    monkeypatch.setattr(demo, "FRECHET_IMAGES", 96)
    monkeypatch.setattr(classifier, "STEPS", 20)
    metrics = run_command(capsys, "demo", "--out", tmp_path, "--tokenizer-steps", 4, "--epochs", 1)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    for name in (
        *("tokenizer_psnr_db", "pretrain_loss_first", "pretrain_loss_last", "probe_top1"),
        *("probe_top1_random_encoder", "fid_generated", "fid_marginal_tokens"),
    ):
        assert np.isfinite(metrics[name]), name
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page.replace('charset="utf-8"', ""), "the page needs no network"
    assert Image.open(tmp_path / "samples.png").size[0] > 256
    run_command(capsys, "demo", "--out", tmp_path, "--tokenizer-steps", 4, "--epochs", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs run on this device")
def test_graphs_are_refused_on_a_cpu_before_a_folder_is_made(tokenizer: Path, tmp_path: Path) -> None:
    config = pretrain.PretrainConfig(tokenizer=tokenizer, out=tmp_path / "run", graph=True)
    with pytest.raises(InputError, match="graph=True with a model on cpu, wanted it on cuda"):
        pretrain.run(config)
    assert not config.out.exists()
