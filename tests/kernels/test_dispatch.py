"""The selector, on implementations written into an op's folder by the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mage_fast.kernels import dispatch
from mage_fast.kernels.ops import bias_gelu as folder
from mage_fast.kernels.ops.bias_gelu.api import bias_gelu

OP = "bias_gelu"
FUNCTIONS = """
def bias_gelu(x, bias, *_):
    return x.detach().clone().fill_({value})

def bias_gelu_backward(grad, x, bias, *_):
    return grad.detach().clone().fill_({value}), bias.detach().clone().fill_({value})
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Add an implementation's file to the op's folder."""
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    names = []

    def add(name: str, source: str) -> None:
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)

    dispatch._find.cache_clear()
    yield add
    dispatch._find.cache_clear()
    for name in names:
        sys.modules.pop(f"{folder.__name__}.{name}", None)
        if hasattr(folder, name):
            delattr(folder, name)


def value(implementation: str = "auto") -> float:
    return bias_gelu(torch.zeros(1, 1), torch.zeros(1), implementation=implementation).item()


def test_auto_takes_the_reference_where_nothing_else_is() -> None:
    module = dispatch.select(OP, "auto", "a device nobody knows")
    assert module.__name__ == "mage_fast.kernels.ops.bias_gelu.reference"


def test_auto_takes_the_first_that_runs(
    write: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("absent", "import a_package_that_nobody_has")
    write("elsewhere", "DEVICES = ('cuda',)" + FUNCTIONS.format(value=1))
    write("picky", "def unsupported(name, x, *_):\n    return 'too small' if x.numel() < 2 else None")
    write("works", FUNCTIONS.format(value=4))
    preference = ("unwritten", "absent", "elsewhere", "picky", "works", "reference")
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", preference)
    assert value() == 4
    picked = dispatch.select(OP, "auto", "cpu", OP, (torch.zeros(2), torch.zeros(2)))
    assert picked.__name__.endswith("picky")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_package_that_nobody_has.part", "the package a_package_that_nobody_has is not installed"),
        (
            "from mage_fast.kernels.dispatch import Unsupported\nraise Unsupported('no compiler here')",
            "no compiler here",
        ),
        ("DEVICES = ('cuda', 'xpu')", "it runs on cuda and xpu, the tensors are on cpu"),
        ("def unsupported(name, *args): return f'{name} wants more'", "bias_gelu wants more"),
    ],
)
def test_forced_implementation_raises_with_its_reason(
    write: Callable[[str, str], None], source: str, reason: str
) -> None:
    write("forced", source)
    with pytest.raises(
        dispatch.Unsupported, match=f"bias_gelu: implementation 'forced' cannot run here: {reason}"
    ):
        value(implementation="forced")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no op named 'nope'; the ops are philox, mask_plan"):
        dispatch.select("nope", "auto", "cpu")
    with pytest.raises(
        dispatch.Unsupported, match="bias_gelu: implementation 'nope' cannot run here: there is none"
    ):
        value(implementation="nope")
    with (
        pytest.raises(ValueError, match=r"no op named \['nope'\]"),
        dispatch.use_implementation(nope="reference"),
    ):
        pass


def test_our_own_broken_import_is_not_hidden(write: Callable[[str, str], None]) -> None:
    write("broken", "import mage_fast.kernels.a_module_that_was_renamed")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_was_renamed"):
        value(implementation="broken")


def test_forward_and_backward_run_the_same_implementation(write: Callable[[str, str], None]) -> None:
    """Also when the block that forced it has ended before the backward."""
    write("seven", FUNCTIONS.format(value=7))
    x = torch.zeros(1, 3, requires_grad=True)
    with dispatch.use_implementation(bias_gelu="seven"):
        y = bias_gelu(x, torch.zeros(3))
    assert y.tolist() == [[7, 7, 7]]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[7, 7, 7]]


def test_use_implementation_nests_and_restores(write: Callable[[str, str], None]) -> None:
    for number in (1, 2):
        write(f"number{number}", FUNCTIONS.format(value=number))
    with dispatch.use_implementation(bias_gelu="number1"):
        assert value() == 1
        assert value(implementation="number2") == 2  # the call's own argument wins
        with dispatch.use_implementation(add_norm="reference"):
            assert value() == 1
            with dispatch.use_implementation("number2", philox="auto"):
                assert value() == 2
                assert dispatch.requested("attention", "auto") == "number2"
                assert dispatch.requested("philox", "auto") == "auto"
            assert dispatch.requested("attention", "auto") == "auto"
        assert dispatch.requested("add_norm", "auto") == "auto"
        with pytest.raises(KeyError), dispatch.use_implementation(bias_gelu="number2"):
            raise KeyError
        assert value() == 1
    assert dispatch._forced == {}
    assert value() == 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "a device nobody knows"])
def test_table_names_the_choice_and_the_reasons_against_others(device: str) -> None:
    rows = dispatch.table(device)
    assert [op for op, _, _ in rows] == list(dispatch.OPS)
    for op, chosen, reasons in rows:
        told = dict(reason.split(": ", 1) for reason in reasons.split("; ") if reason)
        assert told.keys() == set(dispatch.implementations(op)) - {chosen, "reference"}
        for name, reason in told.items():
            assert (reason == "by name") == (not isinstance(dispatch._on(op, name, device), str))


def test_table_agrees_with_what_runs() -> None:
    for op, chosen, _ in dispatch.table("cpu"):
        assert dispatch._find(op, chosen) is sys.modules[f"mage_fast.kernels.ops.{op}.{chosen}"]
