"""Unquantized features as the encoder's input (table 6), against the token path and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mage_fast import checkpoint, generate_ids, reference
from mage_fast.config import MAGEConfig
from mage_fast.contrastive import MAGEC
from mage_fast.errors import CheckpointError
from mage_fast.kernels import rng
from mage_fast.masking import draw_plan
from mage_fast.model import MAGE
from mage_fast.tokenizer import VQGAN, FeatureTokenizer
from mage_fast.training.initialize import initialize_from
from tests.models import assert_near, build, draw_ids, masks, tiny
from tests.test_model_use import BatchTokenizer

few = settings(max_examples=6, deadline=None, derandomize=True)


class OneHot(nn.Module):
    """Images are ids; their features are one-hot."""

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        self.codebook_size = self.feature_size = config.codebook_size
        self.grid_size = config.grid_size

    def encode(self, images: Tensor) -> Tensor:
        return images[:, 0].flatten(1).long()

    def decode(self, ids: Tensor) -> Tensor:
        return ids.unflatten(1, (1, self.grid_size, -1)).expand(-1, 3, -1, -1).float()

    def encode_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.encode(images)
        return ids, F.one_hot(ids, self.codebook_size).to(images.dtype)


def pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[MAGE, MAGE]:
    """A model of tokens, and one of one-hot features whose projection is the word embedding."""
    config = tiny(**changes)
    tokens = build(config)
    torch.manual_seed(1)
    features = MAGE(config.replace(encoder_input="features"), OneHot(config))
    projection = features.embedding.feature_projection
    assert projection is not None
    words = tokens.embedding.word_embeddings.weight[: config.codebook_size].T
    state = {"weight": words.detach().clone(), "bias": torch.zeros(config.encoder_width)}
    state = {f"embedding.feature_projection.{name}": x for name, x in state.items()}
    features.load_state_dict(tokens.state_dict() | state)
    return tokens.to(dtype), features.to(dtype).eval()


def images_of(ids: Tensor, config: MAGEConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    return OneHot(config).decode(ids).to(dtype)


# The same numbers


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@few
@given(
    batch=st.integers(1, 4),
    ratio=st.sampled_from([0.5, 0.7, 1.0]),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    labels=st.booleans(),
    seed=st.integers(0, 2**60),
)
def test_one_hot_features_are_tokens(
    encoder_tokens: str, dtype: torch.dtype, tolerance: float, batch: int, ratio: float, dropout: float,
    labels: bool, seed: int,
) -> None:  # fmt: skip
    """Loss, logits and every gradient, with the same masks, dropped labels and dropped activations."""
    models = pair(dtype, encoder_tokens=encoder_tokens, dropout=dropout)
    config, ids = models[0].config, draw_ids(models[0].config, batch, seed % 1000)
    labels_B = torch.arange(batch) if labels else None
    ratios, state = torch.full((batch,), ratio), rng.new_state(seed)
    outputs, grads = [], []
    for model, inputs in zip(models, (ids, images_of(ids, config, dtype)), strict=True):
        out = model.train()(inputs, labels_B, mask_ratios_B=ratios, rng_state=state)
        out.loss.backward()
        outputs.append(out)
        grads.append({name: x.grad for name, x in model.named_parameters()})
    assert torch.equal(outputs[0].ids_BL, outputs[1].ids_BL)
    assert torch.equal(outputs[0].plan.positions_T, outputs[1].plan.positions_T)
    assert_near(outputs[1].loss, outputs[0].loss, tolerance)
    assert_near(outputs[1].logits_NC, outputs[0].logits_NC, tolerance)
    # the words' gradient goes to the projection; class ids and [M] stay words
    words, codes = "embedding.word_embeddings.weight", config.codebook_size
    ours, theirs = grads[1], dict(grads[0])
    theirs["embedding.feature_projection.weight"] = theirs[words][:codes].T
    theirs[words], ours[words] = theirs[words][codes:], ours[words][codes:]
    del ours["embedding.feature_projection.bias"]
    largest = max(x.abs().max().item() for x in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        error = (ours[name] - grad).abs().max().item()
        assert error <= tolerance * max(grad.abs().max().item(), 1e-3 * largest), name


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
def test_the_reference_with_projected_features(padding: Any) -> None:
    """The VQGAN's own features: the reference's encoder and decoder over embeddings written out here."""
    config = MAGEConfig.tiny(padding=padding, encoder_input="features")
    model = build(config).double()
    assert isinstance(model.tokenizer, VQGAN)
    nn.init.normal_(model.tokenizer.quantize.embedding.weight)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    out = model(images, mask_ratios_B=torch.full((3,), 0.6), rng_state=rng.new_state(1))
    z = model.tokenizer.encode_features(images)
    assert torch.equal(out.ids_BL, model.tokenizer.encode(images))
    state = {name: x for name, x in model.state_dict().items() if "feature_projection" not in name}
    theirs = reference.MAGE.from_config(config).double().eval()
    theirs.load_state_dict(checkpoint.to_published(state, config.replace(encoder_input="tokens")))
    drop_mask, mask = masks(out.plan)
    p = dict(model.named_parameters())

    def embed(ids: Tensor, class_ids: Tensor | None) -> Tensor:
        rows = []
        for b in range(3):
            words = [p["embedding.word_embeddings.weight"][config.unconditional_class_id]]
            for l in range(16):
                seen = z[b, :, l // 4, l % 4] @ p["embedding.feature_projection.weight"].T
                seen = seen + p["embedding.feature_projection.bias"]
                word = p["embedding.word_embeddings.weight"][config.mask_token_id]
                words.append(word if mask[b, l] else seen)
            rows.append(torch.stack(words) + p["embedding.position_embeddings.weight"])
        norm = p["embedding.norm.weight"], p["embedding.norm.bias"]
        return F.layer_norm(torch.stack(rows), (config.encoder_width,), *norm, 1e-6)

    theirs.embed = embed  # type: ignore[method-assign]
    wanted = theirs(out.ids_BL, drop_mask=drop_mask, mask=mask)
    assert_near(out.loss, wanted.loss, 1e-12)
    assert_near(out.logits_NC, wanted.logits[:, 1:, : config.codebook_size][mask], 1e-11)
    mask[:] = False
    x = embed(out.ids_BL, None)
    for block in theirs.blocks:
        x = block(x)
    assert_near(model.features(images), x[:, 1:].mean(1), 1e-11)


def test_the_head_trains_the_words_that_nothing_else_trains() -> None:
    """Their gradient is the slope of the loss: no input reads them, so the head must."""
    _, model = pair(torch.float64, dropout=0.0)
    images = images_of(draw_ids(model.config, 2), model.config, torch.float64)
    words = model.embedding.word_embeddings.weight

    def loss() -> Tensor:
        return model(images, mask_ratios_B=torch.full((2,), 0.7), rng_state=rng.new_state(3)).loss

    (grad,) = torch.autograd.grad(loss(), [words])
    way = torch.randn(words.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    way[model.config.codebook_size :] = 0
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            words += sign * 1e-5 * way
            values.append(loss())
            words -= sign * 1e-5 * way
    assert_near((values[0] - values[1]) / 2e-5, (grad * way).sum(), 1e-6)


def test_autocast() -> None:
    models = pair()
    ids = draw_ids(models[0].config, 3)
    plan = draw_plan(models[0].config, torch.full((3,), 0.7), rng.new_state(0))
    inputs = (ids, images_of(ids, models[0].config))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, features = (m(x, plan=plan) for m, x in zip(models, inputs, strict=True))
    assert features.logits_NC.dtype == torch.bfloat16
    assert_near(features.logits_NC.float(), tokens.logits_NC.float(), 0.03)


def test_one_graph_under_compile() -> None:
    config = MAGEConfig.tiny(encoder_input="features", encoder_depth=1, decoder_depth=1)
    model, images = build(config).train(), torch.rand(2, 3, 16, 16)
    state = rng.new_state(4)
    plan = draw_plan(config, torch.tensor([0.5, 0.8]), state)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        loss = forward(images, plan=plan, rng_state=state).loss
        trained = [x for x in model.parameters() if x.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, trained)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_mage_c_of_features() -> None:
    """Its reconstruction is that of a plain model of both views, its views stacked or not."""
    config = MAGEConfig.tiny(encoder_input="features", dropout=0.0)
    plain, both = build(config), MAGEC(config).eval()
    initialize = plain.state_dict() | {f"projector.{k}": x for k, x in both.projector.state_dict().items()}
    both.load_state_dict(initialize)
    views = torch.rand(2, 3, 3, 16, 16)
    plan = draw_plan(config, torch.full((6,), 0.7), rng.new_state(2))
    wanted = plain(views.flatten(0, 1), plan=plan).loss
    for images in (views, views.flatten(0, 1)):
        assert_near(both(images, plan=plan).reconstruction_loss, wanted, 1e-6)


# The tokenizer's part, and files


def test_ids_and_features_are_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, images = VQGAN(MAGEConfig.tiny().tokenizer), torch.rand(2, 3, 16, 16)
    assert isinstance(tokenizer, FeatureTokenizer)
    z = tokenizer.encode_features(images)
    passes = []
    tokenizer.encoder.register_forward_hook(lambda *_: passes.append(1))
    ids, features = tokenizer.encode_with_features(images)
    assert len(passes) == 1
    assert features.shape == (2, 16, tokenizer.feature_size)
    assert not features.requires_grad
    assert torch.equal(features.unflatten(1, (4, 4)).permute(0, 3, 1, 2), z)
    assert torch.equal(ids, tokenizer.encode(images))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, images = build(MAGEConfig.tiny(encoder_input="features")), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path / "vqgan")
    again = MAGE.from_pretrained(tmp_path / "vqgan")
    assert again.config == model.config
    assert torch.equal(again.features(images), model.features(images))
    _, own = pair()
    own.save_pretrained(tmp_path / "own")
    again = MAGE.from_pretrained(tmp_path / "own", OneHot(own.config))
    images = images_of(draw_ids(own.config, 2), own.config)
    assert torch.equal(again.features(images, pool=False), own.features(images, pool=False))


def test_a_model_of_tokens_is_as_it_was() -> None:
    names = set(build(MAGEConfig.tiny()).state_dict())
    added = set(build(MAGEConfig.tiny(encoder_input="features")).state_dict()) - names
    assert added == {f"embedding.feature_projection.{name}" for name in ("weight", "bias")}


# What it refuses


def test_ids_are_refused() -> None:
    model = build(MAGEConfig.tiny(encoder_input="features"))
    ids = draw_ids(model.config, 2)
    for call in (model, model.features):
        with pytest.raises(ValueError, match=r"MAGE: got ids, wanted images \[B, 3, H, W\]: .*input"):
            call(ids)
    with pytest.raises(ValueError, match="MAGE: got ids, wanted what the tokenizer computes before"):
        model.logits(ids, ids > 3)
    with pytest.raises(ValueError, match='Decoding: encoder_input is "features", wanted "tokens"'):
        generate_ids(model, 2)
    assert torch.equal(model.tokenize(ids), ids)


def test_a_tokenizer_without_features_is_refused() -> None:
    wanted = "wanted a tokenizer with feature_size and encode_with_features"
    with pytest.raises(ValueError, match=f"there is a BatchTokenizer, {wanted}"):
        MAGE(tiny(encoder_input="features"), BatchTokenizer())
    with pytest.raises(ValueError, match=f"there is no tokenizer, {wanted}"):
        MAGE(tiny(encoder_input="features"))
    with pytest.raises(ValueError, match=r"is 'pixels', wanted one of \('tokens', 'features'\)"):
        tiny(encoder_input="pixels")


def test_features_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair()
    images = images_of(draw_ids(model.config, 2), model.config)
    encode = OneHot.encode_with_features
    monkeypatch.setattr(
        OneHot, "encode_with_features", lambda self, x: (encode(self, x)[0], encode(self, x)[1][:, :, :5])
    )
    with pytest.raises(ValueError, match=r"MAGE: features has shape \(2, 16, 5\), wanted \(2, 16, 32\)"):
        model(images)


def test_the_published_layout_has_no_place_for_it(tmp_path: Path) -> None:
    model = build(MAGEConfig.tiny(encoder_input="features"))
    message = r"embedding\.feature_projection\.weight: the published layout has no such tensor"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.to_published(model.state_dict(), model.config)
    build(MAGEConfig.tiny()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="encoder_input is 'tokens', wanted the model's 'features'"):
        initialize_from(model, tmp_path)
