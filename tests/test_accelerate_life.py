"""What happens to an accelerated model afterwards: moved, copied, hooked, changed, compiled, undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import ln_structured
from torch.optim import swa_utils

from mage_fast import accelerate, reference
from mage_fast.acceleration import AcceleratedOutput
from tests import vision_transformers as vit
from tests.models import assert_near, build, draw_ids, tiny, twin


def mage(**changes: Any) -> reference.MAGE:
    config = tiny(**{"dropout": 0.0, **changes})
    return twin(build(config).train(), config)


def given(model: reference.MAGE) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    drop_mask, mask = model.draw_masks(2, torch.device("cpu"))
    return draw_ids(tiny(), 2), {"drop_mask": drop_mask, "mask": mask}


def is_fast(model: nn.Module) -> bool:
    ids, masks = given(model)
    return type(model(ids, **masks)) is AcceleratedOutput


# Nothing of ours shows


def test_the_model_looks_as_before() -> None:
    model = mage()
    before = (list(model.state_dict()), [id(x) for x in model.parameters()], list(model.modules()))
    kind, text = type(model), str(model)
    accelerate(model)
    assert before == (list(model.state_dict()), [id(x) for x in model.parameters()], list(model.modules()))
    assert type(model) is kind
    assert str(model) == text


def test_undo_restores_the_classes_forward_and_its_bits() -> None:
    model, plain = mage(dropout=0.2), mage(dropout=0.2)
    ids, masks = given(model)
    with accelerate(model) as handle:
        assert is_fast(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.forward == reference.MAGE.forward.__get__(model)
    handle.undo()
    outputs = []
    for x in (model, plain):
        torch.manual_seed(1)
        outputs.append(x(ids, **masks))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    handle = accelerate(model)  # and again
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match="someone else has since replaced the forward of MAGE"):
        handle.undo()
    model.forward = own
    handle.undo()


# Parameters change


def cast(model: nn.Module) -> None:
    model.double()


def assign(model: nn.Module) -> None:
    state = {name: x + 0.1 if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_one(model: nn.Module) -> None:
    model.decoder_pos_embed_learned = nn.Parameter(model.decoder_pos_embed_learned + 1)
    model.blocks[0].attn.qkv.weight = nn.Parameter(model.blocks[0].attn.qkv.weight * 2)


def step(model: nn.Module) -> None:
    ids, masks = given(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(ids, **masks).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("change", [cast, assign, replace_one, step])
def test_parameters_that_change_are_followed(change: Callable[[nn.Module], None]) -> None:
    model, plain = mage(), mage()
    handle = accelerate(model)
    assert is_fast(model)
    change(model)
    change(plain)
    ids, masks = given(model)
    assert is_fast(model)
    assert_near(model(ids, **masks).loss, plain(ids, **masks).loss)
    assert_near(model.features(ids), plain.features(ids))
    assert_near(handle.features(ids), plain.features(ids))


def test_functional_call_and_frozen_parameters() -> None:
    model = mage()
    ids, masks = given(model)
    plain = copy.deepcopy(model)
    accelerate(model)
    others = {name: x.detach() * 1.1 for name, x in model.named_parameters()}
    got, wanted = (torch.func.functional_call(x, others, (ids,), masks).loss for x in (model, plain))
    assert_near(got, wanted)
    assert_near(model(ids, **masks).loss, plain(ids, **masks).loss)
    model.blocks.requires_grad_(False)
    model(ids, **masks).loss.backward()
    assert all(x.grad is None for x in model.blocks.parameters())
    assert model.decoder_embed.weight.grad is not None


# Copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_compute_with_their_own_parameters(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = mage()
    plain = copy.deepcopy(model)
    ids, masks = given(model)
    accelerate(model)
    model(ids, **masks)
    average = copied(model)
    with torch.no_grad():
        for name, x in average.named_parameters():
            x.mul_(0.7)
            plain.get_parameter(name).mul_(0.7)
    assert is_fast(average)
    assert_near(average(ids, **masks).loss, plain(ids, **masks).loss)
    assert_near(average.features(ids), plain.features(ids))
    average(ids, **masks).loss.backward()
    assert all(x.grad is None for x in model.parameters())
    assert average.blocks[0].attn.qkv.weight.grad is not None


def test_moving_averages_of_stock_torch() -> None:
    model = mage()
    accelerate(model)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    step(model)
    average.update_parameters(model)
    step(model)
    average.update_parameters(model)
    plain = mage()
    plain.load_state_dict(average.module.state_dict())
    ids, masks = given(model)
    assert_near(average(ids, **masks).loss, plain(ids, **masks).loss)


# Hooks and other changes below


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1", "blocks.1.attn", "decoder_norm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire(name: str, when: str) -> None:
    model, plain, seen = mage(), mage(), []
    ids, masks = given(model)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.shape)
        return output * 1.5

    plain.get_submodule(name).register_forward_hook(hook)
    wanted = plain(ids, **masks)
    seen.clear()
    if when == "before":
        removable = model.get_submodule(name).register_forward_hook(hook)
        handle = accelerate(model)
        inside = name.startswith("blocks.1.")
        wanted_reason = (
            "blocks.1 cannot be replaced" if inside else f"{name} carries hooks, which would not fire"
        )
        assert handle.skipped[""] == wanted_reason
        assert not inside or "carries hooks" in handle.skipped["blocks.1"]
        assert "blocks.0" in handle.replaced
        got = model(ids, **masks)
    else:
        handle = accelerate(model)
        assert is_fast(model)
        removable = model.get_submodule(name).register_forward_hook(hook)
        with pytest.warns(UserWarning, match=f"MAGE runs its own forward again: {name} carries hooks"):
            got = model(ids, **masks)
        with pytest.raises(ValueError, match=f"no longer as it was accelerated: {name} carries"):
            handle.features(ids)
    assert len(seen) == 1
    assert_near(got.loss, wanted.loss)
    assert_near(got.logits, wanted.logits)
    removable.remove()
    assert is_fast(model) == (when == "after")


def test_hooks_of_the_replaced_modules_themselves_fire_and_stay_fast() -> None:
    model, seen = vit.VisionTransformer(), []
    model.blocks[0].register_forward_hook(lambda *args: seen.append("block"))
    model.blocks[0].register_full_backward_hook(lambda *args: seen.append("backward"))
    handle = accelerate(model)
    assert list(handle.replaced) == ["blocks.0", "blocks.1"]
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    assert seen == ["block", "backward"]


def test_hooks_for_all_modules_fire() -> None:
    model, seen = vit.VisionTransformer(), []
    accelerate(model)
    removable = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with pytest.warns(UserWarning, match="hooks for all modules"):
            model(torch.rand(2, 3, 8, 8))
    finally:
        removable.remove()
    assert seen.count(nn.GELU) == 2


class LowRank(nn.Module):
    """Adapter around a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.down(x)


def adapt(block: vit.Block) -> None:
    block.attn.qkv = LowRank(block.attn.qkv)


def parametrize(block: vit.Block) -> None:
    parametrizations.weight_norm(block.mlp.fc1)
    block.mlp.fc1.parametrizations.weight.original0.data *= 2


def prune(block: vit.Block) -> None:
    ln_structured(block.mlp.fc2, "weight", amount=0.5, n=2, dim=0)


def activate(block: vit.Block) -> None:
    block.mlp.act = nn.ReLU()


@pytest.mark.parametrize("change", [adapt, parametrize, prune, activate])
def test_modules_that_change_are_run_by_their_own_forward(change: Callable[[vit.Block], None]) -> None:
    torch.manual_seed(0)
    model = vit.VisionTransformer()
    plain = copy.deepcopy(model)
    accelerate(model)
    for x in (model, plain):
        torch.manual_seed(1)
        change(x.blocks[0])
    images = torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="Block runs its own forward again: "):
        assert_near(model(images), plain(images))


# Wrappers and modes of torch


def test_wrapped_models_are_accelerated_inside() -> None:
    images = torch.rand(2, 3, 8, 8)
    model = vit.VisionTransformer()
    wanted = model(images)
    handle = accelerate(torch.compile(model, backend="eager"))
    assert handle.model is model
    assert list(handle.replaced) == ["blocks.0", "blocks.1"]
    assert_near(model(images), wanted)


def test_torch_compile_in_one_graph() -> None:
    torch.manual_seed(0)
    model = vit.VisionTransformer(depth=1)
    plain = copy.deepcopy(model)
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.rand(2, 3, 8, 8)
    assert_near(compiled(images), plain(images))
    compiled(images).square().sum().backward()
    plain(images).square().sum().backward()
    assert_near(model.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attn.qkv.weight.grad, 1e-4)
    model.blocks[0].mlp.fc1.weight.data *= 2
    plain.blocks[0].mlp.fc1.weight.data *= 2
    assert_near(compiled(images), plain(images))


def test_torch_compile_of_the_step() -> None:
    model = mage(encoder_depth=1, decoder_depth=1)
    plain = copy.deepcopy(model)
    accelerate(model)
    ids, masks = given(model)
    compiled = torch.compile(model, backend="eager")
    assert_near(compiled(ids, **masks).loss, plain(ids, **masks).loss)


def test_autocast_bfloat16() -> None:
    """No further from float32 than the plain model under autocast, and half as far again."""
    model = mage(encoder_width=64, decoder_width=64)
    plain = copy.deepcopy(model)
    ids, masks = given(model)
    wanted = plain(ids, **masks).loss
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [x(ids, **masks).loss for x in (model, plain)]
    assert losses[0].dtype == torch.float32
    assert (losses[0] - wanted).abs() <= 1.5 * (losses[1] - wanted).abs() + 2e-2
    losses[0].backward()
    losses[1].backward()
    for name, x in model.named_parameters():
        grad = plain.get_parameter(name).grad
        assert (x.grad is None) == (grad is None), name
        if grad is not None and not name.endswith("qkv.bias"):
            assert x.grad.dtype == torch.float32
            assert torch.cosine_similarity(x.grad.flatten(), grad.flatten(), 0) > 0.98, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_equals_the_cpu_and_waits_for_nothing() -> None:
    sizes = {"encoder_width": 64, "encoder_heads": 1, "decoder_width": 96, "decoder_heads": 2}
    plain = mage(**sizes).double()
    ids, masks = given(plain)
    wanted = plain(ids, **masks).loss
    wanted.backward()
    model = mage(**sizes)
    handle = accelerate(model)
    model.cuda()
    masks = {name: mask.cuda() for name, mask in masks.items()}
    loss = model(ids.cuda(), **masks).loss
    loss.backward()
    assert_near(loss.cpu().double(), wanted, 1e-4)
    grad = plain.get_parameter("blocks.0.attn.qkv.weight").grad
    assert_near(model.get_parameter("blocks.0.attn.qkv.weight").grad.cpu().double(), grad, 1e-2)
    assert_near(handle.features(ids.cuda()).cpu().double(), plain.features(ids), 1e-3)
    assert_near(model.features(ids.cuda()).cpu().double(), plain.features(ids), 1e-3)

    for dropout in (part for part in model.modules() if isinstance(part, nn.Dropout)):
        dropout.p = 0.1
    images = torch.rand(2, 5, 64, device="cuda", requires_grad=True)
    ids = ids.cuda()
    for _ in range(2):  # the first compiles
        with torch.autocast("cuda", torch.bfloat16):
            model(ids).loss.backward()
            model.blocks[0](images).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
