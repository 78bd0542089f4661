"""The whole model on each backend's kernels against itself on the reference ops.

Triton is interpreted without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from mage_fast.config import MAGEConfig
from mage_fast.kernels import dispatch, rng
from mage_fast.model import MAGE
from mage_fast.sampler import generate_ids
from mage_fast.sampler_config import SamplerConfig

#: Backend and the device that it runs on here; "reference" runs beside it there.
BACKENDS = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    found = dispatch._find("add_norm", request.param)
    return pytest.skip(found) if isinstance(found, str) else request.param


def _model(backend: str, **changes: object) -> MAGE:
    torch.manual_seed(0)
    return MAGE(MAGEConfig.tiny(encoder_depth=1, decoder_depth=1, **changes)).to(BACKENDS[backend])


def _forced(implementation: str) -> AbstractContextManager:
    """On a GPU linear layers are the library's behind torch."""
    by_op = {"linear": "auto"} if implementation == "triton" else {}
    return dispatch.use_implementation(implementation, **by_op)


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_a_training_step_has_the_same_masks_dropout_loss_and_gradients(
    backend: str, encoder_tokens: str
) -> None:
    """Per-sample ratios, so that sequences differ in length in the "unmasked" mode."""
    model = _model(backend, encoder_tokens=encoder_tokens).train()
    ids = torch.randint(32, (3, 16), device=BACKENDS[backend])
    found = {}
    for implementation in ("reference", backend):
        with _forced(implementation):
            output = model(ids, mask_ratios_B=torch.tensor([0.5, 0.75, 1.0]), rng_state=rng.new_state(7))
            model.zero_grad()
            output.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[implementation] = (output, grads)
    (wanted, wanted_grads), (got, got_grads) = found["reference"], found[backend]
    assert torch.equal(got.plan.is_masked_BL, wanted.plan.is_masked_BL)
    assert torch.equal(got.plan.positions_T, wanted.plan.positions_T)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    assert got_grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(got_grads[name], grad, rtol=0, atol=2e-5 * scale + 1e-9, msg=name)


def test_generation_gives_the_same_ids(backend: str) -> None:
    model = _model(backend).eval()
    found = []
    for implementation in ("reference", backend):
        with _forced(implementation):
            found.append(generate_ids(model, 2, config=SamplerConfig(steps=3), seed=3))
    assert torch.equal(*found)
