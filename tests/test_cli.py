"""Bad input at the command line: one clear line, exit code 2, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mage_fast import MAGE, VQGAN, MAGEConfig
from mage_fast.cli import main
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.token_cache import TokenCacheWriter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer, untrained."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny())
    model.save_pretrained(folder / "model")
    assert isinstance(model.tokenizer, VQGAN)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("mage-fast: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_an_unknown_data_source(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for verb, option in (("pretrain", "--tokenizer"), ("tokenize", "--tokenizer"), ("probe", "--model")):
        out = tmp_path / verb
        path = saved / option.removeprefix("--")
        line = fails(capsys, verb, option, path, "--data", "imagenet", "--out", out)
        assert "unknown data source 'imagenet', wanted one of digits, folder:PATH" in line
        assert not out.exists()
    line = fails(capsys, "train-tokenizer", "--data", "lmdb:x", "--out", tmp_path / "t")
    assert "unknown data source 'lmdb:x'" in line


def test_an_image_smaller_than_the_crop(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (20, 15 if index == 2 else 20)).save(tmp_path / "images" / f"{index}.png")
    line = fails(
        capsys,
        *("pretrain", "--data", f"folder:{tmp_path / 'images'}", "--augment", "window"),
        *("--tokenizer", saved / "tokenizer", "--out", tmp_path / "run", "--preset", "small"),
        *("--batch-size", 1, "--epochs", 1, "--warmup-epochs", 0),
    )
    assert "2.png is 20 x 15 pixels, wanted at least the crop of 16 x 16" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_truncated_safetensors_file(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (saved / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    before = files(tmp_path)
    line = fails(capsys, "generate", "--model", folder, "--out", tmp_path / "images")
    assert "model.safetensors: not a whole safetensors file" in line
    assert files(tmp_path) == before


def test_a_checkpoint_of_another_width(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "model"
    MAGE(MAGEConfig.tiny(encoder_width=48)).save_pretrained(folder)
    (folder / "config.json").write_bytes((saved / "model" / "config.json").read_bytes())
    before = files(tmp_path)
    line = fails(capsys, "probe", "--model", folder, "--out", tmp_path / "probe")
    assert "has shape" in line
    assert "wanted" in line
    assert files(tmp_path) == before


def test_a_folder_with_another_run_is_left_alone(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--tokenizer", saved / "tokenizer", "--out", tmp_path / "run", "--preset", "small")
    sizes = ("--batch-size", 700, "--epochs", 1, "--warmup-epochs", 0)
    assert main([str(x) for x in ("pretrain", *options, *sizes)]) == 0
    capsys.readouterr()
    before = files(tmp_path)
    line = fails(capsys, "pretrain", *options, *sizes[2:], "--batch-size", 600)
    assert "holds a run with batch_size 700 and not 600: give another --out" in line
    assert files(tmp_path) == before


def test_wrong_numbers(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, tokenizer = saved / "model", saved / "tokenizer"
    out = ("--out", tmp_path / "out")
    cases = {
        "labels holds 11, wanted 0 <= labels < 11": ("generate", "--model", model, *out, "--label", 11),
        "count 0": ("generate", "--model", model, *out, "--count", 0),
        "block is 7, wanted 0 <= block < 2": ("probe", "--model", model, *out, "--block", 7),
        "epochs 0": ("pretrain", "--tokenizer", tokenizer, *out, "--epochs", 0),
        "wanted at least batch_size 4096": ("pretrain", "--tokenizer", tokenizer, *out, "--batch-size", 4096),
        "mask_ratio_min is 1.5, wanted a ratio in [0, 1]": (
            *("pretrain", "--tokenizer", tokenizer, *out, "--model.mask-ratio-min", 1.5),
        ),
        "wanted at most the lowest mask ratio 0.5": (
            *("pretrain", "--tokenizer", tokenizer, *out, "--model.drop-ratio", 0.75),
        ),
        "views 0": ("tokenize", "--tokenizer", tokenizer, *out, "--views", 0),
        "device is 'gpu'": ("tokenize", "--tokenizer", tokenizer, *out, "--device", "gpu"),
        "holds a tokenizer, wanted a model": ("probe", "--model", tokenizer),
        "there is no model at": ("probe", "--model", tmp_path / "nothing"),
        "there is no tokenizer at": ("pretrain", "--tokenizer", tmp_path / "nothing", *out),
        "there is no such folder": ("tokenize", "--tokenizer", tokenizer, *out, "--data", "folder:/nowhere"),
    }
    for message, arguments in cases.items():
        assert message in fails(capsys, *arguments), message
    assert not (tmp_path / "out").exists()


def test_an_id_outside_the_codebook(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A cache that claims to be of this tokenizer and holds an id it does not have."""
    fingerprint = module_fingerprint(VQGAN.from_pretrained(saved / "tokenizer"))
    with TokenCacheWriter(
        tmp_path / "tokens", length=16, codebook_size=99, tokenizer_fingerprint=fingerprint, split="train"
    ) as writer:
        writer.append(torch.full((64, 16), 32), torch.zeros(64, dtype=torch.int64))
    data = f"tokens:{tmp_path / 'tokens'}"
    out = tmp_path / "run"
    line = fails(capsys, "pretrain", "--tokenizer", saved / "tokenizer", "--data", data, "--out", out)
    assert "ids holds 32, wanted 0 <= ids < 32" in line
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--sampler.steps", "0"), "SamplerConfig: steps is 0, wanted at least 1"),
        (("train-tokenizer", "--steps", "0"), "train-tokenizer: steps is 0, wanted 1 or more"),
        (("generate", "--count", "x"), "--count: invalid literal"),
        (("train-tokenizer", "--model.image-size", "30"), "image_size is 30, wanted a multiple of 4"),
    ],
)
def test_a_setting_out_of_range_is_one_line_too(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    """The option parser makes the dataclasses, so a wrong value ends there."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mage-fast: error: ")
    assert message in lines[0]


def test_an_unknown_option_exits_with_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", "--no-such-option", "1"])
    assert exit_.value.code == 2
    assert "no-such-option" in capsys.readouterr().err
