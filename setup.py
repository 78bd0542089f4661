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
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
#: One library for each instruction set (CMakeLists.txt); this one is there on every kind of processor.
LIBRARY, LIBRARIES = "libmage_fast_cpu_default.so", "libmage_fast_cpu_*.so"
REQUIRED = os.environ.get("MAGE_FAST_REQUIRE_EXTENSION", "0") == "1"


class CMakeExtension(Extension):
    """The extension that CMakeLists.txt describes."""

    def __init__(self) -> None:
        super().__init__("mage_fast.kernels.mage_fast_cpu", sources=[], optional=not REQUIRED)


class BuildExtension(build_ext):
    """Runs CMake and puts the libraries beside the Python files of the kernels."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: setuptools knows of one library only."""
        built = Path(self.build_lib) / self.get_ext_filename(self.extensions[0].name)
        for library in built.parent.glob(LIBRARIES):
            shutil.copy(library, ROOT / "kernels")

    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise CompileError("torch is not installed in the build environment (use --no-build-isolation)")
        if shutil.which("cmake") is None:
            raise CompileError("cmake is not installed")

        build = Path(self.build_temp).resolve() / "cmake"
        folder = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = [f"-DTORCH_ROOT={torch.submodule_search_locations[0]}", "-DCMAKE_BUILD_TYPE=Release"]
        release = ["--config", "Release"]
        for arguments in (
            ["-S", str(ROOT), "-B", str(build), *generator, *options],
            ["--build", str(build), *release, "--parallel"],
            ["--install", str(build), *release, "--prefix", str(folder), "--strip"],
        ):
            try:
                subprocess.run(["cmake", *arguments], check=True, stdout=sys.stderr)
            except subprocess.CalledProcessError as error:
                raise CompileError(f"cmake failed: {error}") from error


class Wheel(bdist_wheel):
    """The library has no Python.h, so a wheel depends on the platform only, and on nothing without it."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build_ext")
        built = Path(build.get_ext_fullpath(build.extensions[0].name)).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"


kernels = ["mage_fast." + name for name in find_packages(include=["kernels", "kernels.*"])]
setup(
    packages=find_packages(include=["mage_fast", "mage_fast.*"], exclude=["mage_fast.kernels*"]) + kernels,
    # The symlink mage_fast/kernels -> ../kernels serves a checkout; this serves builds and file systems
    # without symlinks.
    package_dir={"mage_fast.kernels": "kernels"},
    package_data={"mage_fast": ["py.typed"]},
    include_package_data=False,
    ext_modules=[CMakeExtension()],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
