"""The model under ``torch.compile``: one graph, and no new one at each number of masked tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.masking import draw_plan
from mage_fast.training.optim import build_adamw
from mage_fast.training.step import TrainStep
from tests.models import build, draw_ids, tiny


def mark_dynamic(plan: MaskPlan) -> None:
    """What changes from step to step: masked rows, and in the "unmasked" mode encoded rows."""
    for x in (plan.masked_index_N, plan.positions_T if plan.visible_V is None else plan.visible_V):
        torch._dynamo.mark_dynamic(x, 0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_other_masks_need_no_other_graph(encoder_tokens: Any, backend: str) -> None:
    config = tiny(encoder_tokens=encoder_tokens, encoder_depth=1, decoder_depth=1)
    model, ids = build(config).train(), draw_ids(config, 3)
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # the cache of compiled graphs outlives a change of an op's schema
    with torch._inductor.config.patch(force_disable_caches=True):
        for number, ratio in enumerate([0.5, 0.95, 0.7, 0.6]):
            state = rng.new_state(4, number)
            plan = draw_plan(config, torch.full((3,), ratio), state)
            mark_dynamic(plan)
            results = []
            for forward in (model, compiled):
                loss = forward(ids, plan=plan, rng_state=state).loss
                results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
            torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    # in the "unmasked" mode the longest sequence is a number of the host, made dynamic when it first changes
    assert counter.frame_count == (1 if encoder_tokens == "paper" else 2)


def test_a_compiled_model_trains() -> None:
    """``model.compile()``: the sizes become dynamic when they first change."""
    config = tiny(encoder_depth=1, decoder_depth=1)
    model, ids = build(config).train(), draw_ids(config, 3)
    plain = build(config).train()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=counter)
    steps = [TrainStep(m, build_adamw(m, 1e-3)) for m in (plain, model)]
    for number in range(6):
        wanted, got = (step(ids, rng_state=rng.new_state(4, number)) for step in steps)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 2
