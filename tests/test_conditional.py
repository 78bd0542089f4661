"""Class-conditional training: dropped labels, and class slots in which no label means "no class"."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.conditioning import drop_labels
from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from mage_fast.kernels.ops.philox.reference import philox_4x32
from mage_fast.masking import count_masks, draw_mask_ratios, draw_plan
from mage_fast.model import MAGE
from mage_fast.training.optim import build_adamw
from mage_fast.training.step import TrainStep
from tests.models import build, draw_ids, tiny

few = settings(max_examples=25, deadline=None, derandomize=True)

# Label dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_the_number_of_dropped_labels_is_binomial(p: float) -> None:
    config, count = tiny(label_dropout=p), 200_000
    class_ids = config.codebook_size + torch.arange(count) % 10
    dropped = drop_labels(class_ids, config, rng.new_state(3, 5)) == config.unconditional_class_id
    sigma = math.sqrt(count * p * (1 - p))
    assert abs(int(dropped.sum()) - count * p) < 4 * sigma
    # and pairs of neighbours are independent
    both = (dropped[1:] & dropped[:-1]).sum().item()
    assert abs(both - count * p * p) < 5 * math.sqrt(count * p * p)


@pytest.mark.parametrize(("p", "dropped"), [(0.0, 0), (1.0, 1000)])
def test_none_and_all(p: float, dropped: int) -> None:
    config = tiny(label_dropout=p)
    class_ids = torch.full((1000,), config.codebook_size)
    found = drop_labels(class_ids, config, rng.new_state(1)) == config.unconditional_class_id
    assert found.sum() == dropped


@few
@given(
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**62),
    step=st.integers(0, 2**31),
    p=st.sampled_from([0.1, 0.3, 0.8]),
)
def test_a_sample_has_the_first_word_of_its_row(batch: int, seed: int, step: int, p: float) -> None:
    """Whatever the batch: the counter is (0, sample, stream, step)."""
    config = tiny(label_dropout=p)
    class_ids = config.codebook_size + torch.arange(batch) % 10
    got = drop_labels(class_ids, config, torch.tensor([seed, step]))
    zero, rows = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
    stream = torch.full_like(rows, rng.Stream.LABEL_DROPOUT)
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    word = philox_4x32((zero, rows, stream, torch.full_like(rows, step)), key)[0]
    assert torch.equal(got, torch.where(word < round(p * 2**32), config.unconditional_class_id, class_ids))


class ClassIds:
    """Notes the ids of the first position of each forward pass."""

    def __init__(self, model: MAGE, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        true = model.masked_logits

        def masked_logits(ids: Tensor, class_ids: Tensor, *rest: object) -> Tensor:
            self.seen.append(class_ids)
            return true(ids, class_ids, *rest)

        monkeypatch.setattr(model, "masked_logits", masked_logits)


def test_only_training_with_labels_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(label_dropout=0.5)
    model, ids, labels = build(config).train(), draw_ids(config, 32), torch.arange(32) % 10
    spy, state = ClassIds(model, monkeypatch), rng.new_state(2, 9)
    wanted = drop_labels(labels + config.codebook_size, config, state)
    assert 4 < (wanted == config.unconditional_class_id).sum() < 28
    model(ids, labels, rng_state=state)
    TrainStep(model, build_adamw(model, 1e-3))(ids, labels, rng_state=state)
    model(ids, rng_state=state)
    model.eval()(ids, labels, rng_state=state)
    model(ids, rng_state=state)
    unconditional = torch.full((32,), config.unconditional_class_id)
    given = labels + config.codebook_size
    for got, want in zip(spy.seen, (wanted, wanted, unconditional, given, unconditional), strict=True):
        assert torch.equal(got, want)


def test_a_dropped_label_trains_the_unconditional_embedding() -> None:
    """With every label dropped the loss and all gradients are the unconditional model's, to the bit."""
    config = tiny(label_dropout=1.0, dropout=0.1)
    results = []
    for labels in (None, torch.tensor([4, 1, 0])):
        model = build(config).train()
        loss = model(draw_ids(config, 3), labels, rng_state=rng.new_state(6)).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_step_drops_the_same_labels() -> None:
    config = tiny(label_dropout=0.5, encoder_depth=1, decoder_depth=1)
    model, ids, labels = build(config).train(), draw_ids(config, 6), torch.arange(6)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number in range(2):
        state = rng.new_state(4, number)
        plan = draw_plan(config, torch.full((6,), 0.7), state)
        losses = [forward(ids, labels, plan=plan, rng_state=state).loss for forward in (model, compiled)]
        torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_drops_other_labels_at_each_replay() -> None:
    config = tiny(label_dropout=0.5)
    labels = (config.codebook_size + torch.arange(64) % 10).cuda()
    state = rng.new_state(0, 0, "cuda")
    drop_labels(labels, config, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = drop_labels(labels, config, state)
    for step in range(3):
        state.copy_(rng.new_state(8, step, "cuda"))
        graph.replay()
        assert torch.equal(out.cpu(), drop_labels(labels.cpu(), config, rng.new_state(8, step)))


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_a_wrong_ratio_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=rf"label_dropout is {p}, wanted a ratio in \[0, 1\]"):
        tiny(label_dropout=p)


# Class slots


@pytest.mark.parametrize(
    ("classes", "slots", "unconditional"),
    [(1, 1000, 76), (10, 1000, 76), (76, 1000, 76), (77, 1000, 77), (999, 1000, 999), (1000, 1001, 1000)],
)
def test_slots_of_the_published_layout(classes: int, slots: int, unconditional: int) -> None:
    config = MAGEConfig.vit_b().for_classes(classes)
    assert (config.num_classes, config.class_slots, config.unconditional_class) == (
        classes,
        slots,
        unconditional,
    )
    assert MAGEConfig.from_dict(config.to_dict()) == config


@few
@given(slots=st.integers(1, 30), data=st.data())
def test_every_label_has_an_id_of_its_own(slots: int, data: st.DataObject) -> None:
    unconditional = data.draw(st.integers(0, slots - 1))
    classes = data.draw(st.integers(1, 40))
    config = tiny(
        class_slots=slots, unconditional_class=unconditional, encoder_depth=1, decoder_depth=1
    ).for_classes(classes)
    model = MAGE(config)
    ids = model.class_ids(torch.arange(classes), classes).tolist()
    taken = {*range(config.codebook_size), config.unconditional_class_id, config.mask_token_id}
    assert len({*ids, *taken}) == classes + len(taken)
    assert max(ids) < config.vocabulary_size
    for label in (-1, classes):
        with pytest.raises(ValueError, match=f"MAGE: labels holds {label}, wanted 0 <= labels < {classes}"):
            model.class_ids(torch.tensor([label]), 1)


def test_the_unconditional_class_is_no_label() -> None:
    model = MAGE(tiny(class_slots=100, unconditional_class=76))
    message = "labels holds 76, which is no class here .* give no labels, .* config.for_classes"
    with pytest.raises(ValueError, match=message):
        model.class_ids(torch.tensor([3, 76]), 2)
    assert model.class_ids(torch.tensor([75, 77]), 2).tolist() == [32 + 75, 32 + 77]
    assert model.class_ids(None, 1).tolist() == [32 + 76]


@pytest.mark.parametrize("classes", [0, -3])
def test_no_class_is_refused(classes: int) -> None:
    with pytest.raises(ValueError, match=f"number of classes is {classes}, wanted 1 or more"):
        tiny().for_classes(classes)


def test_classes_without_room_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"num_classes is 1000, wanted .* unconditional_class 76: config\.for"
    ):
        MAGEConfig(num_classes=1000)


# The switches of table 5


@pytest.mark.parametrize("std", [0.0, 0.15, 0.25, 0.5])
@pytest.mark.parametrize("mode", [0.7, 0.6, 0.55, 0.5])
def test_laws_of_table_5_need_two_fields(mode: float, std: float) -> None:
    """Fixed ratios mask as many tokens at every step, whatever the bounds; others vary within them."""
    config = MAGEConfig(mask_ratio_mode=mode, mask_ratio_std=std, ratio_per="sample", tokenizer=None)
    counts = count_masks(config, draw_mask_ratios(config, 400, rng.new_state(1)))
    masked = counts.num_masked_B
    if std == 0.0:
        assert masked.unique().tolist() == [math.ceil(mode * 256)]
    else:
        assert 128 <= masked.min() < masked.max() <= 256
    assert counts.max_seqlen == 129
    assert counts.total_kept == 400 * 129


def test_a_ratio_below_a_half_says_what_it_needs() -> None:
    wanted = r"drop_ratio is 0\.5, .* lowest mask ratio 0\.45 .*: give drop_ratio=0\.45, or mask more"
    with pytest.raises(ValueError, match=wanted):
        MAGEConfig(mask_ratio_mode=0.45, mask_ratio_std=0.0)
    config = MAGEConfig(mask_ratio_mode=0.45, mask_ratio_std=0.0, drop_ratio=0.45)
    counts = count_masks(config, draw_mask_ratios(config, 2, rng.new_state(1)))
    assert counts.num_masked_B.tolist() == counts.num_dropped_B.tolist() == [116, 116]
    assert counts.max_seqlen == 257 - 116
