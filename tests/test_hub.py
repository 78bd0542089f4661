"""Model cards, and models from and to a hub; no network: its client is replaced at its functions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from mage_fast import (
    MAGE,
    MAGEC,
    VQGAN,
    CheckpointError,
    InputError,
    MAGEClassifier,
    MAGEConfig,
    TokenizerConfig,
)
from mage_fast import hub as hub_of_ours
from mage_fast.storage import read_config
from tests.models import build, draw_ids, tiny

ROOT = Path(__file__).parent.parent
TOKENIZER = TokenizerConfig(8, 32, 8, 8, (1, 2), 1, 4)


def hub_error(kind: type[Exception], message: str = "the hub's words\nin two lines") -> Exception:
    """An error as the client raises it, whatever of the answer its version keeps."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with folders for repositories, and the calls that reached it."""
    state = SimpleNamespace(folder=tmp_path / "hub", calls=[], fails=None)

    def called(name: str, **arguments: Any) -> Path:
        state.calls.append((name, arguments))
        if state.fails is not None:
            raise state.fails
        return state.folder / arguments["repo_id"]

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        return str(called("snapshot_download", repo_id=repo_id, **arguments))

    class HfApi:
        def __init__(self, token: str | None = None) -> None:
            state.token = token

        def create_repo(self, repo_id: str, **arguments: Any) -> None:
            called("create_repo", repo_id=repo_id, **arguments).mkdir(parents=True, exist_ok=True)

        def file_exists(self, repo_id: str, filename: str, **arguments: Any) -> bool:
            return (called("file_exists", repo_id=repo_id, **arguments) / filename).exists()

        def upload_folder(self, *, ignore_patterns: list[str] | None, **arguments: Any) -> Any:
            to = called("upload_folder", **arguments)
            for file in Path(arguments["folder_path"]).iterdir():
                if file.name not in (ignore_patterns or []):
                    shutil.copy(file, to)
            return SimpleNamespace(commit_url="https://hub.example/commit/1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return state


MODELS = {
    "mage": lambda: build(MAGEConfig.tiny(tokenizer=TOKENIZER)),
    "mage_without_tokenizer": lambda: build(tiny(num_classes=7)),
    "mage_c": lambda: build(tiny(), make=MAGEC),
    "vqgan": lambda: VQGAN(TOKENIZER),
    "classifier": lambda: MAGEClassifier(build(MAGEConfig.tiny(tokenizer=TOKENIZER)), num_classes=7),
}
KINDS = {"vqgan": "image-to-image", "classifier": "image-classification"}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_has_a_card_that_the_hub_reads(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mage-fast"
    assert card.data.pipeline_tag == KINDS.get(name, "unconditional-image-generation")
    assert "mage" in card.data.tags
    assert card.data.license is None
    assert ("tokenizer=yours" in card.text) == (name in ("mage_without_tokenizer", "mage_c"))
    assert ("7 classes" in card.text) == (name in ("mage_without_tokenizer", "classifier"))
    if "tokenizer=yours" not in card.text:
        code = card.text.split("```python\n")[1].split("```")[0].replace("owner/name", str(tmp_path))
        values: dict[str, Any] = {"images": torch.rand(2, 3, 8, 8)}
        exec(code, values)
        assert values["images"].shape[1:] == (3, 8, 8)
        assert name != "classifier" or values["logits"].shape == (2, 7)


def test_a_model_that_sees_features_is_said_to_make_features() -> None:
    config = MAGEConfig.tiny(tokenizer=TOKENIZER, encoder_input="features")
    assert huggingface_hub.ModelCard(hub_of_ours.card(config)).data.pipeline_tag == "image-feature-extraction"


def test_a_card_of_ones_own_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    VQGAN(TOKENIZER).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_card_of_an_earlier_save_does_not_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for classes in (7, 9):
        build(tiny(num_classes=classes)).save_pretrained(tmp_path)
        assert f"images of {classes} classes" in path.read_text()
    mine = path.read_text() + "Trained on photos of mine.\n"
    path.write_text(mine)
    build(tiny(num_classes=7), make=MAGEC).save_pretrained(tmp_path)
    assert path.read_text() == mine


def test_a_classifier_comes_back_from_the_hub(hub: SimpleNamespace) -> None:
    model = MODELS["classifier"]().eval()
    model.push_to_hub("someone/classifier")
    images = torch.rand(2, 3, 8, 8)
    back = MAGEClassifier.from_pretrained("someone/classifier", revision="v1")
    assert torch.equal(back(images), model(images))
    assert hub.calls[-1][1]["revision"] == "v1"


def test_a_model_goes_to_the_hub_and_comes_back(hub: SimpleNamespace) -> None:
    model = build(tiny())
    ids = draw_ids(model.config, 2)
    url = model.push_to_hub("someone/my-mage.1", license="cc-by-nc-4.0", private=True, token="t")
    assert url == "https://hub.example/commit/1"
    assert hub.token == "t"
    folder = hub.folder / "someone/my-mage.1"
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.license == "cc-by-nc-4.0"
    assert dict(hub.calls)["create_repo"] == {
        "repo_id": "someone/my-mage.1",
        "private": True,
        "exist_ok": True,
    }
    back = MAGE.from_pretrained("someone/my-mage.1", revision="v1")
    assert torch.equal(back.features(ids), model.features(ids))
    name, arguments = hub.calls[-1]
    files = ["config.json", "model.safetensors"]
    assert (name, arguments["revision"], arguments["allow_patterns"]) == ("snapshot_download", "v1", files)


def test_a_card_on_the_hub_stays(hub: SimpleNamespace) -> None:
    tokenizer = VQGAN(TOKENIZER)
    tokenizer.push_to_hub("someone/vqgan")
    card = hub.folder / "someone/vqgan/README.md"
    card.write_text("mine")
    tokenizer.push_to_hub("someone/vqgan")
    assert card.read_text() == "mine"
    back = VQGAN.from_pretrained("someone/vqgan")
    assert read_config(hub.folder / "someone/vqgan") == back.config.to_dict() | {"width_multipliers": [1, 2]}


def test_what_is_here_is_not_looked_for_elsewhere(
    hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tiny()).save_pretrained("out/model")
    assert MAGE.from_pretrained("out/model").config == tiny()
    for missing in (Path("no/such"), "no", "./no/such", "/no/such", "no/such/folder", "../no/such"):
        with pytest.raises(CheckpointError, match="no such file"):
            MAGE.from_pretrained(missing)
        with pytest.raises(CheckpointError, match="no such file"):
            VQGAN.from_pretrained(missing)
    with pytest.raises(InputError, match="out/model: revision is 'v1', wanted none: this is a path"):
        MAGE.from_pretrained("out/model", revision="v1")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.RepositoryNotFoundError), "the hub has no such repository, or it is private"),
        (hub_error(errors.GatedRepoError), "gives access on request"),
        (hub_error(errors.RevisionNotFoundError), "the repository has no revision 'v9'"),
        (hub_error(errors.LocalTokenNotFoundError), "nobody is logged in to the hub"),
        (hub_error(errors.HfHubHTTPError), "the hub refuses: the hub's words in two lines$"),
        (hub_error(errors.HFValidationError), "the hub refuses: the hub's words in two lines$"),
        (hub_error(errors.LocalEntryNotFoundError), "the hub cannot be reached"),
        (hub_error(errors.HTTPError), "the hub cannot be reached"),
        (hub_error(errors.OfflineModeIsEnabled), "the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_answers_is_told_in_a_line(hub: SimpleNamespace, error: Exception, message: str) -> None:
    hub.fails = error
    with pytest.raises(CheckpointError, match=message) as caught:
        MAGE.from_pretrained("no/such", revision="v9")
    assert str(caught.value).startswith("no/such: no such file or folder here; ")
    with pytest.raises(CheckpointError, match=message) as caught:
        VQGAN(TOKENIZER).push_to_hub("no/such", revision="v9")
    assert str(caught.value).startswith("push_to_hub: no/such; ")
    assert "\n" not in str(caught.value)


def test_offline_it_says_so_in_a_process_that_has_not_imported_the_client(tmp_path: Path) -> None:
    code = """
import mage_fast
try:
    mage_fast.VQGAN.from_pretrained("no/such")
except mage_fast.CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("no/such: no such file or folder here; the hub cannot be reached"), (
        done.stderr
    )


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"no/such: no such file or folder here; .*'mage-fast\[hub\]'"):
        MAGE.from_pretrained("no/such")
    with pytest.raises(InputError, match=r"'mage-fast\[hub\]'"):
        VQGAN(TOKENIZER).push_to_hub("no/such")


@pytest.mark.parametrize("name", ["a--b/c", "a/b.git", "a/" + 97 * "b"])
def test_names_that_the_hub_would_not_take_end_in_a_line(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder here; the hub refuses: "):
        VQGAN.from_pretrained(name)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (MAGE, {"dropout": "much"}, "MAGEConfig: a value is missing or of another type"),
        (MAGE, {"tokenizer": 5}, "MAGEConfig: a value is missing or of another type"),
        (MAGE, {"tokenizer": {"width_multipliers": 5}}, "TokenizerConfig: a value is missing or of"),
        (MAGE, {"mlp_ratio": -1}, "MAGEConfig: mlp_ratio is -1, wanted more than 0"),
        (VQGAN, {"width_multipliers": "ab"}, "TokenizerConfig: a value is missing or of another type"),
        (VQGAN, {"codebook_size": 10**13}, r"has shape \(32, 8\), wanted \(10000000000000, 8\)"),
        (MAGEClassifier, {"num_classes": None}, "ClassifierConfig: num_classes is None, wanted 2 or more"),
        (MAGEClassifier, {"mage": None}, "ClassifierConfig: mage is None, wanted a MAGEConfig"),
    ],
)
def test_a_configuration_from_elsewhere_is_not_trusted(
    model: type, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    name = {MAGE: "mage", VQGAN: "vqgan", MAGEClassifier: "classifier"}[model]
    MODELS[name]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((ValueError, CheckpointError), match=message):
        model.from_pretrained(tmp_path)  # type: ignore[attr-defined]


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "a/.b", "-a/b", "../b", "a b/c", ""])
def test_only_an_owner_and_a_name_are_a_repository(repo_id: str, hub: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="wanted owner/name"):
        VQGAN(TOKENIZER).push_to_hub(repo_id)
    assert hub.calls == []
