"""The suite that every implementation of every op passes.

An op's tests subclass :class:`OpSuite` and give its name, an oracle (plain PyTorch that takes the op's
inputs) and the bad inputs. The suite runs on every implementation found in the op's folder, on every
device that it runs on, so a new implementation is tested by its file's existence.

The rule of every comparison: the error against the oracle in float64 is at most the error of the same
oracle in the tested dtype, plus ``TOLERANCE[dtype]`` times the largest value.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mage_fast.kernels import dispatch

#: One unit in the last place; float64 has no plain error to lean on, hence more.
TOLERANCE = {torch.float64: 1e-13} | {
    dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
#: Property-based tests: few examples, the same in each run. A parametrised method runs on several instances
#: of its class, each with the same examples, which is no executor that differs.
few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors],
)


@dataclass(frozen=True)
class Target:
    """One implementation on one device."""

    implementation: str
    device: str

    @property
    def widest(self) -> torch.dtype:
        """For tests of everything but dtypes: the reference takes float64, kernels float32."""
        return torch.float64 if self.implementation == "reference" else torch.float32

    @property
    def interpreted(self) -> bool:
        """Triton kernels without a GPU: right but slow."""
        return (self.implementation, self.device) == ("triton", "cpu")


def targets(op: str) -> list:
    """A pytest parameter for each implementation in the op's folder and each device that it runs on."""
    found = []
    for name in dispatch.implementations(op):
        module = dispatch._find(op, name)
        for device in ("cpu", "cuda"):
            if device not in (getattr(module, "DEVICES", None) or ("cpu", "cuda")):
                continue
            marks = [pytest.mark.skip(reason=f"{op}/{name}: {module}")] if isinstance(module, str) else []
            if device == "cuda":
                no_cuda = not torch.cuda.is_available()
                marks += [pytest.mark.gpu, pytest.mark.skipif(no_cuda, reason="no CUDA device")]
            found.append(pytest.param(Target(name, device), id=f"{name}-{device}", marks=marks))
    return found


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of an op's result: a tensor, a tuple or a dataclass of them."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if dataclasses.is_dataclass(outputs):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    return [x for x in outputs if isinstance(x, Tensor)]


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """The same inputs as fresh leaves, floating tensors in ``dtype``; strides are kept."""
    return laid_out(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)


def stepped(x: Tensor) -> Tensor:
    """The same values at every second element of a buffer whose other elements are NaN (or -7)."""
    buffer = x.new_full((*x.shape, 2), torch.nan if x.is_floating_point() else -7)
    buffer[..., 0] = x
    return buffer[..., 0]


def transposed(x: Tensor) -> Tensor:
    """The same values with the last dimension strided over the first."""
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


LAYOUTS = (stepped, transposed)


def laid_out(inputs: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    """The same inputs as fresh leaves, every tensor in another layout."""
    return tree_map_only(Tensor, lambda x: layout(x.detach()).requires_grad_(x.requires_grad), inputs)


def cotangent(y: Tensor, index: int) -> Tensor:
    """What comes back for output ``index``: random, the same values in every dtype (they fit bfloat16)."""
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(index)).bfloat16()
    return noise.to(y.device, y.dtype)


def differentiate(
    function: Callable, inputs: dict, layout: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Tensor]:
    """Outputs and, by input's name, gradients; ``layout`` is applied to the incoming gradients."""
    outputs = tensors(function(**inputs))
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        pairs = [(y, layout(cotangent(y, i))) for i, y in enumerate(outputs) if y.requires_grad]
        grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def assert_as_good(actual: dict, plain: dict, oracle: dict, tolerance: float, floor: float = 0.0) -> None:
    """The module's rule, for each tensor; integers and booleans are equal."""
    assert actual.keys() == plain.keys() == oracle.keys()
    for name, wanted in oracle.items():
        got = actual[name]
        assert got.shape == wanted.shape, name
        if not wanted.is_floating_point():
            assert torch.equal(got.long(), wanted.long()), name
        elif wanted.numel():
            error = (got.double() - wanted).abs().max().item()
            plain_error = (plain[name].double() - wanted).abs().max().item()
            bound = plain_error + tolerance * max(wanted.abs().max().item(), floor)
            assert error <= bound, f"{name}: {error=:.3g}, {plain_error=:.3g}, {bound=:.3g}"


def assert_equal(actual: dict, wanted: dict) -> None:
    """Bit equality of every tensor, dtype and NaN included."""
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def results_by_threads(call: Callable[[], Any]) -> list[Any]:
    """What the call gives on 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


@contextmanager
def nan_filled_buffers() -> Iterator[None]:
    """New uninitialised memory holds NaN, so an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of our ops with fresh leaves of the same memory as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "mage_fast":
            self.calls.append((func, laid_out(args, lambda x: x)))
        return func(*args, **(kwargs or {}))


class OpSuite:
    """Subclass as ``class TestOp(OpSuite)``."""

    op: str
    #: staticmethod: the op in plain PyTorch, with autograd, on inputs of any floating dtype.
    oracle: Callable[..., Any]
    #: id -> (changes to the first tiny spec's inputs, the ValueError's message)
    bad: dict[str, tuple[dict, str]] = {}  # noqa: RUF012
    #: Size of the terms that cancel in the op: results smaller than it are compared as if they were as large.
    floor = 0.0
    #: Units in the last place allowed beyond the plain error; more than one says why.
    units = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    #: The dtype of the tests that are not about dtypes.
    dtype = torch.float32

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        tiny = [s for s in self.specs() if s.name.startswith("tiny")]
        choices: dict[str, tuple[list, Callable]] = {
            "target": (targets(self.op), str),
            "compiled": ([p for p in targets(self.op) if p.values[0].implementation == "cpp"], str),
            "spec": (list(self.specs()), lambda s: s.name),
            "tiny": (tiny, lambda s: s.name),
            "dtype": (list(self.dtypes), lambda d: str(d).removeprefix("torch.")),
            "layout": (list(LAYOUTS), lambda f: f.__name__),
            "bad_input": (list(self.bad), str),
        }
        if {"target", "spec"} <= set(metafunc.fixturenames):
            metafunc.parametrize(("target", "spec"), self.pairs())
            choices = {name: choice for name, choice in choices.items() if name not in ("target", "spec")}
        for name, (values, label) in choices.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=None if name in ("target", "compiled") else label)

    def specs(self) -> tuple:
        return importlib.import_module(f"mage_fast.kernels.ops.{self.op}.specs").SPECS

    def pairs(self) -> list:
        """Targets with the specs that they run: interpreted kernels only the tiny and the small ones, the
        GPU also those of a whole batch.
        """
        module = importlib.import_module(f"mage_fast.kernels.ops.{self.op}.specs")
        found = []
        for parameter in targets(self.op):
            (target,) = parameter.values
            specs = [*module.SPECS, *(getattr(module, "GPU_SPECS", ()) if target.device == "cuda" else ())]
            if target.interpreted:
                specs = [s for s in specs if s.name.startswith(("tiny", "small"))]
            found += [
                pytest.param(target, s, id=f"{parameter.id}-{s.name}", marks=parameter.marks) for s in specs
            ]
        return found

    def function(self, target: Target) -> Callable:
        """The public function with the implementation forced; a declined call skips with its reason."""
        public = getattr(importlib.import_module(f"mage_fast.kernels.ops.{self.op}.api"), self.op)

        def call(**inputs: Any) -> Any:
            try:
                return public(**inputs, implementation=target.implementation)
            except dispatch.Unsupported as reason:
                pytest.skip(str(reason))

        return call

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """Outputs and gradients against the oracle by the module's rule. Override for other rules."""
        dtype = next(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point())
        actual = differentiate(function, inputs, layout)
        plain = differentiate(self.oracle, cast(inputs, dtype), layout)
        oracle = differentiate(self.oracle, cast(inputs, torch.float64), layout)
        assert_as_good(actual, plain, oracle, self.units * TOLERANCE[dtype], self.floor)

    def test_real_shapes(self, target: Target, spec: Any) -> None:
        self.check(self.function(target), spec.inputs(self.dtype, target.device))

    def test_dtypes(self, target: Target, tiny: Any, dtype: torch.dtype) -> None:
        self.check(self.function(target), tiny.inputs(dtype, target.device))

    def test_non_contiguous(self, target: Target, tiny: Any, layout: Callable) -> None:
        self.check(self.function(target), laid_out(tiny.inputs(self.dtype, target.device), layout), layout)

    def test_expanded_gradient(self, target: Target, tiny: Any) -> None:
        """The gradient of a plain sum has stride 0 everywhere."""

        def ones(x: Tensor) -> Tensor:
            return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)

        self.check(self.function(target), tiny.inputs(self.dtype, target.device), ones)

    def test_every_element_is_written_and_runs_repeat(self, target: Target, tiny: Any) -> None:
        inputs = tiny.inputs(self.dtype, target.device)
        wanted = differentiate(self.function(target), inputs)
        with nan_filled_buffers():
            assert_equal(differentiate(self.function(target), inputs), wanted)

    def test_the_number_of_threads_does_not_change_a_bit(self, compiled: Target, spec: Any) -> None:
        for dtype in {self.dtype, torch.bfloat16 if self.dtype.is_floating_point else self.dtype}:
            inputs = spec.inputs(dtype)
            one, two, three = results_by_threads(partial(differentiate, self.function(compiled), inputs))
            assert_equal(two, one)
            assert_equal(three, one)

    def test_autocast_changes_nothing(self, target: Target, tiny: Any) -> None:
        inputs = tiny.inputs(self.dtype, target.device)
        wanted = differentiate(self.function(target), inputs)
        with torch.autocast(target.device, torch.bfloat16):
            assert_equal(differentiate(self.function(target), inputs), wanted)

    def test_opcheck(self, target: Target, tiny: Any) -> None:
        """Schema, autograd registration, fake and AOT of the op and its backward op, as they are called."""
        inputs = tiny.inputs(self.dtype, target.device)
        with _Recorder() as recorder:
            differentiate(self.function(target), inputs)
        names = {call.name().removeprefix("mage_fast::") for call, _ in recorder.calls}
        assert {name.removesuffix("_backward") for name in names} == {self.op}
        for call, args in recorder.calls:
            if call.name().endswith("_backward"):  # it has no derivative, see the next test
                args = tree_map_only(Tensor, Tensor.detach, args)
            torch.library.opcheck(call, args)

    def test_fake_strides(self, target: Target, tiny: Any, layout: Callable) -> None:
        """What the fake promises of the results' strides holds for strided inputs and gradients too."""
        inputs = laid_out(tiny.inputs(self.dtype, target.device), layout)
        with _Recorder() as recorder:
            differentiate(self.function(target), inputs, layout)
        for call, args in recorder.calls:
            with torch.no_grad():
                meta = tree_map_only(Tensor, lambda x: x.to("meta"), args)
                for real, fake in zip(tensors(call(*args)), tensors(call(*meta)), strict=True):
                    assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
                    strides = zip(real.shape, real.stride(), fake.stride(), strict=True)
                    assert all(got == wanted for size, got, wanted in strides if size > 1)

    def test_second_derivative_is_refused(self, target: Target, tiny: Any) -> None:
        inputs = tiny.inputs(self.dtype, target.device)
        leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        if not leaves:
            pytest.skip(f"{self.op} has no gradient")
        outputs = [y for y in tensors(self.function(target)(**inputs)) if y.requires_grad]
        grads = torch.autograd.grad([y.square().sum() for y in outputs], leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{self.op} has no second derivative"):
            torch.autograd.grad([grad.sum() for grad in grads], leaves)

    def test_gradcheck(self, tiny: Any) -> None:
        inputs = tiny.inputs(torch.float64)
        leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
        if not leaves:
            pytest.skip(f"{self.op} has no gradient")

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            call = self.function(Target("reference", "cpu"))
            outputs = tensors(call(**inputs | dict(zip(leaves, values, strict=True))))
            return tuple(y for y in outputs if y.is_floating_point())

        torch.autograd.gradcheck(function, tuple(leaves.values()))

    def test_compile(self, target: Target, tiny: Any) -> None:
        """One graph, no break, forward and backward."""
        public = getattr(importlib.import_module(f"mage_fast.kernels.ops.{self.op}.api"), self.op)
        torch.compiler.reset()
        compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
        self.function(target)(**tiny.inputs(self.dtype, target.device))  # skips where it declines
        with dispatch.use_implementation(**{self.op: target.implementation}):
            self.check(compiled, tiny.inputs(self.dtype, target.device))

    def test_bad_input(self, bad_input: str) -> None:
        changes, message = self.bad[bad_input]
        inputs = next(s for s in self.specs() if s.name.startswith("tiny")).inputs() | changes
        with pytest.raises(ValueError, match=message):
            self.function(Target("auto", "cpu"))(**inputs)


class ExactOpSuite(OpSuite):
    """For ops that return integers: equal to the oracle on inputs of the same dtype."""

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        wanted = differentiate(self.oracle, inputs)
        assert_as_good(differentiate(function, inputs), wanted, wanted, 0.0)
