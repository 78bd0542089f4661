"""Exported programs: torch alone runs them, and they give what the model gives."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mage_fast import MAGEConfig, SamplerConfig, TokenizerConfig, generate_ids, use_implementation
from mage_fast.export import export_decoding_step, export_encoder, export_image_decoder
from mage_fast.model import MAGE
from tests.models import build, draw_ids, tiny

SHALLOW = {"encoder_depth": 1, "decoder_depth": 1}
SMALL_TOKENIZER = TokenizerConfig(8, 32, 8, 8, (1, 2), 1, 4)
STEPS = 4
SETTINGS: dict[str, tuple[dict[str, Any], SamplerConfig]] = {
    "paper": ({}, SamplerConfig(steps=STEPS)),
    "unmasked, guided": (
        {"encoder_tokens": "unmasked", "padding": "mask_token"},
        SamplerConfig(
            **{"steps": STEPS, "choice_temperature": 3.0, "temperature": 1.2, "final_temperature": 0.7},
            **{"schedule": "constant", "order": "halton", "top_k": 9, "top_p": 0.9},
            **{"guidance_scale": 2.0, "guidance_schedule": "linear"},
        ),
    ),
}


@pytest.fixture(scope="module")
def with_images() -> MAGE:
    return build(MAGEConfig.tiny(tokenizer=SMALL_TOKENIZER, **SHALLOW))


@pytest.fixture(scope="module")
def encoder(with_images: MAGE) -> ExportedProgram:
    return export_encoder(with_images)


@pytest.fixture(scope="module")
def image_decoder(with_images: MAGE) -> ExportedProgram:
    return export_image_decoder(with_images)


@cache
def exported_step(setting: str) -> tuple[MAGE, ExportedProgram]:
    changes, config = SETTINGS[setting]
    model = build(tiny(**SHALLOW, **changes))
    return model, export_decoding_step(model, config)


@pytest.fixture(scope="module", params=SETTINGS)
def stepping(request: pytest.FixtureRequest) -> tuple[MAGE, SamplerConfig, nn.Module]:
    model, program = exported_step(request.param)
    return model, SETTINGS[request.param][1], program.module()


def loop(step: Any, ids_BL: Tensor, class_ids_B: Tensor, mask_token_id: int, seed: int, first: int) -> Tensor:
    """As the docstring of ``export_decoding_step`` writes it."""
    num_unknown_B = (ids_BL == mask_token_id).sum(1)
    samples_B = first + torch.arange(len(ids_BL))
    for t in range(STEPS):
        decided_BL, ids_BL = step(ids_BL, class_ids_B, num_unknown_B, samples_B, torch.tensor([seed, t]))
    return decided_BL


@pytest.mark.parametrize("batch", [1, 5])
def test_encoder_of_images(with_images: MAGE, encoder: ExportedProgram, batch: int) -> None:
    images = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.module()(images), with_images.features(images), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("batch", [1, 5])
def test_images_of_ids(with_images: MAGE, image_decoder: ExportedProgram, batch: int) -> None:
    ids = draw_ids(with_images.config, batch)
    got, wanted = image_decoder.module()(ids), with_images.tokenizer.decode(ids)  # type: ignore[union-attr]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class Patches(nn.Module):
    """A tokenizer of one's own, as a module: 2 x 2 pixels are a token, its code their greatest feature."""

    codebook_size, grid_size, feature_size = 32, 4, 6

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, self.feature_size, 2, 2)

    def encode_with_features(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        features_BLC = self.conv(images_B3HW).flatten(2).transpose(1, 2)
        return features_BLC.argmax(2), features_BLC

    def encode(self, images_B3HW: Tensor) -> Tensor:
        return self.encode_with_features(images_B3HW)[0]

    def decode(self, ids_BL: Tensor) -> Tensor:
        return ids_BL.unflatten(1, (1, 4, 4)).float().tile(1, 3, 2, 2)


def test_encoder_of_ids_and_of_features() -> None:
    model = build(tiny(encoder_tokens="unmasked", **SHALLOW)).train()
    program = export_encoder(model, "ids")
    assert model.training
    features = build(tiny(encoder_input="features", **SHALLOW), tokenizer=Patches())
    images = torch.rand(3, 3, 8, 8)
    for mine, exported, inputs in (
        (model.eval(), program, draw_ids(model.config, 3)),
        (features, export_encoder(features), images),
    ):
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(inputs), mine.features(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 5])
def test_steps_generate(stepping: tuple[MAGE, SamplerConfig, nn.Module], batch: int) -> None:
    model, config, step = stepping
    labels = torch.arange(batch) % 3
    start = torch.full((batch, model.config.num_tokens), model.config.mask_token_id)
    got = loop(step, start, model.class_ids(labels, batch), model.config.mask_token_id, 7, 3)
    with use_implementation("reference"):
        wanted = generate_ids(model, batch, labels_B=labels, config=config, seed=7, first_sample=3)
    assert torch.equal(got, wanted)


def test_steps_fill_in_what_is_missing(stepping: tuple[MAGE, SamplerConfig, nn.Module]) -> None:
    model, config, step = stepping
    start, mask_token_id = draw_ids(model.config, 4), model.config.mask_token_id
    for sample, unknown in enumerate((0, 1, 7, 16)):
        start[sample, :unknown] = mask_token_id
    got = loop(step, start, model.class_ids(None, 4), mask_token_id, 9, 0)
    with use_implementation("reference"):
        assert torch.equal(got, generate_ids(model, ids_BL=start, config=config, seed=9))


ALONE = """
import sys
sys.modules["mage_fast"] = None  # what makes `import mage_fast` fail
import torch
folder = sys.argv[1]
wanted = torch.load(folder + "/wanted.pt", weights_only=True)
for name, inputs, outputs in wanted:
    module = torch.export.load(f"{folder}/{name}.pt2").module()
    results = module(*inputs)
    for got, output in zip(results if isinstance(results, tuple) else (results,), outputs, strict=True):
        assert torch.equal(got, output), name
        assert not got.requires_grad
assert "mage_fast.kernels" not in sys.modules
print("alone")
"""


def test_torch_alone_runs_what_was_saved(
    with_images: MAGE, encoder: ExportedProgram, image_decoder: ExportedProgram, tmp_path: Path
) -> None:
    model, step = exported_step("paper")
    class_ids = torch.full((5,), 3)
    start = torch.full((5, 16), model.config.mask_token_id)
    arguments = {
        "encoder": (encoder, (torch.rand(3, 3, 8, 8),)),
        "decoder": (image_decoder, (draw_ids(with_images.config, 3),)),
        "step": (step, (start, class_ids, torch.full((5,), 16), torch.arange(5), torch.tensor([4, 1]))),
    }
    wanted = []
    for name, (program, inputs) in arguments.items():
        assert "mage_fast" not in str(program.graph)
        torch.export.save(program, tmp_path / f"{name}.pt2")
        outputs = program.module()(*inputs)
        wanted.append((name, inputs, outputs if isinstance(outputs, tuple) else (outputs,)))
    torch.save(wanted, tmp_path / "wanted.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "alone\n", done.stderr


def test_a_program_has_weights_of_its_own_and_no_other(with_images: MAGE, encoder: ExportedProgram) -> None:
    parts = {".".join(name.split(".")[:3]) for name in encoder.state_dict}
    assert {part for part in parts if "decoder" in part or "head" in part} == set()
    theirs = {x.data_ptr() for x in with_images.parameters()}
    assert theirs.isdisjoint(x.data_ptr() for x in encoder.state_dict.values())


class Plain:
    """A tokenizer that is no module."""

    codebook_size, grid_size = 32, 4

    def encode(self, images_B3HW: Tensor) -> Tensor:
        return torch.zeros(len(images_B3HW), 16, dtype=torch.int64)

    def decode(self, ids_BL: Tensor) -> Tensor:
        return torch.zeros(len(ids_BL), 3, 8, 8)


def test_what_cannot_be_exported_is_refused() -> None:
    model = build(tiny(**SHALLOW))
    with pytest.raises(ValueError, match="inputs is 'tokens', wanted one of images, ids"):
        export_encoder(model, "tokens")  # type: ignore[arg-type]
    for export in (export_encoder, export_image_decoder):
        with pytest.raises(ValueError, match="has no tokenizer"):
            export(model)
        with pytest.raises(ValueError, match="the tokenizer is a Plain, wanted a torch"):
            export(MAGE(tiny(**SHALLOW), Plain()))
    with pytest.raises(ValueError, match="approximation is 'drop_masked', wanted 'none'"):
        export_decoding_step(model, SamplerConfig(approximation="drop_masked"))
    features = build(tiny(encoder_input="features", **SHALLOW), tokenizer=Patches())
    with pytest.raises(ValueError, match='encoder_input is "features"'):
        export_encoder(features, "ids")
    with pytest.raises(ValueError, match='encoder_input is "features"'):
        export_decoding_step(features)
