"""``mage-fast bench``: how fast the ops and whole steps are here, and how fast they could be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mage_fast.benchmark import cases, paper, records, session, suites, tables
from mage_fast.benchmark.end_to_end import models
from mage_fast.benchmark.session import Session
from mage_fast.errors import InputError
from mage_fast.kernels import dispatch
from mage_fast.kernels.roofline import DEVICES
from mage_fast.recipes import bench_report
from mage_fast.training.run import pick_device


@dataclass(frozen=True)
class BenchConfig:
    """Time the ops' implementations, or whole steps beside the reference, behind a correctness gate."""

    #: kernels: every op at its real shapes. Whole steps beside the reference: train: training steps from
    #: given tokens, from images, from a token cache. generate: 20 decoding steps and the images. tokenize:
    #: the tokenizer's two directions.
    suite: Literal["kernels", "train", "generate", "tokenize"] = "kernels"
    #: Only these ops; all of them without.
    op: tuple[str, ...] = ()
    #: Only the shapes of these names, as ``specs.py`` of the ops has them; of whole steps, those of these
    #: names or beginnings of names, as vit_b/cached.
    spec: tuple[str, ...] = ()
    #: Of whole steps: these models; without, vit_b on a CPU, both on CUDA.
    model: tuple[Literal["vit_b", "vit_l"], ...] = ()
    #: Of whole steps: images at a time, instead of what suits the device.
    batch: int | None = None
    device: str = "auto"
    #: What the ops compute in; auto: bfloat16 on CUDA, float32 on a CPU. Whole steps are timed in both.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    #: Record file, to which measurements are added; out/bench/<device>.json without. Plots and the report,
    #: a page for a browser, go beside it.
    out: Path | None = None
    #: About how long each implementation is timed; at least four rounds, two of whole generations on a CPU.
    seconds: float = 0.2
    #: Also plain PyTorch and whole steps under torch.compile, which takes minutes; the ops on CUDA only.
    compile: bool = field(default_factory=torch.cuda.is_available)
    #: Of whole steps: also a trace of ours in bfloat16 at the first item, and its longest operators.
    profile: bool = False
    #: The tiny shapes, to see that everything runs.
    smoke: bool = False
    #: Measure nothing: print what must move and be computed, and this device's floors by its data sheet; of
    #: whole steps also which goals they allow, and with --out records of them.
    roofline: Literal["a100", "h100", "h200"] | None = None


def run(config: BenchConfig) -> dict[str, Any]:
    """Print the tables, write the records after each case, draw the plots, write the report; returns counts
    and paths.

    Raises:
        InputError: an unknown op, spec or item, a time or a batch that is not positive, a record file that
            is none, options of another suite.
    """
    _check(config)
    console = table_console()
    if config.roofline is not None:
        _paper(config, console)
        return {}
    device = pick_device(config.device).type
    if device not in cases.DTYPE:
        raise InputError(f"bench: device is {device!r}, wanted one of {', '.join(cases.DTYPE)}")
    out = config.out or Path("out/bench") / f"{records.slug(device)}.json"
    result = (_kernels if config.suite == "kernels" else _steps)(config, device, out, console)
    written = [str(out), *result.get("traces", []), *map(str, session.plot(out, device))]
    written.append(str(bench_report.write(records.read(out), out.with_suffix(".html"))))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return result | {"written": written}


def _check(config: BenchConfig) -> None:
    """Refuse what does not fit before anything is measured."""
    unknown = sorted(set(config.op) - set(dispatch.OPS))
    if unknown:
        raise InputError(f"bench: no op named {unknown[0]!r}; the ops are {', '.join(dispatch.OPS)}")
    if not config.seconds > 0:
        raise InputError(f"bench: seconds is {config.seconds}, wanted more than 0")
    if config.batch is not None and config.batch < 1:
        raise InputError(f"bench: batch is {config.batch}, wanted 1 or more")
    of_steps = {"--model": config.model, "--batch": config.batch, "--profile": config.profile}
    of_kernels = {"--op": config.op, "--dtype": config.dtype != "auto"}
    kernels = config.suite == "kernels"
    for option, given in (of_steps if kernels else of_kernels).items():
        if given:
            wanted = "train, generate or tokenize" if kernels else "kernels"
            raise InputError(f"bench: {option} is given with --suite {config.suite}, wanted --suite {wanted}")


def _kernels(config: BenchConfig, device: str, out: Path, console: Console) -> dict[str, Any]:
    ops = config.op or dispatch.OPS
    known = {case.spec.name for case in cases.cases(ops, device, smoke=config.smoke)}
    if missing := sorted(set(config.spec) - known):
        raise InputError(f"bench: no spec named {missing[0]!r}; there are {', '.join(sorted(known))}")
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    kernels = Session(ops, device, out, config.seconds, config.spec, config.compile, config.smoke, dtype)
    return kernels.run(console)


def _steps(config: BenchConfig, device: str, out: Path, console: Console) -> dict[str, Any]:
    twins = models(config.model, device, smoke=config.smoke)
    items = suites.items(config.suite, twins, config.batch)
    for name in config.spec:
        if not any(_begins(item.name, name) for item in items):
            names = ", ".join(item.name for item in items)
            raise InputError(f"bench: nothing named {name!r} in suite {config.suite}; there are {names}")
    chosen = [item for item in items if not config.spec or any(_begins(item.name, n) for n in config.spec)]
    options = {"smoke": config.smoke, "compiled": config.compile, "profiled": config.profile}
    return session.end_to_end(config.suite, chosen, out, config.seconds, console, **options)


def _begins(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(f"{beginning}/")


def _paper(config: BenchConfig, console: Console) -> None:
    assert config.roofline is not None
    device = DEVICES[config.roofline]
    if config.suite == "kernels":
        console.print(tables.paper(device, config.op or dispatch.OPS))
        return
    found = paper.floors(config.suite, device, config.model, config.batch)
    console.print(paper.table(found, device))
    for floor in found:
        for verdict in floor.verdicts(device):
            console.print(verdict, markup=False, highlight=False, soft_wrap=True)
    console.print(paper.LEGEND, markup=False, highlight=False)
    if config.out is not None:
        records.update(config.out, records.complete(paper.records(found, device), "cpu"))
        console.print(f"wrote {config.out}", highlight=False, soft_wrap=True)


def table_console() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=150)
