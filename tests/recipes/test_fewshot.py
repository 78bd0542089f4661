"""Few-shot and transfer on folders of small digits: the draws, the classifier by hand, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mage_fast.cli import parse
from mage_fast.config import MAGEConfig
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.recipes import fewshot, transfer
from mage_fast.recipes.features import Features
from mage_fast.recipes.fewshot import FewshotConfig, draw_shots, few_shot_accuracy
from mage_fast.recipes.transfer import TransferConfig, short_names


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``low`` and ``high``, 15 images of two or three digits each, 12 of them for training; ``model``."""
    folder = tmp_path_factory.mktemp("fewshot")
    digits = load_digits()
    for name, labels in (("low", (0, 1)), ("high", (6, 7, 8))):
        for label in labels:
            (folder / name / str(label)).mkdir(parents=True)
            for number, pixels in enumerate(digits.images[digits.target == label][:15]):
                image = Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8))
                image.save(folder / name / str(label) / f"{number}.png")
    torch.manual_seed(0)
    MAGE(MAGEConfig.tiny()).save_pretrained(folder / "model")
    return folder


def few(made: Path, **changes: Any) -> FewshotConfig:
    options = {"model": made / "model", "data": f"folder:{made / 'high'}", "shots": (2, 12), "seeds": 3}
    return FewshotConfig(**(options | {"device": "cpu"} | changes))


def several(made: Path, *names: str, **changes: Any) -> TransferConfig:
    data = tuple(name if name == "digits" else f"folder:{made / name}" for name in names)
    return TransferConfig(data, **({"model": made / "model", "device": "cpu", "shots": 12} | changes))


def test_draws_are_balanced_nested_and_of_the_seed() -> None:
    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))
    for shots in (1, 5, 20):
        chosen = draw_shots(labels, shots, 3)
        assert torch.bincount(labels[chosen]).tolist() == [shots] * 4
        assert len(chosen.unique()) == len(chosen)
        assert set(chosen.tolist()) <= set(draw_shots(labels, 25, 3).tolist())
        assert torch.equal(chosen, draw_shots(labels, shots, 3))
    assert not torch.equal(draw_shots(labels, 5, 3), draw_shots(labels, 5, 4))
    # every item has the same chance: 5 of about 50, over 400 draws
    counts = torch.bincount(torch.cat([draw_shots(labels, 5, seed) for seed in range(400)]), minlength=200)
    expected = 400 * 5 / torch.bincount(labels)[labels]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 300, "200 degrees of freedom: 1 in 10,000 is above 280"


def test_a_draw_is_scored_as_scikit_learn_does() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (90, 60):
        labels = torch.randint(3, (count,), generator=generator)
        noise = torch.randn(1, count, 8, generator=generator)
        parts.append(Features(noise + 1.5 * torch.nn.functional.one_hot(labels, 8), labels))
    chosen = draw_shots(parts[0].labels_N, 10, 1).numpy()
    x, y = parts[0].features_HND[0].double().numpy()[chosen], parts[0].labels_N.numpy()[chosen]
    x_test, y_test = parts[1].features_HND[0].double().numpy(), parts[1].labels_N.numpy()
    x, x_test = (
        (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-6) for v in (x, x_test)
    )
    mean, scale = x.mean(0), np.sqrt(x.var(0) + 1e-6)
    classifier = LogisticRegression(max_iter=1000).fit((x - mean) / scale, y)
    wanted = classifier.score((x_test - mean) / scale, y_test)
    assert 0.5 < wanted < 1
    assert few_shot_accuracy(*parts, 10, 1) == wanted


def test_fewshot_leaves_a_table_and_a_plot(made: Path, tmp_path: Path, capsys: Any) -> None:
    found = fewshot.run(few(made, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "fewshot.json").read_text()) == found
    assert Image.open(tmp_path / "out" / "fewshot.png").size[0] > 300
    assert [row["shots"] for row in found["shots"]] == [2, 12]
    for row in found["shots"]:
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["deviation"] == pytest.approx(np.std(row["accuracies"], ddof=1))
    # all 12 images of each class in every draw, in another order
    assert found["shots"][1]["deviation"] == pytest.approx(0, abs=1e-12)
    said = capsys.readouterr()
    assert "3 draws" in said.err
    assert not said.out
    assert fewshot.run(few(made, out=tmp_path / "out")) == found


def test_transfer_is_fewshot_on_each(made: Path, tmp_path: Path) -> None:
    found = transfer.run(several(made, "high", "low", out=tmp_path / "out", seeds=2, shots=3))
    assert json.loads((tmp_path / "out" / "transfer.json").read_text()) == found
    assert Image.open(tmp_path / "out" / "transfer.png").size[0] > 300
    assert [(row["name"], row["classes"]) for row in found["data"]] == [("high", 3), ("low", 2)]
    assert [row["chance"] for row in found["data"]] == pytest.approx([1 / 3, 1 / 2])
    alone = fewshot.run(few(made, shots=(3,), seeds=2))
    assert found["data"][0]["accuracies"] == alone["shots"][0]["accuracies"]


def test_names_in_tables() -> None:
    assert short_names(["digits", "folder:/a/cars", "hf:user/pets"]) == ["digits", "cars", "pets"]
    assert short_names(["folder:/a/x", "folder:/b/x"]) == ["folder:/a/x", "folder:/b/x"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": (5, 13)}, "class 6 has 12 training images, wanted at least the 13"),
        ({"shots": ()}, r"shots \[\]"),
        ({"shots": (0, 5)}, r"shots \[0, 5\]"),
        ({"shots": (5, 5)}, "different shots"),
        ({"seeds": 0}, "seeds 0"),
        ({"block": 9}, "block is 9"),
        ({"data": "digits:3"}, "unknown data source"),
    ],
)
def test_what_fewshot_refuses(made: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fewshot.run(few(made, **({"out": tmp_path / "out"} | changes)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("high", "high"), {}, "wanted one or more, each once"),
        ((), {}, "wanted one or more"),
        (("high", "low"), {"shots": 13}, "high: class 6 has 12"),
        (("high", "low/0"), {}, "has 1 class"),
        (("high", "nowhere"), {}, "there is no such folder"),
    ],
)
def test_what_transfer_refuses_before_it_reads(
    made: Path, tmp_path: Path, names: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        transfer.run(several(made, *names, out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folder_s_place(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(InputError, match="out is a file, wanted a folder for the result"):
            fewshot.run(few(made, out=out))


def test_options_of_the_command_line() -> None:
    assert parse(["probe", "--block", "all"]).block == "all"
    assert parse(["probe", "--block", "1", "--head.views", "2"]).block == 1
    assert parse(["fewshot", "--shots", "5", "10"]).shots == (5, 10)
    assert parse(["transfer", "--data", "digits", "folder:x"]).data == ("digits", "folder:x")
