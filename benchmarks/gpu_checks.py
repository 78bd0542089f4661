"""Everything that wants a GPU, in one command of at most ten minutes.

    python -m benchmarks.gpu_checks --out DIR [--minutes 9.5] [--only tests gradients ...] [--smoke]

The steps, each a process of its own with a time limit, so that one that crashes or hangs costs only itself:

    environment  versions, device, which implementation of each op runs        DIR/environment.txt
    tests        pytest -m gpu over tests/kernels                              DIR/correctness.txt
    gradients    attention's dQ, dK, dV at every path against float64          DIR/correctness.txt
    graphs       replays of a captured op draw fresh numbers                   DIR/correctness.txt
    large        every op on more than 2**31 elements                          DIR/correctness.txt
    train        training steps of ViT-B from a token cache, batch 128 and     DIR/table.txt, results.json
                 256, then online, then ViT-L, beside the reference's
    generate     ViT-B, 64 images at a time, then one                          DIR/table.txt, results.json
    tokenize     the tokenizer's two directions                                DIR/table.txt, results.json
    bench        every op at its real shapes beside its peers                  DIR/table.txt, results.json
    compile      a training step and the first shape of each op, also with     DIR/table.txt, results.json
                 torch.compile

then the plots and the page of results.json. All in one takes more than ten minutes: with --only give the
first five steps, the whole steps (train, generate, tokenize) and the ops (bench, compile) a command each. All
output goes to its file as it comes, and results.json is written after each case, so what was done before a
kill is kept. With --smoke the same runs on tiny shapes, on a CPU too. The exit status is 1 if a step failed
or ran out of time. Needs torch, triton, rich, tyro, numpy, jaxtyping, matplotlib, scikit-learn, safetensors,
pytest, pytest-benchmark and hypothesis, and of the peers whatever is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import large
from mage_fast.benchmark import cases, records
from mage_fast.benchmark.session import Session
from mage_fast.kernels import dispatch
from mage_fast.recipes import bench_report, env

ROOT = Path(__file__).parent.parent
STEPS = (
    *("environment", "tests", "gradients", "graphs", "large", "train", "generate", "tokenize"),
    *("bench", "compile"),
)
#: At most this share of the whole time for all processes of a step.
SHARE = dict(
    **dict(environment=0.1, tests=0.3, gradients=0.15, graphs=0.1, large=0.2),
    **dict(train=0.5, generate=0.4, tokenize=0.2, bench=0.45, compile=1.0),
)
#: Options of ``mage-fast bench`` for whole steps, the most wanted figures first.
WHOLE = {
    "train": (
        *(("--spec", "vit_b/cached"), ("--spec", "vit_b/cached", "--batch", "256")),
        *(("--spec", "vit_b/online"), ("--spec", "vit_l/cached")),
    ),
    "generate": (
        *(("--model", "vit_b", "--spec", "vit_b/20-steps/batch64"),),
        *(("--model", "vit_b", "--spec", "vit_b/20-steps/batch1"),),
    ),
    "tokenize": (("--model", "vit_b"),),
}
#: How long an implementation of a whole step is timed.
WHOLE_SECONDS = 1.0
#: Kept for the plots at the end, and for a process that ran out of time to print what it has.
RESERVE_SECONDS, LAST_SECONDS = 15, 5
#: How long an implementation is timed.
SECONDS = 0.1


@dataclass(frozen=True)
class Process:
    """One process of a step."""

    step: str
    command: list[str]
    file: str

    @property
    def label(self) -> str:
        ops = self.command[self.command.index("--op") + 1 :] if "--op" in self.command else []
        name = ops[0] if len(ops) == 1 else ""
        if "--suite" in self.command:
            name = " ".join(self.command[self.command.index("--suite") + 2 :])
        return f"{self.step} {name}"


def processes(steps: list[str], device: str, out: Path, smoke: bool) -> Iterator[Process]:
    """In the order in which they run."""
    python, small = [sys.executable, "-u", "-m"], ["--smoke"] if smoke else []
    here = [*python, "benchmarks.gpu_checks", "--device", device, *small, "--out", str(out)]
    check = [*python, "benchmarks.correctness", "--device", device, *small]
    for step in (step for step in STEPS if step in steps):
        if step == "environment":
            yield Process(step, [*here, "--child", step], "environment.txt")
        elif step == "tests":
            tests = "tests/kernels/test_philox.py" if smoke else "tests/kernels"
            pytest = [*python, "pytest", "-q", "-rfE", "-m", "gpu", tests]
            if importlib.util.find_spec("xdist") and not smoke:  # few: their oracles share the GPU's memory
                pytest += ["-n", "3", "--dist", "loadfile"]
            yield Process(step, pytest, "correctness.txt")
        elif step in ("gradients", "graphs"):
            yield Process(step, [*check, step], "correctness.txt")
        elif step == "large":
            for ops in [[*large.CHECKS]] if smoke else [[op] for op in large.CHECKS]:
                yield Process(step, [*check, step, "--op", *ops], "correctness.txt")
        elif step in WHOLE:
            for options in [()] if smoke else WHOLE[step]:
                yield Process(
                    step, [*_bench(device, out, small, "--no-compile"), step, *options], "table.txt"
                )
        elif step == "bench" or device == "cuda":
            if step == "compile":
                whole = [*_bench(device, out, small, "--compile"), "train", *WHOLE["train"][0]]
                yield Process(step, whole, "table.txt")
            for ops in [[*dispatch.OPS]] if smoke else [[op] for op in dispatch.OPS]:
                yield Process(step, [*here, "--child", step, "--op", *ops], "table.txt")


def _bench(device: str, out: Path, small: list[str], compiled: str) -> list[str]:
    seconds = str(0.005 if small else WHOLE_SECONDS)
    where = ["--device", device, "--out", str(out / "results.json")]
    command = [sys.executable, "-u", "-m", "mage_fast.cli", "bench", *where, *small, compiled]
    return [*command, "--seconds", seconds, "--suite"]


def child(step: str, ops: list[str], device: str, out: Path, smoke: bool) -> int:
    """What this module does in a process of its own."""
    console = Console(width=150)
    if step == "environment":
        env.run(env.EnvConfig())
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            console.print(f"GPU: {properties}, CUDA {torch.version.cuda}")
        return 0
    first = [spec.name for op in ops for spec in cases.specs(op, device, smoke=smoke)[:1]]
    session = Session(
        *(ops, device, out / "results.json", 0.005 if smoke else SECONDS),
        specs=first if step == "compile" else [],
        compiled=step == "compile",
        smoke=smoke,
    )
    return 1 if session.run(console)["incorrect"] else 0


def run(process: Process, out: Path, seconds: float) -> str:
    """How the process ended; its output goes to its file."""
    with (out / process.file).open("a", encoding="utf-8") as file:
        file.write(f"\n== {process.step}: {' '.join(process.command[3:])}\n")
        file.flush()
        running = subprocess.Popen(process.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = running.wait(seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)  # it prints what it has
            try:
                running.wait(LAST_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
            return f"out of time, stopped after {seconds:.0f} s"
        return "done" if status == 0 else f"failed, exit {status}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that everything runs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--op", nargs="+", default=list(dispatch.OPS), help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.child:
        return child(options.child, options.op, options.device, out, options.smoke)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes - RESERVE_SECONDS
    spent = dict.fromkeys(STEPS, 0.0)
    failed = False
    waiting = list(processes(options.only, options.device, out, options.smoke))
    while waiting:
        process = waiting.pop(0)
        share = 60 * options.minutes * SHARE[process.step] - spent[process.step]
        # at most twice its part, so that a slow op leaves time for those after it
        share *= min(1, 2 / (1 + sum(other.step == process.step for other in waiting)))
        seconds = min(end - time.monotonic(), share)
        start = time.monotonic()
        ended = run(process, out, seconds) if seconds > 1 else "no time left"
        spent[process.step] += time.monotonic() - start
        failed |= ended != "done"
        print(f"{process.label:48} {time.monotonic() - start:6.1f} s  {ended}", flush=True)
    session = Session(dispatch.OPS, options.device, out / "results.json", SECONDS)
    for path in session.plot():
        print(f"wrote {path}")
    print(f"wrote {bench_report.write(records.read(out / 'results.json'), out / 'results.html')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
