"""One module whose ``forward`` is replaced, and what is needed to follow it, to fall back and to undo."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class Replacement:
    """Stands in for an instance's ``forward`` (a bound method in the instance, so that copies of the module
    and pickles of it carry their own) and computes with modules of ours that hold the user's tensors.

    Ours are made on the meta device and are no part of the user's model: its state dict, its parameters and
    its optimisers see nothing of them. Tensors are looked up at every call, so that parameters may be moved,
    cast or replaced.
    """

    #: What runs in place of the forward, for the table.
    what = ""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.ours: Any = None
        #: (our module, our name, their module, their name) of each parameter.
        self.tensors: list[tuple[nn.Module, str, nn.Module, str]] = []
        #: Every module below, as it was when the replacement was made: these are not called any more.
        self.bypassed = [
            (f"{path}.{name}" if path else name, parent, name, child, type(child))
            for path, parent in module.named_modules()
            for name, child in parent.named_children()
        ]
        self.warned = False

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        """The class's own forward again; nothing where it is back already."""
        if "forward" in self.module.__dict__:
            if replacement_of(self.module) is not self:
                name = type(self.module).__name__
                raise ValueError(
                    f"accelerate: someone else has since replaced the forward of {name}; take that back first"
                )
            del self.module.__dict__["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def pair(self, *modules: tuple[nn.Module, nn.Module]) -> None:
        """Let each of our modules have the tensors that its counterpart has under the same names."""
        for ours, theirs in modules:
            self.tensors += [(ours, name, theirs, name) for name in ours._parameters]

    def take_tensors(self) -> None:
        """Give ours the tensors that the user's modules hold now."""
        for ours, our_name, theirs, their_name in self.tensors:
            tensor = getattr(theirs, their_name)
            if ours._parameters[our_name] is not tensor:
                ours._parameters[our_name] = tensor

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def changed(self) -> str | None:
        """Why this cannot stand in any more: a module below was replaced, or carries hooks that would not
        fire.
        """
        if _has_any_global_hook():
            return "hooks for all modules are registered"
        for path, parent, name, child, kind in self.bypassed:
            now = parent._modules.get(name)
            if now is not child or type(now) is not kind:
                return f"{path} was replaced"
            if reason := own_forward_or_hooks(now):
                return f"{path} {reason}"
        return None

    def must_fall_back(self) -> bool:
        """As :meth:`changed`, with a warning the first time."""
        reason = self.changed()
        if reason is not None and not self.warned:
            self.warned = True
            warnings.warn(
                f"accelerate: {type(self.module).__name__} runs its own forward again: {reason}", stacklevel=3
            )
        return reason is not None


def replacement_of(module: nn.Module) -> Replacement | None:
    """What stands in for the module's forward, if anything of ours does."""
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, Replacement) else None


def own_forward_or_hooks(module: nn.Module) -> str | None:
    """Why calls of this module must go on as they are."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "carries hooks, which would not fire"
    if "forward" in module.__dict__ and replacement_of(module) is None:
        return "has a forward of its own in the instance"
    return None


def active_dropout(dropout: Any) -> float:
    """The drop probability that applies now; each dropout follows its own training mode."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def dropout_state(probabilities: Iterable[float], device: torch.device) -> Tensor | None:
    """A random state where something is dropped.

    Drawn by the device's own generator: nothing is copied there, ``torch.manual_seed`` governs it, and
    activation checkpointing, which restores generators, recomputes the same dropout.
    """
    if not any(probabilities):
        return None
    return torch.randint(2**62, (2,), device=device)
