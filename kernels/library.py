"""Registration of the ops with ``torch.library``: schema, implementation, fake, autograd.

Every op ends in ``str implementation`` and is registered for all devices at once; the body asks
:mod:`~mage_fast.kernels.dispatch` which implementation runs. So ``torch.compile`` sees one opaque op
whatever runs beneath, and a kernel slots in behind it without a change above.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mage_fast.kernels import dispatch

_library = torch.library.Library("mage_fast", "FRAGMENT")
#: Where the libraries of the C++ kernels are, one for each instruction set.
EXTENSION_FOLDER = Path(__file__).parent
_INSTRUCTION_SETS = {"AVX512": "avx512", "AVX2": "avx2"}


def define(
    signature: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``mage_fast::<name>`` from ``"name(Tensor x, ..., str implementation) -> ..."``.

    The op ``f`` or ``f_backward`` runs the function of that name in the selected implementation module,
    without its last argument and with autocast off (implementations choose their own accumulation dtype).
    ``f_backward`` itself has no derivative: asking for one raises NotImplementedError.

    Returns:
        The op, to be called as a function.
    """
    name = signature.split("(", 1)[0]
    op = name.removesuffix("_backward")

    def run(*args: Any) -> Any:
        inputs, implementation = args[:-1], args[-1]
        device = inputs[0].device  # a tensor in every schema
        function = getattr(dispatch.select(op, implementation, device.type, name, inputs), name)
        autocast = torch.is_autocast_enabled(device.type)
        if device.type != "cuda" and not autocast:
            return function(*inputs)
        # not torch.autocast(enabled=False), which takes ten times as long
        torch.set_autocast_enabled(device.type, False)
        try:
            # Triton launches on the current device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return function(*inputs)
        finally:
            torch.set_autocast_enabled(device.type, autocast)

    _library.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mage_fast::{name}", fake, lib=_library)
    if name != op:
        # without an autograd kernel torch would differentiate through the body and forget the saved tensors
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise NotImplementedError(f"{op} has no second derivative (create_graph was given)")

    overload = getattr(torch.ops.mage_fast, name).default
    if backward is not None:
        _library.impl(name, _autograd(overload, run, setup_context, backward), "Autograd", with_keyset=True)
    return overload


#: Where a call goes below autograd if nothing but the tensors' own device wants it.
_PLAIN = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _autograd(
    overload: torch._ops.OpOverload,
    run: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """The op's autograd kernel: what ``torch.library.register_autograd`` makes, for less time a call.

    Torch's goes through the dispatcher once more and fills in defaults that our schemas do not have, some 100
    microseconds forward and backward. Below a mode or a subclass (tracing, fake tensors) this one does too.
    """

    def below(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if (keyset & torch._C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _PLAIN:
            return run(*args)
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs, keyset = args[:-1], args[-1]
            with torch._C._AutoDispatchBelowAutograd():
                result = below(keyset, *inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            result = backward(ctx, *grads)
            return (*(result if isinstance(result, tuple) else (result,)), None)

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Differentiable.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return below(keyset, *args)

    return autograd


@cache
def load_extension() -> str:
    """Load the compiled CPU ops once: the library for the best instruction set that torch finds here.

    Returns:
        The instruction set: ``"avx512"``, ``"avx2"``, or ``"default"``, what every processor of the kind has.

    Raises:
        Unsupported: the extension was not built, or was built for another torch.
    """
    best = _INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), "default")
    library = EXTENSION_FOLDER / f"libmage_fast_cpu_{best}.so"
    if not library.exists():
        raise dispatch.Unsupported("the C++ extension was not built (no compiler at install time?)")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise dispatch.Unsupported(f"the C++ extension does not load: {error}") from error
    return best
