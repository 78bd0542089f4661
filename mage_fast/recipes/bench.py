"""``mage-fast bench``: how fast every implementation of every op is here, and how fast it could be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mage_fast.benchmark import cases, records, session, tables
from mage_fast.benchmark.session import Session
from mage_fast.errors import InputError
from mage_fast.kernels import dispatch
from mage_fast.kernels.roofline import DEVICES
from mage_fast.training.run import pick_device


@dataclass(frozen=True)
class BenchConfig:
    """Time the ops' implementations, or whole training steps, side by side, behind a correctness gate."""

    #: kernels: every op at its real shapes. train: training from given tokens, beside the reference.
    suite: Literal["kernels", "train"] = "kernels"
    #: Only these ops; all of them without.
    op: tuple[str, ...] = ()
    #: Only the shapes of these names, as ``specs.py`` of the ops has them.
    spec: tuple[str, ...] = ()
    device: str = "auto"
    #: What the ops compute in; auto: bfloat16 on CUDA, float32 on a CPU. Training steps are timed in both.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    #: Record file, to which measurements are added; out/bench/<device>.json without. Plots go beside it.
    out: Path | None = None
    #: About how long each implementation is timed; at least four rounds.
    seconds: float = 0.2
    #: On CUDA: also the plain PyTorch chain under torch.compile, which takes a while to compile.
    compile: bool = True
    #: The tiny shapes, to see that everything runs.
    smoke: bool = False
    #: Measure nothing: print what the ops must move and compute, and this device's floors by its data sheet.
    roofline: Literal["a100", "h100", "h200"] | None = None


def run(config: BenchConfig) -> dict[str, Any]:
    """Print the tables, write the records after each case, draw the plots; returns counts and paths.

    Raises:
        InputError: an unknown op or spec, a time that is not positive, a record file that is none.
    """
    unknown = sorted(set(config.op) - set(dispatch.OPS))
    if unknown:
        raise InputError(f"bench: no op named {unknown[0]!r}; the ops are {', '.join(dispatch.OPS)}")
    if not config.seconds > 0:
        raise InputError(f"bench: seconds is {config.seconds}, wanted more than 0")
    ops = config.op or dispatch.OPS
    console = table_console()
    if config.roofline is not None:
        console.print(tables.paper(DEVICES[config.roofline], ops))
        return {}
    device = pick_device(config.device).type
    if device not in cases.DTYPE:
        raise InputError(f"bench: device is {device!r}, wanted one of {', '.join(cases.DTYPE)}")
    known = {case.spec.name for case in cases.cases(ops, device, smoke=config.smoke)}
    if missing := sorted(set(config.spec) - known):
        raise InputError(f"bench: no spec named {missing[0]!r}; there are {', '.join(sorted(known))}")
    out = config.out or Path("out/bench") / f"{records.slug(device)}.json"
    if config.suite == "train":
        result = session.train(device, out, config.seconds, console, smoke=config.smoke)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
        return result
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    kernels = Session(ops, device, out, config.seconds, config.spec, config.compile, config.smoke, dtype)
    result = kernels.run(console)
    pictures = [str(path) for path in kernels.plot()]
    for path in (str(out), *pictures):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return result | {"plots": pictures}


def table_console() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=150)
