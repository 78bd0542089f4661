"""Fine-tuning with classes starts as the unconditional model, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mage_fast import checkpoint
from mage_fast.config import MAGEConfig
from mage_fast.contrastive import MAGEC
from mage_fast.errors import CheckpointError
from mage_fast.kernels import rng
from mage_fast.model import MAGE
from mage_fast.tokenizer import VQGAN
from mage_fast.training.initialize import initialize_from
from tests.models import build, draw_ids, tiny
from tests.published_layout import mage_layout


def assert_same_start(model: MAGE, trained: MAGE, labels: Tensor) -> None:
    """Logits without a class are the trained model's; those of every label too, before it learns."""
    ids = draw_ids(trained.config, len(labels))
    is_masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    with torch.no_grad():
        wanted = trained.logits(ids, is_masked)
        assert torch.equal(model.logits(ids, is_masked), wanted)
        class_ids = model.class_ids(labels, len(labels))
        assert torch.equal(model.logits(ids, is_masked, class_ids), wanted)
    results = [
        m(ids, mask_ratios_B=torch.full((len(ids),), 0.7), rng_state=rng.new_state(2))
        for m in (model, trained)
    ]
    assert torch.equal(results[0].loss, results[1].loss)


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
@pytest.mark.parametrize(
    ("slots", "unconditional", "classes"),
    [(11, 10, 4), (11, 10, 10), (11, 3, 4), (11, 3, 30), (2, 0, 5)],
    ids=["room", "just room", "collision", "collision, more slots", "slot 0"],
)
def test_unconditional_logits_are_the_trained_ones(
    padding: Any, slots: int, unconditional: int, classes: int, tmp_path: Path
) -> None:
    config = tiny(class_slots=slots, unconditional_class=unconditional, padding=padding)
    trained = build(config)
    trained.save_pretrained(tmp_path / "trained")
    model = build(config.for_classes(classes), seed=1)
    initialize_from(model, tmp_path / "trained")
    assert_same_start(model, trained, torch.arange(classes))
    new, old = (m.embedding.word_embeddings.weight for m in (model, trained))
    assert torch.equal(new[:32], old[:32])
    assert torch.equal(new[-1], old[-1])
    # and its unused slots, whose rows nothing read
    assert torch.equal(new[32:-1], old[32 + unconditional].expand(model.config.class_slots, -1))
    model.save_pretrained(tmp_path / "tuned")
    again = MAGE.from_pretrained(tmp_path / "tuned")
    assert again.config == model.config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_the_published_layout(padding: Any, classes: int, suffix: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    published = {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in mage_layout(24, 2, 32, 1).items()
        if not name.startswith("vqgan.")
    }
    checkpoint.save_published(tmp_path / f"mage{suffix}", published)
    sizes = {"encoder_width": 24, "encoder_depth": 2, "encoder_heads": 3}
    sizes |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    config = MAGEConfig(tokenizer=None, padding=padding, **sizes)  # type: ignore[arg-type]
    with torch.device("meta"):
        trained = MAGE(config)
    trained.load_state_dict(checkpoint.from_published(published, config)[0], assign=True)
    model = MAGE(config.for_classes(classes)).eval()
    initialize_from(model, tmp_path / f"mage{suffix}")
    assert_same_start(model, trained.eval(), torch.tensor([0, classes - 1]))


def test_classes_that_were_learnt_are_kept(tmp_path: Path) -> None:
    config = tiny().for_classes(4)
    trained = build(config)
    trained.save_pretrained(tmp_path)
    same, other = (build(tiny(class_slots=20).for_classes(n), seed=1) for n in (4, 5))
    for model in (same, other):
        initialize_from(model, tmp_path)
    old = trained.embedding.word_embeddings.weight
    assert torch.equal(same.embedding.word_embeddings.weight[32:36], old[32:36])
    assert torch.equal(other.embedding.word_embeddings.weight[32:37], old[42].expand(5, -1))


def test_the_weights_go_where_the_model_is(tmp_path: Path) -> None:
    """In place: parameters an optimizer holds stay the model's, in their own dtype."""
    trained = build(tiny())
    trained.save_pretrained(tmp_path)
    model = build(tiny().for_classes(12), seed=1).double()
    parameters = list(model.parameters())
    initialize_from(model, tmp_path)
    assert all(x is y for x, y in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model.encoder.norm.weight, trained.encoder.norm.weight.double())


def test_mage_c_keeps_its_projector(tmp_path: Path) -> None:
    trained = build(tiny())
    trained.save_pretrained(tmp_path)
    model = MAGEC(tiny().for_classes(12))
    projector = model.projector[0].weight.clone()
    initialize_from(model, tmp_path)
    assert torch.equal(model.projector[0].weight, projector)
    assert torch.equal(model.encoder.norm.weight, trained.encoder.norm.weight)


# The tokenizer


def test_with_the_same_tokenizer(tmp_path: Path) -> None:
    trained = build(MAGEConfig.tiny())
    trained.save_pretrained(tmp_path)
    assert isinstance(trained.tokenizer, VQGAN)
    model = MAGE(trained.config.for_classes(20), trained.tokenizer)
    initialize_from(model, tmp_path)
    assert model.class_ids(torch.tensor([19]), 1) == 32 + 19


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    trained = build(MAGEConfig.tiny())
    trained.save_pretrained(tmp_path / "trained")
    other = build(MAGEConfig.tiny().for_classes(20), seed=1)
    before = {name: x.clone() for name, x in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"its tokenizer is another than the model's \(tokenizer\."):
        initialize_from(other, tmp_path / "trained")
    with pytest.raises(CheckpointError, match="holds a tokenizer and the model none, wanted the same"):
        initialize_from(build(tiny()), tmp_path / "trained")
    build(tiny()).save_pretrained(tmp_path / "without")
    with pytest.raises(CheckpointError, match="holds no tokenizer and the model one, wanted the same"):
        initialize_from(other, tmp_path / "without")
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_heads": 4}, "encoder_heads is 2, wanted the model's 4"),
        ({"padding": "mask_token"}, "padding is 'class_token', wanted the model's 'mask_token'"),
        ({"codebook_size": 31}, "codebook_size is 32, wanted the model's 31"),
        ({"encoder_width": 16}, r"has shape \(.*32.*\), wanted \(.*16.*\) \(and \d+ more of another shape\)"),
        ({"decoder_depth": 3}, r"missing tensors: 12 \(decoder\.blocks\.2"),
    ],
    ids=str,
)
def test_other_sizes_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    build(tiny()).save_pretrained(tmp_path)
    model = build(tiny(**changes), seed=1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        initialize_from(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    model = build(MAGEConfig.tiny())
    with pytest.raises(CheckpointError, match="no such file"):
        initialize_from(model, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        initialize_from(model, tmp_path)
    assert isinstance(model.tokenizer, VQGAN)
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="holds no model of tokens"):
        initialize_from(model, tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"class_slots": 12}))
    with pytest.raises(CheckpointError, match=r"weight has 44 ids, its configuration 45"):
        initialize_from(model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"class_slots": -1}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*class_slots is -1"):
        initialize_from(model, tmp_path / "model")
