"""The loading and plumbing of InceptionV3, on random weights: the published ones are a download."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from mage_fast.errors import CheckpointError, InputError
from mage_fast.evaluation import load_inception
from mage_fast.optional import optional

module = optional("torch_fidelity.feature_extractor_inceptionv3", extra="evaluate")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """torch-fidelity's own, with weights that were drawn."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        return module.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_features_are_torch_fidelitys(network: nn.Module, weights: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    features_BD, logits_BK = load_inception(weights)(images)
    assert features_BD.shape == (2, 2048)
    assert logits_BK.shape == (2, 1008)
    for found, wanted in zip((features_BD, logits_BK), network(images), strict=True):
        assert torch.equal(found, wanted)
    assert wanted.std() > 0


def test_safetensors_are_read_too(network: nn.Module, tmp_path: Path) -> None:
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    found = load_inception(tmp_path / "weights.safetensors").state_dict()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_weights_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, layers: list[str], feature_extractor_weights_path: BytesIO) -> nn.Module:
        network = nn.Linear(2, 1)
        network.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        return network

    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", build)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    state = nn.Linear(2, 1).state_dict()
    torch.save(state, tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    served = (tmp_path / "weights").rename(tmp_path / f"weights-{digest[:8]}.pth")
    monkeypatch.setattr(module, "URL_INCEPTION_V3", served.as_uri())
    assert torch.equal(load_inception().state_dict()["weight"], state["weight"])
    wrong = served.rename(tmp_path / "weights-00000000.pth")
    assert torch.equal(load_inception().state_dict()["weight"], state["weight"])
    monkeypatch.setattr(module, "URL_INCEPTION_V3", wrong.as_uri())
    with pytest.raises(InputError, match=r"weights-00000000\.pth cannot be fetched \(invalid hash"):
        load_inception()
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), "bomb")
    digest = hashlib.sha256(Path("bomb").read_bytes()).hexdigest()
    bomb = (tmp_path / "bomb").rename(tmp_path / f"bomb-{digest[:8]}.pth")
    monkeypatch.setattr(module, "URL_INCEPTION_V3", bomb.as_uri())
    with pytest.raises(CheckpointError, match=rf"hub/checkpoints/{bomb.name}"):
        load_inception()
    assert not Path("exploded").exists()
    monkeypatch.setattr(module, "URL_INCEPTION_V3", (tmp_path / "gone-00000000.pth").as_uri())
    with pytest.raises(
        InputError, match=r"gone-00000000\.pth cannot be fetched .* --features inception:FILE"
    ):
        load_inception()


def test_files_of_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Bomb()}, "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb\.pth"):
        load_inception("bomb.pth")
    assert not Path("exploded").exists()
    for content in ({"conv.weight": torch.zeros(3)}, [1, 2], 3):
        torch.save(content, "other.pth")
        with pytest.raises(InputError, match=r"other\.pth: not InceptionV3's weights"):
            load_inception("other.pth")
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        load_inception("missing.pth")
