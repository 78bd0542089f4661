"""Published layout to ours and back, and what the files refuse."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mage_fast import checkpoint, reference
from mage_fast.checkpoint import CheckpointError, from_published, load_published, to_published
from mage_fast.config import MAGEConfig
from mage_fast.tokenizer import VQGAN
from tests.published_layout import mage_layout, unused_layout

TINY = MAGEConfig.tiny(decoder_width=24)


def meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def tiny_published(**changes: Any) -> dict[str, Tensor]:
    """The state dict of a tiny reference model: the published layout by construction."""
    torch.manual_seed(0)
    return dict(reference.MAGE.from_config(TINY.replace(**changes)).state_dict())


def our_names(encoder_depth: int, decoder_depth: int) -> set[str]:
    """The library's names, without the tokenizer's."""
    names = {"embedding.word_embeddings.weight", "embedding.position_embeddings.weight"}
    names |= {"decoder.position_embeddings", "head.bias"}
    layers = ["embedding.norm", "encoder.norm", "decoder.embed", "decoder.norm", "head.fc", "head.norm"]
    for part, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        for n in range(depth):
            for layer in ("norm1", "attention.qkv", "attention.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                layers.append(f"{part}.blocks.{n}.{layer}")
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_vit_b_layout() -> None:
    published = mage_layout()
    assert len(published) == 433
    ours, config = from_published(meta(published))
    assert config == MAGEConfig.vit_b()
    assert {name for name in ours if not name.startswith("tokenizer.")} == our_names(12, 8)
    assert {name: tuple(x.shape) for name, x in ours.items()} == checkpoint.our_shapes(config)
    exported = to_published(ours, config)
    assert {name: tuple(x.shape) for name, x in exported.items()} == published


def test_vit_l_layout() -> None:
    _, config = from_published(meta(mage_layout(1024, 24, 1024)))
    assert config == MAGEConfig.vit_l()


def test_exported_layout_of_the_reference_model() -> None:
    with torch.device("meta"):
        reference.vit_b().load_state_dict(
            to_published(meta(checkpoint.our_shapes(MAGEConfig())), MAGEConfig())
        )


def test_each_tensor_goes_where_its_name_says() -> None:
    published = tiny_published()
    ours, _ = from_published(published, TINY)
    for theirs, mine in (
        ("token_emb.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("token_emb.LayerNorm.bias", "embedding.norm.bias"),
        ("blocks.1.attn.qkv.weight", "encoder.blocks.1.attention.qkv.weight"),
        ("blocks.0.mlp.fc1.bias", "encoder.blocks.0.mlp.fc1.bias"),
        ("norm.weight", "encoder.norm.weight"),
        ("decoder_embed.weight", "decoder.embed.weight"),
        ("decoder_pos_embed_learned", "decoder.position_embeddings"),
        ("decoder_blocks.1.norm2.weight", "decoder.blocks.1.norm2.weight"),
        ("decoder_norm.bias", "decoder.norm.bias"),
        ("mlm_layer.fc.weight", "head.fc.weight"),
        ("mlm_layer.ln.bias", "head.norm.bias"),
        ("mlm_layer.bias", "head.bias"),
        ("vqgan.encoder.mid.block_1.norm1.bias", "tokenizer.encoder.mid.block_1.norm1.bias"),
    ):
        assert ours[mine] is published[theirs]


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
def test_round_trip(padding: str) -> None:
    config = TINY.replace(padding=padding)
    published = tiny_published(padding=padding)
    ours, same = from_published(published, config)
    assert same is config
    assert ("decoder.mask_token" in ours) == (padding == "mask_token")
    exported = to_published(ours, config)
    assert exported.keys() == published.keys()
    dead = set(unused_layout()) - ({"mask_token"} if padding == "mask_token" else set())
    for name, x in published.items():
        assert exported[name].dtype == x.dtype
        if name in dead - {"token_emb.position_ids"}:
            assert not exported[name].any()
        else:
            assert torch.equal(exported[name], x)
    reference.MAGE.from_config(config).load_state_dict(exported, strict=True)


def test_without_a_tokenizer_or_the_unused_tensors() -> None:
    published = {name: x for name, x in tiny_published().items() if not name.startswith("vqgan.")}
    for name in unused_layout():
        del published[name]
    ours, _ = from_published(published, TINY.replace(tokenizer=None))
    assert set(ours) == our_names(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"file\.pth: missing tensors: 1 \(norm\.weight\)$"),
        ({"norm.weight": None, "norm.bias": None}, r"missing tensors: 2 \(norm\.bias, norm\.weight\)"),
        ({"fc_norm.weight": torch.ones(3)}, r"unexpected tensors: 1 \(fc_norm\.weight\)"),
        ({"norm.bias": torch.ones(3)}, r"norm\.bias has shape \(3,\), wanted \(32,\)"),
    ],
)
def test_strict(change: dict[str, Tensor | None], message: str) -> None:
    state = {name: x for name, x in (tiny_published() | change).items() if x is not None}
    with pytest.raises(CheckpointError, match=message) as raised:
        from_published(state, TINY, source="file.pth")
    assert "\n" not in str(raised.value)


def test_many_missing_tensors_are_counted() -> None:
    state = {name: x for name, x in tiny_published().items() if not name.startswith("decoder_blocks.1.")}
    with pytest.raises(
        CheckpointError, match=r"missing tensors: 12 \(decoder_blocks\.1\.attn\.proj\.bias, .*\.\.\.\)"
    ):
        from_published(state, TINY)


def test_checkpoint_of_another_width() -> None:
    with pytest.raises(CheckpointError, match=r"has shape .*1024.*, wanted .*768"):
        from_published(meta(mage_layout(1024, 24, 1024)), MAGEConfig.vit_b())
    with pytest.raises(CheckpointError, match=r"has shape .* \(and \d+ more of another shape\)"):
        to_published(meta(checkpoint.our_shapes(MAGEConfig.vit_l())), MAGEConfig.vit_b())


def test_what_shapes_do_not_tell_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"widths are \(32, 24\), wanted .* or a config"):
        from_published(tiny_published())
    with pytest.raises(CheckpointError, match=r"missing tensors: decoder_embed\.weight"):
        from_published({})
    shapes = mage_layout()
    del shapes["blocks.3.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensors: 1 \(blocks\.3\.norm1\.weight\)"):
        from_published(meta(shapes))


def test_pth_with_a_namespace(tmp_path: Path) -> None:
    path = tmp_path / "mage.pth"
    published = tiny_published()
    torch.save({"model": published, "args": argparse.Namespace(lr=1e-4, name="x"), "epoch": 1599}, path)
    loaded = load_published(path)
    assert loaded.keys() == published.keys()
    assert all(torch.equal(x, published[name]) for name, x in loaded.items())


@pytest.mark.parametrize("name", ["mage.pth", "mage.safetensors"])
def test_published_files_round_trip(tmp_path: Path, name: str) -> None:
    published = tiny_published()
    checkpoint.save_published(tmp_path / name, published)
    assert os.listdir(tmp_path) == [name]
    loaded = load_published(tmp_path / name)
    assert loaded.keys() == published.keys()
    assert all(torch.equal(x, published[key]) for key, x in loaded.items())
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save_published(tmp_path / "absent" / name, published)


class Malicious:
    """Unpickling it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, target = tmp_path / "bad.pth", tmp_path / "made"
    torch.save({"model": Malicious(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bad\.pth: refused, it holds posix\.mkdir, wanted tensors"):
        load_published(path)
    path.write_bytes(pickle.dumps({"model": Malicious(target)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"bad\.pth: "):
        load_published(path)
    assert not target.exists()


@pytest.mark.parametrize("contents", [[1], {"state": {}}, {"model": 3}, {"model": {"a": 1}}])
def test_pth_without_a_state_dict(tmp_path: Path, contents: Any) -> None:
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="wanted a dict whose key 'model' is a state dict"):
        load_published(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_corrupt_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    state = {"a": torch.randn(100, 3), "b": torch.arange(5)}
    if kind == "safetensors":
        checkpoint.save_safetensors(path, state)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    assert load_published(path).keys() == state.keys()
    whole = path.read_bytes()
    step = max(1, len(whole) // 40)
    for damaged in [whole[:length] for length in range(0, len(whole) - 1, step)] + [b"not a checkpoint" * 9]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as raised:
            load_published(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_no_such_file(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(CheckpointError, match="no such file"):
            load_published(tmp_path / name)


class Small(nn.Module):
    """Something with a configuration and weights."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.config = TINY
        self.weight = nn.Parameter(torch.full((2, 3), value))


def test_pretrained_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    checkpoint.save_pretrained(Small(1.0), folder)
    checkpoint.save_pretrained(Small(2.0), folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    values, state = checkpoint.load_pretrained(folder)
    assert MAGEConfig.from_dict(values) == TINY
    small = Small()
    checkpoint.load_state(small, state, folder)
    assert (small.weight == 2).all()


def test_a_failed_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_pretrained(Small(1.0), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        checkpoint.save_pretrained(Small(2.0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save_pretrained(Small(2.0), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save_safetensors(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(1)})


def test_a_failed_load_changes_nothing() -> None:
    small = Small(1.0)
    with pytest.raises(CheckpointError, match=r"weight has shape \(2, 4\), wanted \(2, 3\)"):
        checkpoint.load_state(small, {"weight": torch.zeros(2, 4)})
    assert (small.weight == 1).all()


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_bad_config_json(tmp_path: Path, text: str) -> None:
    checkpoint.save_pretrained(Small(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        checkpoint.load_pretrained(tmp_path)


def test_channels_last_weights_are_saved(tmp_path: Path) -> None:
    vqgan = VQGAN(TINY.tokenizer).to(memory_format=torch.channels_last)
    vqgan.save_pretrained(tmp_path)
    state = checkpoint.read_safetensors(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["codebook_size"] == 32
    for name, x in vqgan.state_dict().items():
        assert torch.equal(state[name], x)


def test_a_file_left_behind_by_a_kill_is_in_no_ones_way(tmp_path: Path) -> None:
    (tmp_path / ".mage.pth.tmp").write_bytes(b"half")
    checkpoint.save_published(tmp_path / "mage.pth", {"x": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["mage.pth"]
    assert torch.equal(checkpoint.load_published(tmp_path / "mage.pth")["x"], torch.ones(2))
