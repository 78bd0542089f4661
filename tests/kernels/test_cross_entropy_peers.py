"""The third-party cross-entropies under our arguments: on stand-ins where the packages are not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.masked_cross_entropy import api
from mage_fast.kernels.ops.masked_cross_entropy.specs import Spec
from tests.kernels.suite import differentiate

FOLDER = api.__name__.removesuffix(".api")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Put modules into ``sys.modules`` by dotted name, parents included."""

    def add(name: str, **contents: Any) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for key, value in contents.items():
            setattr(module, key, value)

    def forget() -> None:
        dispatch._find.cache_clear()
        for peer in ("liger", "apex"):
            sys.modules.pop(f"{FOLDER}.{peer}", None)

    forget()
    yield add
    forget()


def inputs(dtype: torch.dtype = torch.float32) -> dict:
    """Among them a row without a target that holds no number."""
    arguments = Spec("peers", 6, 11, padding=2).inputs(dtype)
    logits = arguments["logits_NC"].detach().clone()
    logits[-1] = torch.nan
    return arguments | {"logits_NC": logits.requires_grad_(), "targets_N": arguments["targets_N"].int()}


def check(implementation: str, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    before = given["logits_NC"].detach().clone()
    wanted = differentiate(lambda **x: api.masked_cross_entropy(**x, implementation="reference"), given)
    got = differentiate(lambda **x: api.masked_cross_entropy(**x, implementation=implementation), given)
    assert torch.equal(given["logits_NC"].detach().nan_to_num(), before.nan_to_num())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def _liger_forward(
    _input: Tensor, target: Tensor, weight: None, ignore_index: int, lse_square_scale: float,
    label_smoothing: float, reduction: str, softcap: None, return_z_loss: bool,
) -> tuple:  # fmt: skip
    """The loss first and the input last, which the gradient overwrites where one is required."""
    assert (weight, lse_square_scale, softcap, return_z_loss) == (None, 0.0, None, False)
    assert target.dtype == torch.int64
    assert reduction == "mean"
    valid = (target != ignore_index)[:, None]
    x = _input.detach().float()
    log_p = x.log_softmax(1)
    weights = torch.full_like(x, label_smoothing / x.shape[1])
    weights.scatter_add_(1, target.clamp(min=0)[:, None], torch.full_like(x[:, :1], 1 - label_smoothing))
    loss = -(weights * log_p).masked_fill(~valid, 0.0).sum() / valid.sum()
    if _input.requires_grad:
        _input.detach().copy_((log_p.exp() - weights).masked_fill(~valid, 0.0) / valid.sum())
    return loss.to(_input.dtype), None, None, None, _input


def _liger_backward(_input: Tensor, grad_output: Tensor) -> Tensor:
    return _input.mul_(grad_output)


class _ApexStandIn:
    """``xentropy_cuda``: losses of rows, and their gradients from the saved log-sum-exp."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, smoothing: float, half_to_float: bool) -> list[Tensor]:
        assert logits.is_contiguous()
        assert labels.dtype == torch.int64
        assert (labels >= 0).all()
        assert half_to_float == (logits.dtype in (torch.float16, torch.bfloat16))
        x = logits.float()
        losses = F.cross_entropy(x, labels, reduction="none", label_smoothing=smoothing)
        return [losses, x.logsumexp(1)]

    @staticmethod
    def backward(grad: Tensor, logits: Tensor, lse: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        assert grad.dtype == lse.dtype == torch.float32
        assert grad.is_contiguous()
        p = (logits.float() - lse[:, None]).exp() - smoothing / logits.shape[1]
        p -= (1 - smoothing) * F.one_hot(labels, logits.shape[1])
        return (p * grad[:, None]).to(logits.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_liger_stand_in(install: Any, dtype: torch.dtype) -> None:
    if isinstance(dispatch._find("masked_cross_entropy", "triton"), str):
        pytest.skip("liger runs where Triton does")
    install(
        "liger_kernel.ops.cross_entropy",
        cross_entropy_forward=_liger_forward,
        cross_entropy_backward=_liger_backward,
    )
    dispatch._find.cache_clear()
    if "cpu" not in dispatch._find("masked_cross_entropy", "liger").DEVICES:
        pytest.skip("Triton is not interpreted")
    check("liger", dtype)
    with pytest.raises(dispatch.Unsupported, match="got 0 rows"):
        api.masked_cross_entropy(torch.ones(0, 3), torch.ones(0).long(), implementation="liger")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_apex_stand_in(install: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    extension = SimpleNamespace(xentropy_cuda=_ApexStandIn)
    install("apex.contrib.xentropy", softmax_xentropy=extension)
    module = dispatch._find("masked_cross_entropy", "apex")
    assert module.DEVICES == ("cuda",)
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    check("apex", dtype)
    far = torch.empty(2**16, 2**15, device="meta")
    assert "32 bits" in module.unsupported("masked_cross_entropy", far)


@pytest.mark.parametrize(("peer", "package"), [("liger", "liger_kernel"), ("apex", "apex")])
def test_absent_packages_are_named(
    install: Any, monkeypatch: pytest.MonkeyPatch, peer: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(dispatch.Unsupported, match=f"implementation '{peer}' cannot run here: the package"):
        api.masked_cross_entropy(**inputs(), implementation=peer)


def test_apex_without_its_extension(install: Any) -> None:
    install("apex.contrib.xentropy")
    with pytest.raises(dispatch.Unsupported, match="apex was built without its xentropy extension"):
        api.masked_cross_entropy(**inputs(), implementation="apex")
