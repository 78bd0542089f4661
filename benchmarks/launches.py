"""What the Triton launchers launch, found without a GPU: they run on fake tensors and every launch is
recorded. A launcher that reads a value, that is waits for the GPU, fails here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.jit import JITFunction

from mage_fast import kernels
from mage_fast.kernels import dispatch, triton_support

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher launched it, tensors replaced by their dtypes."""

    op: str
    spec: str
    dtype: str
    #: Compute capability that the launcher chose for, 90 for 9.0.
    arch: int
    kernel: Any
    args: tuple
    kwargs: tuple
    grid: tuple[int, ...]

    @property
    def programs(self) -> int:
        return torch.Size(self.grid).numel()

    @property
    def key(self) -> tuple:
        """Equal for launches that run the same machine code."""
        # constants stand for themselves, other arguments for what Triton compiles anew for
        known = (
            x if parameter.is_constexpr else _specialization(x)
            for parameter, x in zip(self.kernel.params, self.args, strict=False)
        )
        return (self.arch, self.kernel.fn.__module__, self.kernel.fn.__name__, *known, self.kwargs)


def _specialization(value: Any) -> Any:
    """What Triton compiles anew for: dtypes, and of integers whether they are 1 or multiples of 16."""
    if isinstance(value, torch.dtype):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return ("int", value == 1, value % 16 == 0, abs(value) >= 2**31)
    return type(value).__name__ if isinstance(value, float) else value


class _ThroughToTriton(TorchDispatchMode):
    """Our ops run their Triton launcher, on fake tensors, in place of the registered fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace != "mage_fast" or args[-1] != "triton":
            return func(*args, **(kwargs or {}))
        name = func.name().removeprefix("mage_fast::")
        triton = dispatch.select(name.removesuffix("_backward"), "triton", "cuda", name, args[:-1])
        return getattr(triton, name)(*args[:-1])


@contextmanager
def _recorded(into: list[tuple]) -> Iterator[None]:
    """Kernel launches are appended to the list and not run."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        into.append((self, args, kwargs, grid))

    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before


def _fake(mode: FakeTensorMode, inputs: dict[str, Any]) -> dict[str, Any]:
    def convert(x: Tensor) -> Tensor:
        with mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        return fake.requires_grad_(x.requires_grad)

    return tree_map_only(Tensor, convert, inputs)


def launches(
    ops: Iterable[str], architectures: Iterable[int], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[list[Launch], list[str]]:
    """Every distinct launch of the ops, forward and backward, at their real shapes in every dtype, for every
    architecture; of launches of the same machine code the one of the most programs. And what was declined.
    """
    found: dict[tuple, Launch] = {}
    declined: list[str] = []
    for op in ops:
        if isinstance(dispatch._find(op, "triton"), str):
            continue
        specs = importlib.import_module(f"{kernels.__name__}.ops.{op}.specs")
        public = getattr(importlib.import_module(f"{kernels.__name__}.ops.{op}.api"), op)
        for spec in (s for s in (*specs.SPECS, *getattr(specs, "GPU_SPECS", ())) if "tiny" not in s.name):
            for dtype in _dtypes(spec, dtypes):
                try:
                    new = list(launches_of(op, public, spec, dtype, architectures))
                except dispatch.Unsupported as reason:
                    declined.append(f"{op} {spec.name} {dtype}: {reason}")
                    continue
                for launch in new:
                    known = found.setdefault(launch.key, launch)
                    found[launch.key] = max(known, launch, key=lambda one: one.programs)
    return list(found.values()), declined


def _dtypes(spec: Any, floating: tuple[torch.dtype, ...]) -> tuple[torch.dtype | None, ...]:
    """The dtypes that a spec's inputs come in; None where they have no choice."""
    parameter = inspect.signature(spec.inputs).parameters.get("dtype")
    if parameter is None:
        return (None,)
    return floating if parameter.default.is_floating_point else (parameter.default,)


def launches_of(
    op: str, public: Any, spec: Any, dtype: torch.dtype | None, architectures: Iterable[int]
) -> Iterator[Launch]:
    """What one spec launches on each architecture."""
    mode = FakeTensorMode()
    inputs = _fake(mode, spec.inputs() if dtype is None else spec.inputs(dtype=dtype))
    label = "-" if dtype is None else str(dtype).removeprefix("torch.")
    before = triton_support.ASSUMED_ARCHITECTURE
    try:
        for arch in architectures:
            triton_support.ASSUMED_ARCHITECTURE = arch
            for kernel, args, kwargs, grid in _records(mode, public, inputs):
                plain = tuple(x.dtype if isinstance(x, Tensor) else x for x in args)
                keywords = tuple(
                    (k, x.dtype if isinstance(x, Tensor) else x) for k, x in sorted(kwargs.items())
                )
                grid = grid(dict(kwargs)) if callable(grid) else grid
                yield Launch(op, spec.name, label, arch, kernel, plain, keywords, tuple(map(int, grid)))
    finally:
        triton_support.ASSUMED_ARCHITECTURE = before


def _dtype_of(x: Any) -> Any:
    """A tensor's dtype stands for it."""
    return x.dtype if isinstance(x, Tensor) else x


def _records(mode: FakeTensorMode, public: Any, inputs: dict[str, Any]) -> list[tuple]:
    """The launches of a call and its backward."""
    records: list[tuple] = []
    with mode, _ThroughToTriton(), _recorded(records):
        outputs = public(**inputs, implementation="triton")
        outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if isinstance(x, Tensor)]
        leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            outputs = [y for y in outputs if y.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs], allow_unused=True)
    return records
