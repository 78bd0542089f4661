"""Which modules can be replaced: the right parts under the right names, and the same result.

Names alone prove nothing (an ``attn`` may be causal, windowed, or order its heads another way), so every
module also runs once beside its replacement, with random weights in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mage_fast.acceleration.replacement import Replacement
from mage_fast.acceleration.transformer import FastAttention, FastBlock, FastMlp
from mage_fast.kernels.dispatch import use_implementation
from mage_fast.kernels.ops.attention.api import MAX_HEAD_FEATURES

#: What each kind of module is known by, and the dropouts and the like that it may have beside it.
PARTS = {
    "block": ({"norm1", "attn", "norm2", "mlp"}, set()),
    "attention": ({"qkv", "proj"}, {"attn_drop", "proj_drop"}),
    "MLP": ({"fc1", "fc2"}, {"act", "drop", "drop1", "drop2"}),
}
WANTED = "; ".join(f"{kind} ({', '.join(sorted(parts))})" for kind, (parts, _) in PARTS.items())
#: Where classes keep their number of heads.
_HEADS = ("num_heads", "heads", "n_heads", "num_attention_heads")
#: Relative to the largest value; other activations, scales or layouts differ by far more.
_SAME = 1e-5
#: What a module's own forward may raise on an input that it is not made for.
_REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
)


def kind_of(module: nn.Module) -> str | None:
    """Which of :data:`PARTS` the module has."""
    return next((kind for kind, (parts, _) in PARTS.items() if parts <= module._modules.keys()), None)


class Search:
    """Finds replacements; of modules that are made alike only the first is run."""

    def __init__(self) -> None:
        self._known: dict[tuple, int | str] = {}

    def replacement_for(self, module: Any, kind: str) -> Replacement | str:
        """What can stand in for the module's forward, proven equal, or why nothing can."""
        reason = _unknown(module, kind)
        if "forward" in module.__dict__:
            reason = "has a forward of its own in the instance"
        if reason is not None:
            return reason
        candidates = _candidates(module, kind)
        if not candidates:
            return f"wanted heads of a multiple of 8 features up to {MAX_HEAD_FEATURES}"
        reason = candidates[0].changed()
        if reason is not None:
            return reason
        make = _make(module)
        if make not in self._known:
            self._known[make] = _first_equal(candidates)
        found = self._known[make]
        return found if isinstance(found, str) else candidates[found]


def _candidates(module: Any, kind: str) -> list[Replacement]:
    """A replacement for each number of heads that the module may have: the one it names, or all possible."""
    if kind == "MLP":
        return [FastMlp(module)]
    attention, fast = (module, FastAttention) if kind == "attention" else (module.attn, FastBlock)
    width = attention.proj.in_features
    named = [getattr(attention, name) for name in _HEADS if isinstance(getattr(attention, name, None), int)]
    counts = named[:1] or range(1, width // 8 + 1)
    possible = [n for n in counts if n > 0 and width % (8 * n) == 0 and width // n <= MAX_HEAD_FEATURES]
    return [fast(module, heads) for heads in possible]


def _make(module: nn.Module) -> tuple:
    """Equal for modules that compute the same: classes, attributes, shapes of parameters."""
    internal = nn.Module().__dict__.keys()
    plain = (bool, int, float, str, bytes, torch.dtype, type(None))
    return tuple(
        (
            name,
            type(part),
            *((key, tuple(x.shape)) for key, x in part._parameters.items() if x is not None),
            *(
                (key, value if isinstance(value, plain) or _plain_tuple(value, plain) else id(value))
                for key, value in part.__dict__.items()
                if key not in internal
            ),
        )
        for name, part in module.named_modules()
    )


def _plain_tuple(value: Any, plain: tuple[type, ...]) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, plain) for x in value)


def _unknown(module: Any, kind: str) -> str | None:
    """What the module has that its replacement would not compute with."""
    needed, optional = PARTS[kind]
    own = [name for name, x in (*module._parameters.items(), *module._buffers.items()) if x is not None]
    if own:
        return f"has a tensor {own[0]!r} that is not known"
    for name, child in module._modules.items():
        if name in needed or name == "act" or child is None or isinstance(child, nn.Identity):
            continue
        if name in optional and isinstance(child, nn.Dropout):
            continue
        wanted = "nn.Dropout" if name in optional else "nn.Identity"
        return f"{name} is {type(child).__name__}, wanted {wanted}"
    if kind == "attention":
        width = getattr(module.proj, "in_features", None)
        reason = _not_linear(module, "qkv", width, 3 * (width or 0))
        return reason or _not_linear(module, "proj", width, width)
    if kind == "MLP":
        width, hidden = (getattr(module.fc1, name, None) for name in ("in_features", "out_features"))
        reason = _not_linear(module, "fc1", width, hidden) or _not_linear(module, "fc2", hidden, width)
        return reason or ("fc1 has no bias" if module.fc1.bias is None else None)
    for name, part in (("attn", "attention"), ("mlp", "MLP")):
        child = module._modules[name]
        if child is None or kind_of(child) != part:
            return f"{name} is {type(child).__name__}, wanted {part} of {', '.join(sorted(PARTS[part][0]))}"
        if reason := _unknown(child, part):
            return f"{name}.{reason}" if reason.split()[0] in child._modules else f"{name} {reason}"
    for name in ("norm1", "norm2"):
        norm, width = module._modules[name], module.attn.proj.in_features
        if not isinstance(norm, nn.LayerNorm) or norm._modules or set(norm._parameters) != {"weight", "bias"}:
            return f"{name} is {type(norm).__name__}, wanted nn.LayerNorm"
        if norm.weight is None or norm.bias is None or tuple(norm.normalized_shape) != (width,):
            return f"{name} is {norm}, wanted nn.LayerNorm({width}) with weight and bias"
    if module.mlp.fc1.in_features != width:
        return f"mlp.fc1 has {module.mlp.fc1.in_features} features, wanted {width} as attn.proj"
    return None


def _not_linear(module: Any, name: str, inputs: int | None, outputs: int | None) -> str | None:
    linear = module._modules[name]
    if not isinstance(linear, nn.Linear) or linear._modules or set(linear._parameters) != {"weight", "bias"}:
        return f"{name} is {type(linear).__name__}, wanted nn.Linear"
    if (linear.in_features, linear.out_features) != (inputs, outputs):
        return f"{name} is {linear}, wanted {inputs} to {outputs} features"
    return None if linear.weight.is_floating_point() else f"{name} has weights of {linear.weight.dtype}"


def _first_equal(candidates: list[Replacement]) -> int | str:
    """Index of the first replacement whose results are the module's own, or how they differ.

    In eval mode, and in training mode with dropouts off, so that no other randomness goes unseen.
    """
    module = candidates[0].module
    generator = torch.Generator("cpu").manual_seed(0)
    width = next(x.shape[1] for x in module.parameters() if x.dim() == 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    x_BSD = normal(2, 5, width)
    left = list(range(len(candidates)))
    with (
        _parameters_as(module, normal),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        use_implementation("reference"),
    ):
        for mode in ("eval", "training"):
            with _mode_without_dropout(module, mode == "training"):
                try:
                    theirs = candidates[0].plain(x_BSD)
                except _REFUSALS as error:
                    text = str(error).partition("\n")[0]
                    return f"its own forward raises {type(error).__name__} on rows [B, S, D]: {text}"
                if not isinstance(theirs, Tensor) or theirs.shape != x_BSD.shape:
                    return "its own forward does not return one tensor of the input's shape"
                errors = [(candidates[n].forward(x_BSD) - theirs).abs().max() for n in left]
            largest = theirs.abs().max()
            # written so that NaN is an error
            if not any(error <= _SAME * largest for error in errors):
                least = min(errors) / largest
                return (
                    f"its result differs by {least:.1g} of the largest value in {mode} mode{_guess(module)}"
                )
            left = [n for n, error in zip(left, errors, strict=True) if error <= _SAME * largest]
    return left[0]


def _guess(module: nn.Module) -> str:
    """What is known to differ, to be named in the reason."""
    for name, child in module.named_modules():
        if name.rpartition(".")[2] == "act" and ("GELU" not in str(child) or "tanh" in str(child)):
            return f": {name} is {child}, wanted erf GELU"
    return ", being no attention or MLP of the usual kind"


@contextmanager
def _parameters_as(module: nn.Module, draw: Callable[..., Tensor]) -> Iterator[None]:
    """Random tensors in place of all parameters, whose device and values so do not matter."""
    places = [
        (part._parameters, name, x)
        for part in module.modules()
        for name, x in part._parameters.items()
        if x is not None
    ]
    try:
        for parameters, name, x in places:
            scale = 1 / math.sqrt(x.shape[1]) if x.dim() > 1 else 1.0
            parameters[name] = draw(*x.shape) * scale  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, x in places:
            parameters[name] = x


@contextmanager
def _mode_without_dropout(module: nn.Module, training: bool) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    dropouts = [(part, part.p) for part in module.modules() if isinstance(part, nn.Dropout)]
    try:
        for part, _ in modes:
            part.training = training
        for dropout, _ in dropouts:
            dropout.p = 0.0
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for dropout, p in dropouts:
            dropout.p = p
