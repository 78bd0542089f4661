"""The C++ kernels as processors without this one's best instructions run them, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mage_fast.kernels import dispatch, library
from tests.instruction_sets import available

ROOT = Path(__file__).parents[2]


def test_the_best_one_is_loaded() -> None:
    try:
        assert library.load_extension() == available()[0]
    except dispatch.Unsupported as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("name", available()[1:])
def test_the_ops_on_others(name: str) -> None:
    """All tests of the C++ kernels but those that do not run them themselves."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    chosen = "cpp and not compile and not opcheck and not fake and not instruction"
    done = subprocess.run(
        [*command, "-k", chosen],
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40


@pytest.mark.parametrize("name", available())
def test_each_can_be_chosen(name: str) -> None:
    code = "from mage_fast.kernels import library; print(library.load_extension())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": name}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == f"{name}\n"
