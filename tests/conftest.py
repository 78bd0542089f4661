"""What is chosen before torch and triton are imported: one thread for each of several test processes, and
Triton's interpreter without a GPU.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--extension-folder", type=Path, help="take the C++ libraries from there (a build with sanitizers)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--extension-folder"):
        from mage_fast.kernels import library

        library.EXTENSION_FOLDER = folder.resolve(strict=True)
