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
        *inputs, implementation = args
        device = next(a for a in inputs if isinstance(a, Tensor)).device
        module = dispatch.select(op, implementation, device.type, name, tuple(inputs))
        autocast = torch.is_autocast_enabled(device.type)
        with (
            torch.autocast(device.type, enabled=False) if autocast else nullcontext(),
            # Triton launches on the current device
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            return getattr(module, name)(*inputs)

    _library.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"mage_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if name != op:
        # without an autograd kernel torch would differentiate through the body and forget the saved tensors
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise NotImplementedError(f"{op} has no second derivative (create_graph was given)")

    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.mage_fast, name)


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
