"""The vectors, math and Philox of the C++ kernels by themselves, on every instruction set and on arm64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.instruction_sets import available

SOURCE = Path(__file__).parents[1] / "csrc" / "headers.cpp"
KERNELS = SOURCE.parents[2] / "kernels" / "csrc"
OPTIONS = ["-std=gnu++20", "-O3", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-fno-trapping-math"]
#: As CMakeLists.txt compiles the libraries.
FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
ARM = "aarch64-linux-gnu-g++"


def compile_and_run(compiler: str, flags: list[str], program: Path, *before: str) -> str:
    subprocess.run([compiler, *OPTIONS, *flags, str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([*before, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("compiler", ["c++", "clang++"])
def test_on_this_processor(compiler: str, name: str, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"no compiler named {compiler}")
    printed = compile_and_run(compiler, FLAGS[name], tmp_path / "headers")
    assert "0 wrong" in printed


def test_on_arm64(tmp_path: Path) -> None:
    """With 16-byte vectors, in an emulator."""
    if not shutil.which(ARM) or not shutil.which("qemu-aarch64"):
        pytest.skip(f"wants {ARM} and qemu-aarch64")
    emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
    assert "4 lanes, 0 wrong" in compile_and_run(ARM, [], tmp_path / "headers", *emulator)


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cpp")), ids=lambda path: path.stem)
def test_kernels_compile_for_arm64(source: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not shutil.which(ARM):
        pytest.skip(f"wants {ARM}")
    include = Path(torch.__path__[0]) / "include"
    version = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    command = [ARM, *OPTIONS, version, "-isystem", str(include), "-c", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], check=True)
