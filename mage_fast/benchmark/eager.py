"""What eager PyTorch moves and computes, kernel by kernel, counted on tensors without storage.

Every call that reaches ATen and makes something new counts as a kernel that reads its tensors once and writes
its results once; views are free. That is a lower bound of what the reference path, run as it stands, takes on
a device: caches that forget, and the host that launches, come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mage_fast import counts, reference
from mage_fast.config import MAGEConfig
from mage_fast.kernels.roofline import Device, Work
from mage_fast.reference.layers import Block, MlmLayer

_HALF = torch.bfloat16  # as wide as the release's float16
#: What torch's AdamW moves of a parameter in float32, a kernel for each line of its equation (80), after
#: unscaling (8), the norm (4) and clipping (8) of its gradient.
_OPTIMIZER_BYTES = 100


@dataclass(frozen=True)
class Kernel:
    """One call."""

    name: str
    work: Work
    dtype: torch.dtype


@dataclass
class Kernels(TorchDispatchMode):
    """Notes what is called inside."""

    found: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        changed = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        sources = {x.untyped_storage()._cdata for x in read}
        # a view aliases what it is given and changes nothing
        is_view = all(x.untyped_storage()._cdata in sources for x in written) and not changed
        if is_view or not (written or changed):
            return out
        results = written or [args[0]] if changed else written
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        wide = read[0].dtype if read else results[0].dtype if results else torch.float32
        work = Work(_bytes(read), _bytes(results), int(flops), matrix=bool(count))
        self.found.append(Kernel(str(func.overloadpacket), work, wide))
        return out


def _bytes(tensors: list[Any]) -> int:
    leaves = [x for x in tree_leaves(tensors) if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in leaves)


@dataclass(frozen=True)
class Cost:
    """A lower bound of a run of kernels on a device."""

    seconds: float = 0.0
    kernels: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.kernels + other.kernels)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.seconds * times, self.kernels * times)


#: What is counted: makes its layers and tensors, and returns what runs.
Prepare = Callable[[], Callable[[], Any]]


def cost(device: Device, prepare: Prepare, *, half: bool, free: tuple[str, ...] = ()) -> Cost:
    """Of what ``prepare()`` returns. ``half``: under autocast. ``free``: names of calls that are left out."""
    with FakeTensorMode():
        run = prepare()
        with torch.autocast("cpu", _HALF, enabled=half), Kernels() as kernels:
            run()
    found = [kernel for kernel in kernels.found if kernel.name not in free]
    return Cost(sum(_seconds(device, kernel) for kernel in found), len(found))


def _seconds(device: Device, kernel: Kernel) -> float:
    if kernel.work.matrix and kernel.dtype is torch.float32:
        # torch lets cuDNN's convolutions use tf32, and products not
        unit = "tf32" if kernel.name == "aten.convolution" and "tf32" in device.peak_flops else "float32"
        return max(kernel.work.flops / device.peak_flops[unit], device.memory_seconds(kernel.work))
    return device.floor_seconds(kernel.work, kernel.dtype)


def training(device: Device, config: MAGEConfig, batch: int, *, online: bool) -> Cost:
    """The release's training step under autocast to a half dtype; ``online``: it tokenizes in float32."""
    positions = config.num_tokens + 1
    kept = positions - round(config.num_tokens * config.drop_ratio)
    total = _blocks(device, config, batch, kept, learns=True) + _head(device, config, batch, learns=True)
    moved = Work(0, _OPTIMIZER_BYTES * counts.parameters(config), 0)
    total += Cost(device.memory_seconds(moved), 0)
    return total + (tokenizer(device, config, batch, "encode") if online else Cost())


def generation(device: Device, config: MAGEConfig, batch: int, steps: int) -> Cost:
    """The release's decoding of images: float32, all positions in every step, then the pictures."""
    one = _blocks(device, config, batch, config.num_tokens + 1, learns=False)
    one += _head(device, config, batch, learns=False)
    return one * steps + tokenizer(device, config, batch, "decode")


def tokenizer(device: Device, config: MAGEConfig, batch: int, direction: str, *, ours: bool = False) -> Cost:
    """The release's tokenizer in float32; ``ours``: in bfloat16, normalisation and SiLU in one kernel."""
    sizes = config.tokenizer
    assert sizes is not None
    before, dtype = torch.get_default_dtype(), torch.bfloat16 if ours else torch.float32

    def prepare() -> Callable[[], Any]:
        torch.set_default_dtype(dtype)  # fake weights cannot be converted
        try:
            vqgan = reference.VQGAN.from_config(sizes).requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        if direction == "encode":
            return partial(
                vqgan.encode, torch.empty(batch, 3, sizes.image_size, sizes.image_size, dtype=dtype)
            )
        return partial(vqgan.decode_ids, torch.empty(batch, sizes.grid_size**2, dtype=torch.int64))

    return cost(device, prepare, half=False, free=("aten.silu",) if ours else ())


def _blocks(device: Device, config: MAGEConfig, batch: int, kept: int, *, learns: bool) -> Cost:
    total = Cost()
    for part, rows in (("encoder", kept), ("decoder", config.num_tokens + 1)):
        width, heads, depth = (getattr(config, f"{part}_{name}") for name in ("width", "heads", "depth"))

        def prepare(width: int = width, heads: int = heads, rows: int = rows) -> Callable[[], Any]:
            block = Block(width, heads, config.mlp_ratio, config.dropout).train(learns).requires_grad_(learns)
            x_BSD = torch.empty(batch, rows, width, requires_grad=learns)
            grad_BSD = torch.empty(batch, rows, width)
            return lambda: block(x_BSD).backward(grad_BSD) if learns else block(x_BSD)

        total += cost(device, prepare, half=learns) * depth
    return total


def _head(device: Device, config: MAGEConfig, batch: int, *, learns: bool) -> Cost:
    """From the decoder's features to the loss, or to probabilities."""

    def prepare() -> Callable[[], Any]:
        layer = MlmLayer(config.decoder_width, config.encoder_width, config.vocabulary_size)
        layer.requires_grad_(learns)
        x_BSD = torch.empty(batch, config.num_tokens + 1, config.decoder_width, requires_grad=learns)
        ids_BL1 = torch.empty(batch, config.num_tokens, 1, dtype=torch.int64)
        words_VD = torch.empty(config.vocabulary_size, config.encoder_width)

        def run() -> None:
            log_p_BLC = layer(x_BSD, words_VD)[:, 1:, : config.codebook_size].log_softmax(dim=-1)
            chosen_BL1 = log_p_BLC.gather(-1, ids_BL1)
            if learns:
                (chosen_BL1[..., 0] - log_p_BLC.mean(dim=-1)).sum().backward()

        return run

    return cost(device, prepare, half=learns)
