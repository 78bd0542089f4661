"""``mage-fast evaluate``: equal to torch-fidelity on the same files; references are computed once."""

from __future__ import annotations

import json
import shutil
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mage_fast import VQGAN, MAGEConfig
from mage_fast.cli import main
from mage_fast.errors import InputError
from mage_fast.evaluation import read_statistics, reconstruction
from mage_fast.model import MAGE
from mage_fast.optional import optional
from mage_fast.recipes import classifier, evaluate
from mage_fast.recipes.evaluate import EvaluateConfig
from mage_fast.training.metrics import frechet_distance, psnr_db, save_png, to_uint8

SIZE = 16


class Small(nn.Module):
    """Features and logits of uint8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.float() / 32)
        return features, self.head(features) * 4


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def files(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated images, real ones, features, a tokenizer and a model."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(1)
    torch.jit.script(small).save(str(folder / "small.pt"))
    for name, count, shift in (("generated", 30, 0.2), ("real", 40, 0.0)):
        (folder / name).mkdir()
        images = torch.rand(count, 3, 4, 4, generator=generator) ** 2 + shift
        for index, image in enumerate(images.repeat_interleave(4, 2).repeat_interleave(4, 3)):
            save_png(image, folder / name / f"{index:06d}.png")
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny())
    model.save_pretrained(folder / "model")
    assert isinstance(model.tokenizer, VQGAN)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def config_of(files: Path, tmp_path: Path, **changes: Any) -> EvaluateConfig:
    wanted: dict[str, Any] = {
        "images": files / "generated",
        "reference": f"folder:{files / 'real'}",
        "split": "all",
        "features": f"torchscript:{files / 'small.pt'}",
        "cache": tmp_path / "cache",
        "batch_size": 7,
        "device": "cpu",
    }
    return EvaluateConfig(**wanted | changes)


def images_in(folder: Path) -> Tensor:
    files = sorted(folder.glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def test_equal_to_torch_fidelity_called_on_the_folders(files: Path, tmp_path: Path, small: nn.Module) -> None:
    base = optional("torch_fidelity.feature_extractor_base", extra="evaluate").FeatureExtractorBase
    torch_fidelity = optional("torch_fidelity", extra="evaluate")

    class SmallOfTorchFidelity(base):  # type: ignore[misc, valid-type]
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)
            self.small = small

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found = dict(zip(("features", "logits"), self.small(images), strict=True))
            return tuple(found[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

    torch_fidelity.register_feature_extractor("small", SmallOfTorchFidelity)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(files / "generated"),
        input2=str(files / "real"),
        feature_extractor="small",
        **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
        **{"kid_subset_size": 30, "cuda": False, "cache": False, "verbose": False},
        save_cpu_ram=True,  # loads in this process
    )
    ours = evaluate.run(config_of(files, tmp_path))
    # theirs sums means in float32
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    for mine, name in (
        ("inception_score", "inception_score_mean"),
        ("inception_score_std", "inception_score_std"),
        ("kid", "kernel_inception_distance_mean"),
        ("kid_std", "kernel_inception_distance_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert ours[mine] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), mine
    x_ND, y_MD = (small(images_in(files / name))[0] for name in ("generated", "real"))
    assert ours["fid"] == pytest.approx(frechet_distance(x_ND, y_MD), rel=1e-6)


def test_the_convention_is_printed_and_stored(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "score.json"
    arguments = ("evaluate", "--images", files / "generated", "--reference", f"folder:{files / 'real'}")
    options = ("--split", "all", "--features", f"torchscript:{files / 'small.pt'}", "--out", out)
    assert main([str(x) for x in (*arguments, *options, "--cache", tmp_path / "cache")]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads(out.read_text())
    convention = result["convention"]
    assert convention["images"]["count"] == 30
    assert convention["reference"]["count"] == 40
    assert convention["reference"]["split"] == "all"
    assert convention["features"]["name"] == "torchscript"
    assert convention["features"]["width"] == 12
    said = " ".join(captured.err.split())
    assert "30 images: not comparable with published figures, which are of 50000" in said
    assert f"data folder:{files / 'real'}, split all, count 40, size 16, crop short side to 16" in said
    assert result["notes"]["kid"].startswith("100 subsets of 30 images (published figures: 1000)")


def test_a_reference_is_computed_once(files: Path, tmp_path: Path) -> None:
    first = evaluate.run(config_of(files, tmp_path))
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith(f"folder-all-{SIZE}px-torchscript-")
    assert first["convention"]["reference"]["statistics"] == str(path)
    assert evaluate.run(config_of(files, tmp_path)) == first
    # what lies there is what is read
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"mu": arrays["mu"] + 1})
    again = evaluate.run(config_of(files, tmp_path))
    assert abs(again["fid"] - first["fid"]) > 1
    # given as a file, it is the same reference; as that of other features it is refused
    np.savez(path, **arrays)
    given = evaluate.run(config_of(files, tmp_path, reference=str(path)))
    assert {k: given[k] for k in ("fid", "kid", "recall")} == {k: first[k] for k in ("fid", "kid", "recall")}
    convention = json.loads(str(arrays["convention"]))
    convention["features"]["sha256"] = "0"
    np.savez(path, **arrays | {"convention": np.array(json.dumps(convention))})
    with pytest.raises(InputError, match=r"is of other features .*, wanted torchscript's"):
        evaluate.run(config_of(files, tmp_path, reference=str(path)))
    with pytest.raises(InputError, match=rf"{path.name} holds statistics of something else"):
        evaluate.run(config_of(files, tmp_path))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=rf"{path.name}: not a whole \.npz file"):
        evaluate.run(config_of(files, tmp_path))
    # another split or another size is another file
    evaluate.run(config_of(files, tmp_path, split="test"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_images_that_changed_under_their_names_are_read_anew(files: Path, tmp_path: Path) -> None:
    real = shutil.copytree(files / "real", tmp_path / "real")
    changes = {"reference": f"folder:{real}"}
    first = evaluate.run(config_of(files, tmp_path, **changes))
    for path in real.iterdir():
        shutil.copy(files / "generated" / "000003.png", path)
    second = evaluate.run(config_of(files, tmp_path, **changes))
    fresh = evaluate.run(config_of(files, tmp_path, **changes, cache=tmp_path / "other"))
    assert second["fid"] == fresh["fid"]
    assert second["fid"] != first["fid"]


def test_statistics_of_adm_layout_give_a_fid_and_say_what_they_do_not_give(
    files: Path, tmp_path: Path, small: nn.Module
) -> None:
    y_MD = small(images_in(files / "real"))[0].double().numpy()
    mu, sigma = y_MD.mean(0), np.cov(y_MD, rowvar=False)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    result = evaluate.run(config_of(files, tmp_path, reference=str(tmp_path / "adm.npz")))
    assert result["fid"] == pytest.approx(evaluate.run(config_of(files, tmp_path))["fid"], rel=1e-6)
    assert result["kid"] is None
    assert "a mean and a covariance are known" in result["notes"]["kid"]
    assert result["convention"]["reference"]["layout"].startswith("mu and sigma (ADM's)")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(InputError, match=r"adm\.npz is of 7 features, torchscript has 12"):
        evaluate.run(config_of(files, tmp_path, reference=str(tmp_path / "adm.npz")))


def test_a_tokenizer(files: Path, tmp_path: Path, small: nn.Module) -> None:
    changes: dict[str, Any] = {"images": None, "reference": None, "tokenizer": files / "tokenizer"}
    changes["data"] = f"folder:{files / 'real'}"
    result = evaluate.run(config_of(files, tmp_path, **changes, out=tmp_path / "tokenizer.json"))
    tokenizer = VQGAN.from_pretrained(files / "tokenizer").eval()
    originals = images_in(files / "real")
    originals_B3HW = originals.float() / 255
    with torch.no_grad():
        decoded_B3HW = tokenizer.decode(tokenizer.encode(originals_B3HW)).clamp(0, 1)
    assert result["convention"]["reference"]["count"] == 40
    assert result["psnr_db"] == pytest.approx(psnr_db(decoded_B3HW, originals_B3HW), rel=1e-6)
    ssim = optional("torchmetrics.functional.image", extra="evaluate").structural_similarity_index_measure
    assert result["ssim"] == pytest.approx(
        ssim(decoded_B3HW, originals_B3HW, data_range=1.0).item(), rel=1e-5
    )
    x_ND, y_ND = (small(images)[0] for images in (to_uint8(decoded_B3HW), originals))
    assert result["rfid"] == pytest.approx(frechet_distance(x_ND, y_ND), rel=1e-4)
    assert result["lpips"] is None
    assert "--lpips" in result["notes"]["lpips"]
    with Image.open(tmp_path / "tokenizer.png") as picture:
        assert picture.size == (8 * (64 + 2) - 2, 4 * (64 + 2) - 2)
        shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    columns = [shown[:, :, left : left + 64 : 4] for left in range(0, 8 * 66, 66)]  # each pixel is 4 x 4
    for column in columns:
        above, below = (column[:, top : top + 64 : 4] for top in (0, 66))
        (which,) = torch.nonzero((originals == above).flatten(1).all(1))
        assert torch.equal(below, to_uint8(decoded_B3HW[which[0]]))
    bare = evaluate.run(config_of(files, tmp_path, **changes | {"features": "none"}))
    assert bare["rfid"] is None
    assert bare["psnr_db"] == result["psnr_db"]


class Absolute:
    """Stands in for LPIPS, whose weights are a download."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []

    def update(self, images: Tensor, others: Tensor) -> None:
        self.distances.append((images - others).abs().mean((1, 2, 3)))

    def compute(self) -> Tensor:
        return torch.cat(self.distances).mean()


def test_lpips_is_computed_where_asked_for_or_says_why_not(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"images": None, "reference": None, "tokenizer": files / "tokenizer", "features": "none"}
    config = config_of(files, tmp_path, **changes, lpips=True, data=f"folder:{files / 'real'}")
    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "load_lpips", lambda device: Absolute())
        assert 0 < evaluate.run(config)["lpips"] < 1
    api = optional("torchvision.models._api", extra="evaluate")

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(api, "load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"VGG16 weights cannot be fetched .*no network.*leave --lpips out"):
        evaluate.run(config)


def test_the_models_own_features_and_the_digits_classifiers(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluate.run(config_of(files, tmp_path, features=f"model:{files / 'model'}"))
    model = MAGE.from_pretrained(files / "model").eval()
    with torch.no_grad():
        x, y = (model.features(images_in(files / name).float() / 255) for name in ("generated", "real"))
    assert result["fid"] == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert result["inception_score"] is None
    monkeypatch.setattr(classifier, "STEPS", 5)
    state = torch.get_rng_state()
    digits = config_of(files, tmp_path, features="digits", reference="digits", split="train")
    result = evaluate.run(digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1 <= result["inception_score"] <= 10
    (path,) = (tmp_path / "cache").glob("digits-train-16px-digits-*.npz")
    assert read_statistics(path)[0].count == 1438


def test_wrong_input_is_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "oblong").mkdir()
    Image.new("RGB", (20, 16)).save(tmp_path / "oblong" / "0.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "one" / "0.png")
    torch.jit.script(nn.Flatten(2)).save(str(tmp_path / "flat.pt"))
    (tmp_path / "text.pt").write_text("no program")
    images = ("--images", files / "generated", "--reference", "digits")
    for arguments, wanted in (
        ((), "wanted --images with --reference, or --tokenizer"),
        ((*images, "--tokenizer", files / "tokenizer"), "wanted --images with --reference, or --tokenizer"),
        (images[:2], "--images wants --reference"),
        (("--tokenizer", files / "tokenizer", "--reference", "digits"), "is scored on --data"),
        ((*images, "--features", "resnet"), "unknown features 'resnet', wanted one of inception"),
        ((*images, "--features", "none"), "--images wants --reference and --features"),
        (
            (*images, "--features", f"torchscript:{tmp_path / 'flat.pt'}"),
            "2 images gave [(2, 3, 256)], wanted",
        ),
        ((*images, "--features", f"torchscript:{tmp_path / 'text.pt'}"), "not a whole TorchScript file"),
        ((*images, "--features", f"inception:{tmp_path / 'w.pth'}"), "w.pth"),
        ((*images, "--features", f"model:{files / 'tokenizer'}"), "holds a tokenizer, wanted a model"),
        ((*images[:3], "imagenet"), "unknown data source 'imagenet'"),
        ((*images[:3], f"folder:{tmp_path / 'empty'}"), "holds no PNG, JPEG"),
        (("--images", tmp_path / "empty", *images[2:]), "holds no PNG files"),
        (("--images", tmp_path / "oblong", *images[2:]), "20 x 16 pixels, wanted squares"),
        ((*images, "--out", tmp_path / "result.txt"), "wanted a .json file"),
        ((*images, "--out", tmp_path / "text.pt" / "x.json"), "text.pt is a file"),
        ((*images, "--out", tmp_path / "folder.json"), "folder.json is a folder, wanted a .json file"),
        ((*images, "--cache", tmp_path / "text.pt" / "x"), "text.pt is a file"),
        (("--images", tmp_path / "one", *images[2:]), "holds 1 image, wanted two or more"),
        ((*images, "--batch-size", 0), "batch_size 0"),
    ):
        options = ("--cache", tmp_path / "cache", "--device", "cpu")
        assert main([str(x) for x in ("evaluate", *options, *arguments)]) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("mage-fast: error: ")]
        assert len(lines) == 1, captured.err
        assert wanted in lines[0]
    assert not (tmp_path / "cache").exists()


def test_a_missing_extra_is_named_before_any_work(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    with pytest.raises(InputError, match=r"torchmetrics does not load: pip install 'mage-fast\[evaluate\]'"):
        evaluate.run(config_of(files, tmp_path))
    assert not (tmp_path / "cache").exists()
