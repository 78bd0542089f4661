"""What the op benchmarks time: every op's specs, on every implementation in its folder, and the gate.

A spec module may define ``baseline(**inputs)``, the op in plain PyTorch calls, named ``torch`` in the
records; without it the op's own eager reference is the baseline.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mage_fast import kernels
from mage_fast.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
#: Allowed above the error of the plain PyTorch path, in units of the dtype's rounding of the largest value.
ROUNDINGS = 8


@dataclass(frozen=True)
class Case:
    """One op at one spec on one implementation, forward or forward and backward."""

    op: str
    spec: Any
    implementation: str
    direction: str

    @property
    def name(self) -> str:
        return f"{self.op}/{self.spec.name}/{self.direction}"

    @property
    def baseline(self) -> str:
        """The implementation that this case is compared with."""
        return "torch" if hasattr(_module(self.op, "specs"), "baseline") else "reference"

    @property
    def shape(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self.spec).items() if k != "name"}

    @property
    def dtype(self) -> str:
        """What the record says; random words and mask plans have no floating input."""
        return str(DTYPE).removeprefix("torch.") if "dtype" in _arguments(self.spec) else "int32"

    def function(self) -> Callable[[dict[str, Any]], list[Tensor]]:
        """Inputs to the outputs and, for ``fwd+bwd``, the gradients after them."""
        if self.implementation == "torch":
            call = _module(self.op, "specs").baseline
        else:
            call = partial(getattr(_module(self.op, "api"), self.op), implementation=self.implementation)
        return lambda inputs: _run(call, inputs, backward=self.direction == "fwd+bwd")


def _module(op: str, name: str) -> Any:
    return importlib.import_module(f"{kernels.__name__}.ops.{op}.{name}")


def _arguments(spec: Any) -> dict[str, Any]:
    accepted = inspect.signature(spec.inputs).parameters
    floating = "dtype" in accepted and accepted["dtype"].default.is_floating_point
    return {"device": DEVICE} | ({"dtype": DTYPE} if floating else {})


def inputs(spec: Any) -> dict[str, Any]:
    """The spec's tensors; ops without floating inputs take no dtype."""
    return spec.inputs(**_arguments(spec))


def cases() -> list[Case]:
    """Every benchmark of every op that has a folder."""
    found = []
    for op in dispatch.OPS:
        folder = Path(kernels.__path__[0]) / "ops" / op
        if not folder.is_dir():
            continue
        _module(op, "api")  # registers the op
        specs = _module(op, "specs")
        modules = {module.name for module in pkgutil.iter_modules([str(folder)]) if module.name[0] != "_"}
        names = sorted(modules - {"api", "specs"})
        names += ["torch"] if hasattr(specs, "baseline") else []
        directions = ["fwd"] + ["fwd+bwd"] * hasattr(torch.ops.mage_fast, f"{op}_backward")
        found += [Case(op, *rest) for rest in product(specs.SPECS, names, directions)]
    return found


def _run(call: Callable[..., Any], inputs: dict[str, Any], *, backward: bool) -> list[Tensor]:
    if not backward:
        with torch.no_grad():
            return _tensors(call(**inputs))
    outputs = _tensors(call(**inputs))
    wanted = [x for x in _tensors(inputs) if x.requires_grad]
    differentiable = [x for x in outputs if x.requires_grad]
    grads = torch.autograd.grad(differentiable, wanted, [torch.ones_like(x) for x in differentiable])
    return outputs + list(grads)


def _tensors(tree: Any) -> list[Tensor]:
    if dataclasses.is_dataclass(tree):
        tree = vars(tree)
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def check(case: Case) -> None:
    """The correctness gate: against the reference, in float64 where the result is floating.

    Raises:
        AssertionError: wrong values; such a case must not be timed.
    """
    given = inputs(case.spec)
    reference = dataclasses.replace(case, implementation="reference").function()
    got, plain, exact = case.function()(given), reference(given), reference(_double(given))
    assert len(got) == len(plain), f"{case.name}: {len(got)} results, the reference has {len(plain)}"
    for index, (x, same_dtype, oracle) in enumerate(zip(got, plain, exact, strict=True)):
        if not x.is_floating_point():
            assert torch.equal(x, same_dtype), f"{case.name}: result {index} differs from the reference"
            continue
        scale = float(oracle.detach().abs().max()) if oracle.numel() else 0.0
        allowed = _error(same_dtype, oracle) + ROUNDINGS * torch.finfo(x.dtype).eps * scale
        error = _error(x, oracle)
        assert error <= allowed, f"{case.name}: result {index} is off by {error:.3g}, allowed {allowed:.3g}"


def _error(x: Tensor, oracle: Tensor) -> float:
    return float((x - oracle).detach().abs().max()) if x.numel() else 0.0


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for key, x in inputs.items()
    }
