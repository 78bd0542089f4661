"""AdamW with the paper's parameter groups, gradient clipping, and an exponential moving average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mage_fast.errors import CheckpointError, InputError
from mage_fast.training.precision import LossScale


def adamw_parameter_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases and 1-D tensors (LayerNorm) without.

    Parameters that need no gradient are left out, shared ones appear once.

    Source: the pre-training recipe of the paper's appendix.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def decays(name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1 and name.rpartition(".")[2] != "bias"

    groups = (
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def layer_decay_groups(
    layers: Sequence[nn.Module], layer_decay: float, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rates fall by a factor from one layer to the one before it.

    A group's ``lr_scale``, by which :func:`~mage_fast.training.schedule.set_lr` multiplies, is
    ``layer_decay ** (number of layers behind)``: 1 for the last. Weight decay as in
    :func:`adamw_parameter_groups`.

    Args:
        layers: from the input to the output, without parameters in common.
        layer_decay: the factor.
        weight_decay: of matrices.

    Raises:
        InputError: a factor outside (0, 1].

    Source: Clark et al. 2020 (ELECTRA), appendix B; the fine-tuning recipe of the paper's appendix.
    """
    if not 0 < layer_decay <= 1:
        raise InputError(f"layer_decay_groups: layer_decay is {layer_decay}, wanted 0 < layer_decay <= 1")
    return [
        group | {"lr_scale": layer_decay**behind}
        for behind, layer in zip(reversed(range(len(layers))), layers, strict=True)
        for group in adamw_parameter_groups(layer, weight_decay)
    ]


def build_adamw(
    model: nn.Module | list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
) -> torch.optim.AdamW:
    """AdamW over a model's parameter groups (or over groups given), as one fused kernel where there is one.

    Raises:
        InputError: nothing to train, a negative lr.
    """
    groups = adamw_parameter_groups(model, weight_decay) if isinstance(model, nn.Module) else model
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters or lr < 0:
        raise InputError(
            f"build_adamw: {len(parameters)} trainable tensors and lr {lr}, wanted some and 0 or more"
        )
    fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def clipped_step(
    optimizer: torch.optim.Optimizer, max_norm: float | None, loss_scale: LossScale | None = None
) -> Float[Tensor, ""]:
    """Clip all gradients to a joint L2 norm and step; the norm before that, on the device.

    A step whose norm is not finite is skipped: parameters and states stay as they were. Of sharded parameters
    (``fully_shard``) the norm is that of the whole gradients, so every process decides alike. A fused
    optimizer skips on the device, where nothing waits, and divides the gradients as it reads them, which
    saves a pass over them; the clipped ones are left in ``.grad`` in either case.

    Equivalent PyTorch::

        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if norm.isfinite():
            optimizer.step()

    Args:
        optimizer: has gradients.
        max_norm: None clips nothing.
        loss_scale: gradients are of the loss times this scale, which is updated. The optimizer must be fused.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    divisor = None
    if loss_scale is not None:
        norm = norm / loss_scale.scale
    if max_norm is not None:
        divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # as clip_grad_norm_ has it
    if not is_fused(optimizer) or norm.dtype == torch.float64:  # fused kernels divide by a float32
        if norm.isfinite():
            if divisor is not None:
                torch._foreach_div_(gradients, divisor)
            optimizer.step()
        return norm
    found_inf = (~norm.isfinite()).to(torch.float32)
    if divisor is not None:
        divisor = divisor.to(torch.float32)
    if loss_scale is not None:
        divisor = loss_scale.scale * (1.0 if divisor is None else divisor)
    # where a GradScaler leaves them for the fused kernel
    optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    if loss_scale is not None:
        loss_scale.update(found_inf)
    return norm


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernel divides gradients itself."""
    return all(group.get("fused") for group in optimizer.param_groups)


class Ema:
    """Exponential moving average of a model's state: ``average += (1 - decay) * (value - average)``.

    Trained parameters are averaged in their own dtype, buffers are copied; frozen parameters are left out.

    Raises:
        InputError: ``decay`` outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"Ema: decay is {decay}, wanted 0 <= decay < 1")
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = {name: p.detach().clone() for name, p in trained.items()}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        # one call takes plain tensors or FSDP2's DTensors, not both
        kinds: dict[type, list[str]] = {}
        for name, average in self._parameters.items():
            kinds.setdefault(type(average), []).append(name)
        self._alike = list(kinds.values())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model, in one fused call; two where FSDP2 shards only a part."""
        current = dict(model.named_parameters())
        for names in self._alike:
            averages = [self._parameters[name] for name in names]
            torch._foreach_lerp_(averages, [current[name] for name in names], 1 - self.decay)
        for name, buffer in model.named_buffers():
            self._buffers[name].copy_(buffer)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the block, ``model`` computes with the average."""
        _reshard(model)
        own, average = {**dict(model.named_parameters()), **dict(model.named_buffers())}, self.state_dict()
        with torch.no_grad():
            kept = {name: own[name].clone() for name in average}
            _copy(own, average)
        try:
            yield
        finally:
            _reshard(model)
            with torch.no_grad():
                _copy(own, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name, not copied."""
        return self._parameters | self._buffers

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over an average.

        Raises:
            CheckpointError: other names or shapes.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise CheckpointError(f"Ema: keys differ in {sorted(own.keys() ^ state.keys())[:3]}")
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise CheckpointError(
                    f"Ema: {name} has shape {tuple(value.shape)}, wanted {tuple(own[name].shape)}"
                )
        _copy(own, state)


def _reshard(model: nn.Module) -> None:
    """FSDP2 may keep whole copies of parameters after a forward, which would not follow a change."""
    for module in model.modules():
        if (reshard := getattr(module, "reshard", None)) is not None:
            reshard()


def _copy(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
