"""Optional packages load beside any build of torch, or say how to install them."""

import subprocess
import sys

import pytest

from mage_fast.errors import InputError
from mage_fast.optional import optional


def test_what_imports_torchvision_loads_beside_a_torch_without_its_operators() -> None:
    # in a process of its own: an import lasts
    code = (
        "from mage_fast.optional import optional\n"
        "for name in ('torch_fidelity', 'torchmetrics.image.fid', 'timm.data.auto_augment'):\n"
        "    print(optional(name, extra='evaluate').__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["torch_fidelity", "torchmetrics.image.fid", "timm.data.auto_augment"], (
        ran.stderr
    )


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    with pytest.raises(InputError, match=r"no_such_package does not load: pip install 'mage-fast\[web\]'"):
        optional("no_such_package", extra="web")
