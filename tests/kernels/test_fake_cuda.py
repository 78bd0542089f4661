"""Every op under ``torch.compile(fullgraph=True)`` with CUDA tensors, without a GPU: fake ones."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from mage_fast.kernels import dispatch
from tests.kernels.suite import tensors


@pytest.mark.parametrize("op", dispatch.OPS)
def test_compiles_for_cuda(op: str) -> None:
    """One graph; results on the GPU, in shapes, dtypes and strides as the reference gives on the CPU."""
    function = getattr(importlib.import_module(f"mage_fast.kernels.ops.{op}.api"), op)
    spec = importlib.import_module(f"mage_fast.kernels.ops.{op}.specs").SPECS[0]
    inputs = spec.inputs()
    with torch.no_grad():
        wanted = tensors(function(**inputs, implementation="reference"))
    mode = FakeTensorMode()

    def on_cuda(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    torch.compiler.reset()
    with mode, torch.no_grad():
        fake = tree_map_only(Tensor, on_cuda, inputs)
        got = tensors(torch.compile(function, fullgraph=True, backend="eager")(**fake))
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        assert (x.device.type, x.shape, x.dtype, x.stride()) == ("cuda", y.shape, y.dtype, y.stride())
