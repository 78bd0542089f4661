"""Checks of values: always where looking is free, on other devices only where the debug mode asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mage_fast
from mage_fast.kernels import check

#: op -> argument, a value that is wrong there (None: one less than the first), part of the message
WRONG = {
    "ids of embed_kept": ("embed_kept", "ids_BL", 10**6, "ids holds 1000000"),
    "class ids of embed_kept": ("embed_kept", "class_ids_B", -1, "class_ids holds -1"),
    "positions of embed_kept": ("embed_kept", "positions_T", 10**6, "positions holds 1000000"),
    "targets": ("masked_cross_entropy", "targets_N", 10**6, "targets holds 1000000"),
    "source of pad_decoder": ("pad_decoder", "source_BS", 10**6, "source holds 1000000"),
    "sequences of pad_decoder": ("pad_decoder", "cu_seqlens", -1, "cu_seqlens"),
    "ids of sample_confident": ("sample_confident", "ids_BL", 10**6, "ids holds 1000000"),
    "sequences of attention": ("attention", "cu_seqlens", 10**6, "cu_seqlens"),
    "masked counts": ("mask_plan", "num_masked_B", 10**6, "num_masked holds 1000000"),
    "dropped counts": ("mask_plan", "num_dropped_B", 10**6, "num_dropped holds 1000000"),
}


def call(op: str, argument: str, value: int, device: str) -> Callable[[], object]:
    """The op on its first spec with one value of an argument replaced."""
    specs = importlib.import_module(f"mage_fast.kernels.ops.{op}.specs").SPECS
    inputs = specs[0].inputs(device=device)
    inputs[argument] = inputs[argument].clone()
    inputs[argument].view(-1)[0] = value
    return lambda: getattr(mage_fast.ops, op)(**inputs)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at CPU tensors counts as a wait, as it is one on a GPU."""
    monkeypatch.setattr(check, "_FREE", ())


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_raise_on_the_cpu(wrong: str) -> None:
    op, argument, value, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call(op, argument, value, "cpu")()


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_raise_on_waiting_devices_in_the_debug_mode(wrong: str) -> None:
    op, argument, value, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message), mage_fast.device_values():
        call(op, argument, value, "cpu")()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_raise_on_a_gpu_in_the_debug_mode(wrong: str) -> None:
    op, argument, value, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message), mage_fast.device_values():
        call(op, argument, value, "cuda")()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capture_is_not_looked_into() -> None:
    ids = torch.zeros(3, dtype=torch.int64, device="cuda")
    with mage_fast.device_values():
        assert check.readable(ids)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert not check.readable(ids)
            ids.add_(1)


@pytest.mark.usefixtures("waiting")
def test_the_fast_path_does_not_look() -> None:
    check.values("op", "ids", torch.tensor([9]), 0, 3)
    with mage_fast.device_values():
        with mage_fast.device_values():
            pass
        with pytest.raises(ValueError, match="op: ids holds 9, wanted 0 <= ids < 3"):
            check.values("op", "ids", torch.tensor([9]), 0, 3)
    with pytest.raises(KeyError), mage_fast.device_values():
        raise KeyError
    check.values("op", "ids", torch.tensor([9]), 0, 3)


@pytest.mark.parametrize("free", [True, False])
def test_what_is_never_looked_at(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_FREE", ("cpu",) if free else ())
    with mage_fast.device_values():
        assert check.readable(torch.zeros(2))
        assert check.readable(torch.nn.Parameter(torch.zeros(2)))
        assert not check.readable(torch.zeros(2, device="meta"))
        with FakeTensorMode():
            assert not check.readable(torch.zeros(2))

        def function(x: Tensor) -> Tensor:
            return x + int(check.readable(x))

        assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [0, 0]
