"""The classifier on the encoder, against the reference model; drop path against its law and plain PyTorch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast import MAGE, MAGEClassifier, MAGEConfig, reference, use_implementation
from mage_fast.blocks import drop_path
from mage_fast.errors import CheckpointError
from mage_fast.kernels import rng
from tests.models import CONFIGS, assert_near, build, draw_ids, tiny, twin

CLASSES = 7


def classifier_of(mage: MAGE, **arguments: Any) -> MAGEClassifier:
    """With a head that is not next to zero."""
    classifier = MAGEClassifier(mage, CLASSES, **arguments)
    for x in (*classifier.fc_norm.parameters(), *classifier.head.parameters()):
        torch.nn.init.normal_(x, std=0.5)
    return classifier


def plain_logits(
    theirs: reference.MAGE, classifier: MAGEClassifier, ids_BL: Tensor, scale_2NB: Tensor | None = None
) -> Tensor:
    """Plain PyTorch over the reference model's layers; branches times a scale for each sample."""
    x_BSD = theirs.embed(ids_BL, None)
    if scale_2NB is None:
        scale_2NB = torch.ones(2, len(theirs.blocks), len(ids_BL), dtype=x_BSD.dtype)
    for number, block in enumerate(theirs.blocks):
        attention_B11, mlp_B11 = scale_2NB[:, number, :, None, None].to(x_BSD.dtype)
        x_BSD = x_BSD + attention_B11 * block.attn(block.norm1(x_BSD))
        x_BSD = x_BSD + mlp_B11 * block.mlp(block.norm2(x_BSD))
    norm, head = classifier.fc_norm, classifier.head
    pooled_BD = F.layer_norm(x_BSD[:, 1:].mean(1), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
    return F.linear(pooled_BD, head.weight, head.bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_models_features(name: str) -> None:
    config = tiny(**CONFIGS[name])
    mage = build(config)
    classifier = classifier_of(mage, drop_path=0.3).eval()
    ids = draw_ids(config, 3)
    with torch.no_grad():
        assert_near(classifier(ids), plain_logits(twin(mage, config), classifier, ids))


def test_drop_path_equals_plain_pytorch_with_the_same_masks() -> None:
    """Logits and every gradient; each branch of each block has masks of its own."""
    config, p, batch = tiny(encoder_depth=4, dropout=0.0), 0.6, 5
    mage = build(config).double()
    classifier = classifier_of(mage, drop_path=p).train()
    state, ids = rng.new_state(3, 4), draw_ids(config, batch)
    scales = torch.ones(2, 4, batch, dtype=torch.float64)
    for number, (branch, kind) in itertools.product(
        range(1, 4), enumerate((rng.Stream.ATTENTION_PATH, rng.Stream.MLP_PATH))
    ):
        probability = p * number / 3
        words_B = rng.words(state, rng.stream(kind, number), batch, 1)[:, 0]
        scales[branch, number] = (words_B.double() >= probability * 2**32).double() / (1 - probability)
    assert 0 < (scales == 0).sum() < 30
    theirs = twin(mage, config).train()
    got, wanted = classifier(ids, rng_state=state), plain_logits(theirs, classifier, ids, scales)
    assert_near(got, wanted, 1e-12)
    target = torch.randn(got.shape, dtype=torch.float64)
    heads = [*classifier.fc_norm.parameters(), *classifier.head.parameters()]
    ours = [classifier.mage.embedding.word_embeddings.weight, *heads]
    others = [theirs.token_emb.word_embeddings.weight, *heads]
    for block, other in zip(classifier.mage.encoder.blocks, theirs.blocks, strict=True):
        ours += [block.norm1.weight, block.attention.qkv.weight, block.mlp.fc2.weight]
        others += [other.norm1.weight, other.attn.qkv.weight, other.mlp.fc2.weight]
    gradients = torch.autograd.grad((got * target).sum(), ours)
    for ours_x, others_x in zip(gradients, torch.autograd.grad((wanted * target).sum(), others), strict=True):
        assert_near(ours_x, others_x, 1e-10)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 99), chosen=st.booleans()
)
def test_drop_path_scales_whole_samples(lengths: list[int], seed: int, chosen: bool) -> None:
    rows, p, state = sum(lengths), 0.4, rng.new_state(seed)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    branch = torch.randn(rows, 3, dtype=torch.float64)
    keep = (rng.words(state, 9, len(lengths), 1)[:, 0].double() / 2**32 >= p).tolist()
    wanted = torch.cat(
        [part / (1 - p) if kept else part * 0 for part, kept in zip(branch.split(lengths), keep, strict=True)]
    )
    rows_N = torch.arange(0, rows, 2) if chosen else None
    if rows_N is not None:
        branch, wanted = branch[rows_N], wanted[rows_N]
    got = drop_path(branch, rows, cu_seqlens, rows_N, p, state, 9)
    torch.testing.assert_close(got, wanted, rtol=1e-15, atol=0)
    with use_implementation("reference"):
        assert torch.equal(drop_path(branch, rows, cu_seqlens, rows_N, p, state, 9), got)


def test_the_law_of_drop_path() -> None:
    """Kept with probability 1 - p, of mean 1, independently over samples, branches, layers and steps."""
    batch, p = 4096, 0.2
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32)
    kept = []
    for step, layer, kind in itertools.product(
        range(2), range(2), (rng.Stream.ATTENTION_PATH, rng.Stream.MLP_PATH)
    ):
        ones, state = torch.ones(batch, 1, dtype=torch.float64), rng.new_state(11, step)
        kept.append(drop_path(ones, batch, cu_seqlens, None, p, state, rng.stream(kind, layer))[:, 0])
    kept_NB = torch.stack(kept)
    assert set(kept_NB.unique().tolist()) == {0.0, 1 / (1 - p)}
    deviation = math.sqrt(p / (1 - p) / kept_NB.numel())
    assert abs(kept_NB.mean().item() - 1) < 4 * deviation
    correlation = torch.corrcoef(kept_NB) - torch.eye(len(kept_NB), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(batch)
    neighbours = torch.corrcoef(torch.stack([kept_NB[:, 1:].flatten(), kept_NB[:, :-1].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(kept_NB.numel())


def test_rises_linearly_over_the_blocks() -> None:
    mage = MAGE(tiny(encoder_depth=4))
    blocks = MAGEClassifier(mage, 2, drop_path=0.3).mage.encoder.blocks
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [block.drop_path for block in mage.encoder.blocks] == [0.0] * 4  # only the classifier's
    one = MAGEClassifier(MAGE(tiny(encoder_depth=1)), 2, drop_path=0.3)
    assert one.mage.encoder.blocks[0].drop_path == 0.0


def test_trains_a_copy_and_no_tokenizer() -> None:
    mage = MAGE(MAGEConfig.tiny()).requires_grad_(False)  # as for a probe: the copy is trained all the same
    before = {name: x.clone() for name, x in mage.state_dict().items()}
    classifier = MAGEClassifier(mage, 10).train()
    assert not classifier.mage.tokenizer.training
    images = torch.rand(2, 3, 16, 16)
    assert (classifier(images).softmax(1) - 0.1).abs().max() < 1e-3
    F.cross_entropy(classifier(images), torch.tensor([1, 2])).backward()
    trained = {name for name, x in classifier.named_parameters() if x.requires_grad}
    assert trained == {name for name, x in classifier.named_parameters() if x.grad is not None}
    assert trained == {
        name
        for name in classifier.state_dict()
        if not name.startswith(("mage.tokenizer.", "mage.encoder.norm."))
    }
    in_layers = [x for layer in classifier.layers for x in layer.parameters()]
    assert {id(x) for x in in_layers} == {id(x) for x in classifier.parameters() if x.requires_grad}
    torch.optim.SGD(classifier.parameters(), lr=1.0).step()
    assert all(torch.equal(x, before[name]) for name, x in mage.state_dict().items())
    assert mage(images).loss.isfinite()
    assert not any(x.requires_grad for x in mage.parameters())


def test_what_governs_training_is_the_state() -> None:
    """Dropout and drop path follow rng_state, else torch's generator, also where dropout is 0."""
    for dropout in (0.0, 0.2):
        classifier = classifier_of(build(tiny(dropout=dropout)), drop_path=0.5).train()
        ids = draw_ids(tiny(), 8)
        first, again, other = (classifier(ids, rng_state=rng.new_state(1, step)) for step in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.manual_seed(0)
        drawn = classifier(ids)
        assert not torch.equal(drawn, classifier(ids))
        torch.manual_seed(0)
        assert torch.equal(drawn, classifier(ids))


def test_saved_and_loaded(tmp_path: Path) -> None:
    mage = MAGE(MAGEConfig.tiny())
    classifier = classifier_of(mage, drop_path=0.25).eval()
    classifier.save_pretrained(tmp_path)
    loaded = MAGEClassifier.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), classifier(images))
    assert not loaded.training
    assert loaded.config == classifier.config
    assert not any(name.startswith(("mage.decoder", "mage.head")) for name in loaded.state_dict())
    (tmp_path / "mage").mkdir()
    mage.save_pretrained(tmp_path / "mage")
    with pytest.raises(CheckpointError, match="holds no classifier"):
        MAGEClassifier.from_pretrained(tmp_path / "mage")
    with pytest.raises(CheckpointError, match="no such file"):
        MAGEClassifier.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1, wanted 2 or more"),
        ({"num_classes": 10, "drop_path": 1.0}, "drop_path is 1.0, wanted 0 <= drop_path < 1"),
        ({"num_classes": 10, "drop_path": -0.1}, "drop_path is -0.1"),
        ({"num_classes": 10, "drop_path": math.nan}, "drop_path is nan"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAGEClassifier(MAGE(tiny()), **arguments)
