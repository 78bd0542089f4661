"""Classifier-free guidance: its weight at each step, its logits against two passes, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import guidance
from mage_fast import MAGEConfig
from mage_fast.cli import main
from mage_fast.decoding import Decoding, _Inputs
from mage_fast.kernels import rng
from mage_fast.model import MAGE
from mage_fast.sampler_config import GuidanceSchedule, SamplerConfig, masked_counts
from tests.models import assert_near, twin
from tests.test_decoding import OnDevice, Spy, build, partly_known

SCHEDULES: tuple[GuidanceSchedule, ...] = ("constant", "linear", "cosine")
few = settings(max_examples=8, deadline=None, derandomize=True)

# The weight


@given(steps=st.integers(1, 60), scale=st.floats(-3, 20), data=st.data())
def test_the_weight_of_a_step(steps: int, scale: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps - 1))
    r = step / (steps - 1) if steps > 1 else 1.0
    wanted = {"constant": 1.0, "linear": r, "cosine": math.sin(math.pi * r / 2) ** 2}
    for schedule in SCHEDULES:
        config = SamplerConfig(steps=steps, guidance_scale=scale, guidance_schedule=schedule)
        assert config.guidance_at(step) == pytest.approx(scale * wanted[schedule], rel=1e-12, abs=1e-13)
        assert config.guidance_at(steps - 1) == scale, "all of it at the last step"
        if schedule != "constant":
            assert steps == 1 or config.guidance_at(0) == 0.0, "exactly nothing at the first"


# The numbers


@torch.no_grad()
def by_hand(
    model: MAGE, ids: Tensor, config: SamplerConfig, weights: list[float], labels: Tensor, seed: int
) -> list[Tensor]:
    """The published forward of the reference model, twice a step, mixed and sampled in float64.

    Gumbel-max with the sampler's noise, confidences sorted: nothing of ours but the words of the generator.
    """
    theirs, mask = twin(model, model.config), model.config.mask_token_id
    batch, length, codes = len(ids), model.config.num_tokens, model.config.codebook_size
    counts, out = masked_counts("cosine", config.steps, (ids == mask).sum(1)), []
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    classes = (labels + codes, torch.full_like(labels, model.config.unconditional_class_id))
    for t, weight in enumerate(weights):
        unknown = ids == mask
        conditional, unconditional = (
            theirs.forward_decoder(theirs.forward_encoder(ids, nothing, unknown, c), nothing, unknown)[
                :, 1:, :codes
            ]
            for c in classes
        )
        log_p = ((1 + weight) * conditional - weight * unconditional).log_softmax(-1)
        kinds = ((rng.Stream.SAMPLE_ID, length * codes), (rng.Stream.SAMPLE_CONFIDENCE, length))
        noise = [
            rng.gumbel(rng.new_state(seed, t), rng.stream(kind), batch, columns).double()
            for kind, columns in kinds
        ]
        sampled = torch.where(unknown, (log_p + noise[0].view(batch, length, codes)).argmax(-1), ids)
        drawn = log_p.gather(-1, torch.where(unknown, sampled, 0)[..., None])[..., 0]
        confidence = drawn + config.choice_temperature * (1 - (t + 1) / config.steps) * noise[1]
        order = confidence.masked_fill(~unknown, torch.inf).argsort(1)
        ids = sampled.clone()
        for b in range(batch):
            left = max(min(int(counts[t, b]), int(unknown[b].sum()) - 1), 1)
            if unknown[b].any():
                ids[b, order[b, :left]] = mask
        out.append(sampled)
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
@few
@given(
    padding=st.sampled_from(["class_token", "mask_token"]),
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    scale=st.sampled_from([-0.5, 1.0, 3.0]),
    known=st.sampled_from([0, 6]),
    steps=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**60),
)
def test_ids_are_those_of_two_passes_of_the_reference(
    schedule: GuidanceSchedule,
    padding: str,
    labels: list[int],
    scale: float,
    known: int,
    steps: int,
    seed: int,
) -> None:
    model = build(padding=padding)
    r = [t / (steps - 1) if steps > 1 else 1.0 for t in range(steps)]
    part = {"constant": [1.0] * steps, "linear": r, "cosine": [(1 - math.cos(math.pi * x)) / 2 for x in r]}
    config = SamplerConfig(steps=steps, guidance_scale=scale, guidance_schedule=schedule)
    ids, labels_B = partly_known(model, [16 - known] * len(labels)), torch.tensor(labels)
    wanted = by_hand(model, ids, config, [scale * x for x in part[schedule]], labels_B, seed)
    got = list(Decoding(model, config).steps(ids_BL=ids, labels_B=labels_B, seed=seed))
    assert len(got) == steps
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_the_logits_of_each_step(
    encoder_tokens: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves are those of two separate passes; a step of weight 0 has the conditional one alone."""
    model = build(dtype, encoder_tokens=encoder_tokens)
    decode = Decoding(model, SamplerConfig(steps=4, guidance_scale=2.0, guidance_schedule="linear"))
    true, seen = decode._logits, []

    def noted(ids: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        out = true(ids, *rest, **more)
        seen.append((ids, *out))
        return out

    monkeypatch.setattr(decode, "_logits", noted)
    labels = torch.tensor([1, 8, 3])
    decode(3, labels_B=labels, seed=0)
    assert len(seen) == 4
    for t, (ids, conditional, unconditional) in enumerate(seen):
        is_masked = ids == model.config.mask_token_id
        halves = ((conditional, model.class_ids(labels, 3)), (unconditional, model.class_ids(None, 3)))
        assert (unconditional is None) == (t == 0)
        for got, class_ids in halves if t else halves[:1]:
            with torch.no_grad():
                wanted = model.logits(ids, is_masked, class_ids)[is_masked]
            assert_near(got, wanted, 1e-5 if dtype == torch.float32 else 1e-13)


def test_one_step_of_a_schedule_is_constant_guidance() -> None:
    model, labels = build(), torch.tensor([1, 2])
    one, *others = (
        Decoding(model, SamplerConfig(steps=1, guidance_scale=2.0, guidance_schedule=schedule))(
            2, labels_B=labels, seed=0
        )
        for schedule in SCHEDULES
    )
    assert all(torch.equal(one, other) for other in others)


# The cost


@pytest.mark.parametrize(
    ("schedule", "rows"),
    [("constant", [6, 8, 8, 8]), ("linear", [3, 8, 8, 8]), ("cosine", [3, 8, 8, 8])],
)
def test_a_guided_step_is_one_pass_of_twice_the_rows(
    schedule: GuidanceSchedule, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images of three classes: one row a class at first, then one call of 2 B, and never two."""
    model = build()
    spy, encoder_rows = Spy(model, monkeypatch), []
    model.encoder.register_forward_pre_hook(lambda _, inputs: encoder_rows.append(len(inputs[0])))
    config = SamplerConfig(steps=4, guidance_scale=1.0, guidance_schedule=schedule)
    Decoding(model, config)(4, labels_B=torch.tensor([5, 1, 1, 2]), seed=0)
    assert spy.rows == rows
    assert encoder_rows == [17 * n for n in rows]


def test_the_benchmark_compares_equal_ids() -> None:
    found = guidance.measure("cpu", batch=2, seconds=0.0, smoke=True)
    assert found["agreement_of_ids"] == 1.0
    assert set(found["milliseconds"]) == {"two passes", "guided", "guided, linear", "not guided"}
    assert guidance.table(found).count("\n") == 6


@pytest.mark.parametrize("approximation", ["drop_masked", "cached_features"])
def test_approximations_of_guided_steps(approximation: Any) -> None:
    """Each sample's ids do not depend on its batch, also where the first step is not guided."""
    model, labels = build(), torch.tensor([3, 3, 1])
    config = SamplerConfig(
        steps=6, guidance_scale=1.5, guidance_schedule="linear", approximation=approximation
    )
    together = Decoding(model, config)(3, labels_B=labels, seed=4)
    for b in range(3):
        alone = Decoding(model, config)(1, labels_B=labels[b : b + 1], seed=4, first_sample=b)
        assert torch.equal(alone, together[b : b + 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_waits_for_a_gpu(schedule: GuidanceSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(torch.float32)
    config = SamplerConfig(steps=4, guidance_scale=2.0, guidance_schedule=schedule)
    kind, inputs = Decoding(model, config)._prepare(4, None, torch.tensor([1, 1, 1, 2]), 3, 0)
    model.to("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # unknown on that device
    decode, there = Decoding(model, config), _Inputs(*(x.to("meta") for x in inputs))
    with torch.no_grad(), OnDevice() as mode:
        decode._last(kind, there)
    assert mode.calls > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_graph_has_the_weights_of_its_steps(schedule: GuidanceSchedule) -> None:
    model = build(torch.float32).cuda()
    config = SamplerConfig(steps=5, guidance_scale=2.0, guidance_schedule=schedule)
    decode = Decoding(model, config)
    for first_sample in (0, 4, 8):
        given = {"labels_B": torch.tensor([1, 2, 2, 3]), "seed": 5, "first_sample": first_sample}
        assert torch.equal(decode(4, **given), list(Decoding(model, config).steps(4, **given))[-1])
    assert decode._graph is not None


# What it refuses, and the command line


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="'ramp', wanted one of constant, linear, cosine"):
        SamplerConfig(guidance_schedule="ramp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_scale is nan, wanted a finite number"):
        SamplerConfig(guidance_scale=math.nan)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five classes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny().for_classes(5))
    torch.nn.init.normal_(model.embedding.word_embeddings.weight)
    model.save_pretrained(folder)
    return folder


def test_images_have_the_labels_in_turn(saved: Path, tmp_path: Path) -> None:
    guided = [
        "--sampler.steps",
        "3",
        "--sampler.guidance-scale",
        "2",
        "--sampler.guidance-schedule",
        "linear",
    ]
    for name, labels in (("many", ["--labels", "4", "0"]), ("4", ["--label", "4"]), ("0", ["--label", "0"])):
        arguments = ["generate", "--model", str(saved), "--out", str(tmp_path / name), "--count", "5"]
        assert main([*arguments, "--batch-size", "2", *labels, *guided]) == 0
    for index in range(5):
        image, same, other = (
            (tmp_path / name / f"{index:06d}.png").read_bytes()
            for name in ("many", *(("4", "0") if index % 2 == 0 else ("0", "4")))
        )
        assert image == same
        assert image != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "5"], "labels holds 5, wanted 0 <= labels < 5"),
        (["--labels", "0", "4", "7"], "labels holds 7, wanted 0 <= labels < 5"),
        (["--labels", "-1"], "labels holds -1, wanted 0 <= labels < 5"),
        (["--label", "1", "--labels", "2", "3"], "got label 1 and labels (2, 3), wanted one of them"),
        (
            ["--sampler.guidance-scale", "3"],
            "guidance_scale is 3.0 without a label, wanted --label or",
        ),
        (
            ["--label", "1", "--sampler.guidance-scale", "inf"],
            "scale is inf, wanted a finite number",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_labels_at_the_command_line(
    options: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            code: Any = main(["generate", "--model", str(saved), "--out", str(tmp_path / "out"), *options])
        except SystemExit as stopped:
            code = stopped.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert len(lines) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_generate_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAGE(MAGEConfig.tiny(encoder_input="features")).save_pretrained(tmp_path / "model")
    assert main(["generate", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert 'encoder_input is "features", wanted "tokens"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
