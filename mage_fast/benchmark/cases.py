"""What is timed: every op's specs, on every implementation in its folder and on the op's peers.

Beside the implementations that :mod:`mage_fast.kernels.dispatch` finds, an op has

* ``torch``: ``baseline(**inputs)`` of its ``specs.py``, the eager chain of plain PyTorch calls and what the
  others are compared with (the op's own eager reference where there is none);
* ``torch.compile``: the same, compiled; on CUDA only;
* what ``PEERS`` of an optional ``_peers.py`` names: functions of other packages that take ``**inputs``.

These three draw random numbers of their own.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mage_fast import kernels
from mage_fast.kernels import dispatch
from mage_fast.kernels.roofline import Work

TORCH, COMPILED, REFERENCE = "torch", "torch.compile", "reference"
#: By device type: what is computed in; the ops' statistics are float32 anyway.
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Case:
    """One op at one spec on one device, forward or forward and backward."""

    op: str
    spec: Any
    direction: str
    device: str
    #: What floating inputs are computed in; the device's own choice without.
    precision: torch.dtype | None = None

    @property
    def name(self) -> str:
        return f"{self.op}/{self.spec.name}/{self.direction}"

    @property
    def shape(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self.spec).items() if k != "name"}

    @property
    def dtype(self) -> torch.dtype:
        """Random words and mask plans have no floating input: int32."""
        return (self.precision or DTYPE[self.device]) if is_floating(self.spec) else torch.int32

    @property
    def backward(self) -> bool:
        return self.direction == "fwd+bwd"

    @property
    def baseline(self) -> str:
        """The implementation that the others are compared with."""
        return TORCH if hasattr(module(self.op, "specs"), "baseline") else REFERENCE

    @property
    def work(self) -> Work:
        """What must move and be computed, forward and, where it is timed, backward."""
        forward = self.spec.work(self.dtype, "fwd")
        return forward + self.spec.work(self.dtype, "bwd") if self.backward else forward

    def inputs(self) -> dict[str, Any]:
        """The spec's tensors; ops without floating inputs take no dtype."""
        dtype = {"dtype": self.dtype} if is_floating(self.spec) else {}
        return self.spec.inputs(device=self.device, **dtype)

    def function(self, implementation: str) -> Callable[..., Any]:
        """The op on ``implementation``, a function of the spec's inputs."""
        peers = _peers(self.op)
        if implementation in peers:
            return peers[implementation]
        if implementation == TORCH:
            return module(self.op, "specs").baseline
        if implementation == COMPILED:
            torch.compiler.reset()  # one code object at many shapes: else the limit of recompilations is met
            return torch.compile(module(self.op, "specs").baseline, dynamic=False)
        return partial(getattr(module(self.op, "api"), self.op), implementation=implementation)

    def draws_its_own(self, implementation: str) -> bool:
        """Whether the implementation's random numbers are not those of the randomness contract."""
        return implementation in {TORCH, COMPILED, *_peers(self.op)}

    def runner(self, implementation: str, inputs: dict[str, Any]) -> tuple[Callable[[], Any], list[Tensor]]:
        """What a benchmark repeats, and its first results: the outputs and, with backward, the gradients."""
        call = self.function(implementation)
        if not self.backward:

            def forward() -> Any:
                with torch.no_grad():
                    return call(**inputs)

            return forward, tensors(forward())
        wanted = [x for x in tensors(inputs) if x.requires_grad]
        cotangents = [_cotangent(y, i) for i, y in enumerate(tensors(call(**inputs))) if y.requires_grad]

        def both() -> tuple[list[Tensor], tuple[Tensor, ...]]:
            outputs = tensors(call(**inputs))
            return outputs, torch.autograd.grad([y for y in outputs if y.requires_grad], wanted, cotangents)

        return both, [y.detach() for y in tensors(both())]


def is_floating(spec: Any) -> bool:
    """Whether the spec's inputs come in floating dtypes."""
    parameter = inspect.signature(spec.inputs).parameters.get("dtype")
    return parameter is not None and parameter.default.is_floating_point


def module(op: str, name: str) -> Any:
    """A module of the op's folder."""
    return importlib.import_module(f"{kernels.__name__}.ops.{op}.{name}")


def _peers(op: str) -> dict[str, Callable[..., Any]]:
    found = dispatch._find(op, "_peers")
    return found.PEERS if isinstance(found, ModuleType) else {}


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of inputs or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _cotangent(y: Tensor, index: int) -> Tensor:
    generator = torch.Generator(y.device).manual_seed(index)
    # the same values in every dtype
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float32, device=y.device)
    # laid out as y is: what a gradient has that comes from an op on y
    return torch.empty_like(y).copy_(noise.bfloat16())


def implementations(op: str, device: str, *, compiled: bool = True) -> list[str]:
    """Names of what is timed: the op's modules, its baseline, its peers; some may yet decline a case."""
    found = dispatch.implementations(op)
    if hasattr(module(op, "specs"), "baseline"):
        found.append(TORCH)
        if compiled and device == "cuda":
            found.append(COMPILED)
    return found + sorted(_peers(op))


def specs(op: str, device: str, *, smoke: bool = False) -> list[Any]:
    """The tiny specs, or the real ones: on CUDA those of a whole batch first."""
    everything = module(op, "specs")
    if smoke:
        return [spec for spec in everything.SPECS if spec.name.startswith("tiny")]
    real = [spec for spec in everything.SPECS if not spec.name.startswith(("tiny", "small"))]
    return [*(getattr(everything, "GPU_SPECS", ()) if device == "cuda" else ()), *real]


def directions(op: str) -> list[str]:
    """Forward, and with backward where the op has one."""
    tiny = specs(op, "cpu", smoke=True)[0].inputs()
    return ["fwd"] + ["fwd+bwd"] * any(x.requires_grad for x in tensors(tiny))


def cases(
    ops: tuple[str, ...], device: str, *, smoke: bool = False, dtype: torch.dtype | None = None
) -> list[Case]:
    """Every case of the ops."""
    return [
        Case(op, spec, direction, device, dtype)
        for op in ops
        for spec in specs(op, device, smoke=smoke)
        for direction in directions(op)
    ]
