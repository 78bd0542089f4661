"""Checks that want a GPU and that the test suite leaves out: gradients, large tensors, CUDA graphs.

    python -m benchmarks.correctness {gradients,large,graphs} [--op attention] [--device cuda] [--smoke]

One line a check, as soon as it is known; the exit status is 1 if one failed. On a CPU, or with --smoke on
small shapes, the same code runs on whatever implementations there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import large
from mage_fast.benchmark.cases import Case, implementations, module, specs, tensors
from mage_fast.benchmark.gate import Incorrect, compare, error, in_float64
from mage_fast.benchmark.timing import captured
from mage_fast.kernels import dispatch

#: What is checked, whether it holds (None: declined), and figures or a reason.
Line = tuple[str, bool | None, str]

#: Lengths by which code paths differ: the paper's two, one key, whole tiles, ragged ones, over any tile.
LENGTHS = (
    *((129,) * 4, (257,) * 4, (1, 1, 1), (64, 128, 256), (129, 97, 65, 1), (257, 200, 131, 17, 0, 2)),
    *((300, 33), (577,)),
)
#: Head features, with how many of the lengths above each is run, by dtype.
HEADS = {
    torch.bfloat16: {64: 8, 48: 8, 32: 2, 80: 2, 128: 2},
    torch.float16: {64: 2, 48: 2},
    torch.float32: {64: 5, 48: 5},
}
#: Roundings allowed above the reference's own error, as in the gate; half dtypes round each probability too.
ROUNDINGS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8}


def tested(op: str, device: str) -> list[str]:
    """The implementations that follow the op's contract, without the reference where there is another."""
    case = Case(op, None, "fwd", device)
    found = [
        name
        for name in implementations(op, device)
        if not case.draws_its_own(name) and not isinstance(dispatch._on(op, name, device), str)
    ]
    return [name for name in found if name != "reference"] or found


def gradients(ops: Sequence[str], device: str, smoke: bool) -> Iterator[Line]:
    """Attention's output, dQ, dK and dV, each by itself, dropout on and off, against float64."""
    spec_of = module("attention", "specs").Spec
    for dtype, heads in HEADS.items() if "attention" in ops else ():
        if smoke and dtype is not torch.float32:
            continue
        for features, count in ({8: 2} if smoke else heads).items():
            for lengths in (((5, 5), (3, 0, 6)) if smoke else LENGTHS)[:count]:
                for dropout in (0.1, 0.0):
                    spec = spec_of("drawn", lengths, 2 if smoke else 3, features, dropout)
                    for name in tested("attention", device):
                        yield _gradients(name, spec, dtype, device)


def _gradients(name: str, spec: Any, dtype: torch.dtype, device: str) -> Line:
    case = Case("attention", spec, "fwd+bwd", device)
    label = (
        f"attention/{name} {dtype} lengths {spec.lengths} x {spec.heads} x {spec.features} p={spec.dropout}"
    )
    inputs = spec.inputs(dtype, device)
    try:
        results = [
            _by_part(case.runner(implementation, given)[1])
            for implementation, given in (
                (name, inputs), ("reference", inputs), ("reference", in_float64(inputs)),
            )
        ]  # fmt: skip
    except dispatch.Unsupported as reason:
        return label, None, str(reason)
    off = []
    for part, got, plain, exact in zip(("out", "dQ", "dK", "dV"), *results, strict=True):
        try:
            compare(part, [got], [plain], [exact], ROUNDINGS[dtype])
        except Incorrect as reason:
            return label, False, str(reason)
        off.append(f"{part} {error(got, exact):.1e}/{error(plain, exact):.1e}")
    return label, True, "error/reference's: " + ", ".join(off)


def _by_part(results: list[Tensor]) -> list[Tensor]:
    out_THD, grad_T3HD = results
    return [out_THD, *grad_T3HD.unbind(1)]


def large_tensors(ops: Sequence[str], device: str, smoke: bool) -> Iterator[Line]:
    """More than 2**31 elements: the last rows are those of the op on these rows alone."""
    elements = 2**12 if smoke or device == "cpu" else 2**31
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for op in (op for op in large.CHECKS if op in ops):
        for name in tested(op, device):
            label = f"{op}/{name} over {elements} elements"
            try:
                wrong = large.CHECKS[op](elements, name, dtype, device)
            except dispatch.Unsupported as reason:
                yield label, None, str(reason)
            except torch.OutOfMemoryError as reason:
                yield label, None, str(reason).splitlines()[0]
            else:
                yield label, not wrong, wrong
            if device == "cuda":
                torch.cuda.empty_cache()


def graphs(ops: Sequence[str], device: str, smoke: bool) -> Iterator[Line]:
    """A captured op reads the random state at each replay: fresh numbers, those of an uncaptured call."""
    for op in ops:
        spec = specs(op, device, smoke=smoke or device == "cpu")[0]
        case = Case(op, spec, "fwd", device)
        inputs = case.inputs()
        state = inputs.get("rng_state", inputs.get("state"))
        if state is None:
            continue
        for name in tested(op, device):
            if (name, device) == ("reference", "cuda"):  # it may wait for the device
                yield f"graph of {op}", None, "there is only the reference"
                continue
            state[1] = 0
            try:
                repeated, _ = case.runner(name, inputs)
                replay = _replayed(repeated, device)
            except dispatch.Unsupported as reason:
                yield f"graph of {op}/{name}", None, str(reason)
                continue
            except RuntimeError as reason:
                yield f"graph of {op}/{name}", False, str(reason).splitlines()[0]
                continue
            results = []
            for step in (0, 1):
                state[1] = step
                results.append((replay(), [y.clone() for y in tensors(repeated())]))
            same = all(torch.equal(x, y) for pair in results for x, y in zip(*pair, strict=True))
            fresh = any(not torch.equal(x, y) for x, y in zip(results[0][0], results[1][0], strict=True))
            problem = "" if same else "a replay differs from the call"
            problem = problem if fresh else "two replays drew the same numbers"
            yield f"graph of {op}/{name}", same and fresh, problem


def _replayed(run: Callable[[], Any], device: str) -> Callable[[], list[Tensor]]:
    held: list[Tensor] = []

    def keep() -> None:
        held[:] = tensors(run())

    replay = captured(keep).replay if device == "cuda" else keep

    def result() -> list[Tensor]:
        replay()
        return [y.clone() for y in tensors(held)]

    return result


CHECKS: dict[str, Callable[[Sequence[str], str, bool], Iterator[Line]]] = {
    "gradients": gradients,
    "large": large_tensors,
    "graphs": graphs,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", nargs="+", choices=sorted(CHECKS))
    parser.add_argument("--op", nargs="+", default=dispatch.OPS, choices=dispatch.OPS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that everything runs")
    options = parser.parse_args()
    failed = 0
    for check in options.check:
        for label, ok, detail in CHECKS[check](options.op, options.device, options.smoke):
            print({True: "ok      ", False: "FAILED  ", None: "declined"}[ok], label, detail, flush=True)
            failed += ok is False
    print(f"{failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
