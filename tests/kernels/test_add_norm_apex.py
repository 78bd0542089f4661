"""``add_norm`` by apex, whose functions are played by torch's: that they get the arguments they take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops import add_norm as folder
from mage_fast.kernels.ops.add_norm.api import add_norm
from mage_fast.kernels.ops.add_norm.specs import Spec
from tests.kernels.suite import Target
from tests.kernels.test_add_norm import TestAddNorm as Suite

NAME = f"{folder.__name__}.apex"


def fused_layer_norm_affine_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, normalized_shape: list[int], eps: float, memory_efficient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert x.is_contiguous()
    assert x.dtype == weight.dtype == bias.dtype
    assert not memory_efficient
    wide = (x.double(), normalized_shape, weight.double(), bias.double())
    y, mean, rstd = torch.native_layer_norm(*wide, eps)
    statistic = torch.promote_types(x.dtype, torch.float32)
    return y.to(x.dtype), mean.flatten().to(statistic), rstd.flatten().to(statistic)


def fused_layer_norm_affine_bwd(
    grad: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, normalized_shape: list[int], weight: Tensor,
    bias: Tensor, eps: float, memory_efficient: bool,
) -> list[Tensor]:  # fmt: skip
    assert grad.is_contiguous()
    assert grad.dtype == x.dtype == weight.dtype
    assert mean.shape == rstd.shape == x.shape[:1]
    assert not memory_efficient
    wide = [v.double() for v in (grad, x)]
    grads = torch.ops.aten.native_layer_norm_backward(
        *wide, normalized_shape, mean.double()[:, None], rstd.double()[:, None], weight.double(),
        bias.double(), [True] * 3,
    )  # fmt: skip
    return [g.to(x.dtype) for g in grads]


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of that name with the module that the implementation imports from."""
    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
    package, normalization, module, extension = map(ModuleType, names)
    normalization.fused_layer_norm = module  # type: ignore[attr-defined]
    module.fused_layer_norm_affine_fwd = fused_layer_norm_affine_fwd  # type: ignore[attr-defined]
    module.fused_layer_norm_affine_bwd = fused_layer_norm_affine_bwd  # type: ignore[attr-defined]
    for name, stub in zip(names, (package, normalization, module, extension), strict=True):
        monkeypatch.setitem(sys.modules, name, stub)
    forget()
    yield module
    forget()


def forget() -> None:
    dispatch._find.cache_clear()
    sys.modules.pop(NAME, None)
    vars(folder).pop("apex", None)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_the_suite_rule(
    apex: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dropout: float
) -> None:
    monkeypatch.setattr(dispatch._find("add_norm", "apex"), "DEVICES", ("cpu",))
    Suite().check(Suite().function(Target("apex", "cpu")), Spec("some", 5, 24, dropout).inputs(dtype))


def test_narrow_branch(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under autocast: all but the branch is float32."""
    monkeypatch.setattr(dispatch._find("add_norm", "apex"), "DEVICES", ("cpu",))
    inputs = Spec("mixed", 5, 24, autocast=True).inputs(torch.bfloat16)
    out, normed = add_norm(**inputs, implementation="apex")
    wanted = add_norm(**inputs, implementation="reference")
    torch.testing.assert_close((out, normed), wanted)
    assert (out.dtype, normed.dtype) == (torch.float32, torch.bfloat16)


def test_reasons(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Spec("plain", 2, 8).inputs()
    with pytest.raises(dispatch.Unsupported, match="it runs on cuda, the tensors are on cpu"):
        add_norm(**inputs, implementation="apex")
    monkeypatch.setattr(dispatch._find("add_norm", "apex"), "DEVICES", ("cpu",))
    narrow = inputs | {name: inputs[name].half() for name in ("branch_TD", "residual_TD")}
    with pytest.raises(dispatch.Unsupported, match=r"weight in the residual's dtype, got torch\.float32"):
        add_norm(**narrow, implementation="apex")
    del apex.fused_layer_norm_affine_fwd
    forget()
    with pytest.raises(dispatch.Unsupported, match="this apex is too old"):
        add_norm(**inputs, implementation="apex")


def test_another_package_of_that_name(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyPI's, which has no such module."""
    monkeypatch.delitem(sys.modules, "apex.normalization")
    monkeypatch.delitem(sys.modules, "apex.normalization.fused_layer_norm")
    monkeypatch.setattr(sys.modules["apex"], "__path__", [], raising=False)
    with pytest.raises(dispatch.Unsupported, match=r"the package apex\.normalization is not installed"):
        add_norm(**Spec("plain", 2, 8).inputs(), implementation="apex")
