"""Drives CMake for the C++ CPU kernels; metadata lives in pyproject.toml.

The extension is optional: without torch, CMake or a compiler at build time the package installs without
it, and says so in ``mage-fast env``. ``MAGE_FAST_REQUIRE_EXTENSION=1`` makes that an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
LIBRARY = "libmage_fast_cpu.so"


class CMakeExtension(Extension):
    """An extension that CMakeLists.txt describes."""

    def __init__(self) -> None:
        super().__init__("mage_fast.kernels.mage_fast_cpu", sources=[], optional=not required())


def required() -> bool:
    return os.environ.get("MAGE_FAST_REQUIRE_EXTENSION", "0") == "1"


class BuildExtension(build_ext):
    """Runs CMake and puts the library beside the Python files of the kernels."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        if importlib.util.find_spec("torch") is None:
            raise CompileError("torch is not installed in the build environment (use --no-build-isolation)")
        if shutil.which("cmake") is None:
            raise CompileError("cmake is not installed")
        import torch

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            *("cmake", "-S", str(ROOT.resolve()), "-B", str(build), *generator),
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        try:
            subprocess.run(configure, check=True, stdout=sys.stderr)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True, stdout=sys.stderr)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"cmake failed: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / LIBRARY, target)


kernels = ["mage_fast." + name for name in find_packages(include=["kernels", "kernels.*"])]
setup(
    packages=find_packages(include=["mage_fast", "mage_fast.*"], exclude=["mage_fast.kernels*"]) + kernels,
    # The symlink mage_fast/kernels -> ../kernels serves a checkout; this serves builds and file systems
    # without symlinks.
    package_dir={"mage_fast.kernels": "kernels"},
    package_data={"mage_fast": ["py.typed"]},
    ext_modules=[CMakeExtension()],
    cmdclass={"build_ext": BuildExtension},
)
