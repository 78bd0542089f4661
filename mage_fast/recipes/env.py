"""``mage-fast env``: what is installed here, and which implementation of each op runs and why."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

import mage_fast
from mage_fast.kernels import dispatch, library

PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "scikit-learn", "pillow", "tensorboard", "datasets"),
    *("lpips", "flash-attn", "xformers", "apex", "liger-kernel"),
)


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, devices, and the table of chosen implementations."""


def run(config: EnvConfig) -> dict[str, str]:
    """Print the tables to standard output; returns the versions."""
    console = Console()
    versions = {"mage-fast": mage_fast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["C++ extension"] = _extension()
    devices = ["cpu"]
    versions["CPU threads"] = f"{torch.get_num_threads()} ({torch.backends.cpu.get_cpu_capability()})"
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
        versions["GPU"] = torch.cuda.get_device_name()
    console.print(_table("Installed", ("what", "version"), list(versions.items())))
    for device in devices:
        rows = dispatch.table(device)
        console.print(_table(f"Implementations on {device}", ("op", "runs", "others"), rows))
    return versions


def _extension() -> str:
    try:
        return f"loaded, compiled for {library.load_extension()}"
    except dispatch.Unsupported as error:
        return f"missing: {error}; the CPU runs plain PyTorch"


def _table(title: str, columns: tuple[str, ...], rows: list) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table
