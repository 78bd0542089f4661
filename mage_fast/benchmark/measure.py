"""Every implementation of a case: through the gate, then timed side by side with the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mage_fast.benchmark.cases import REFERENCE, TORCH, Case, implementations
from mage_fast.benchmark.gate import Gate, Incorrect
from mage_fast.benchmark.timing import Timing, interleaved
from mage_fast.kernels.dispatch import Unsupported
from mage_fast.kernels.roofline import Device

#: These read no value on the host, so that they can be captured.
_GRAPHED = ("triton", TORCH)
#: By these other packages refuse a dtype or a shape.
_REFUSALS = (Unsupported, RuntimeError, ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class Row:
    """One implementation of one case; without a timing it was declined or is wrong."""

    case: Case
    implementation: str
    timing: Timing | None
    baseline_ms: float | None
    floor_ms: float | None
    #: Why it was not timed.
    reason: str = ""
    correct: bool | None = True

    @property
    def ratio(self) -> float | None:
        if self.timing is None or self.baseline_ms is None:
            return None
        return self.baseline_ms / self.timing.median_ms

    @property
    def percent_of_floor(self) -> float | None:
        if self.timing is None or self.floor_ms is None:
            return None
        return 100 * self.floor_ms / self.timing.median_ms

    def against(self, baseline_ms: float | None) -> Row:
        """The same row, compared with another baseline's time."""
        return replace(self, baseline_ms=baseline_ms)

    def record(self) -> dict[str, Any]:
        """The measurement's own fields of a record."""
        return {
            "suite": "kernels",
            "name": self.case.name,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "shape": self.case.shape,
            "implementation": self.implementation,
            "baseline": self.case.baseline,
            "median_ms": self.timing and self.timing.median_ms,
            "baseline_median_ms": self.baseline_ms,
            "ratio": self.ratio,
            "floor_ms": self.floor_ms,
            "percent_of_floor": self.percent_of_floor,
            "peak_mib": self.timing and self.timing.peak_mib,
            "correct": self.correct,
            "rounds": len(self.timing.samples_ms) if self.timing else 0,
        }


def measure(case: Case, limits: Device | None, seconds: float, *, compiled: bool = True) -> list[Row]:
    """Rows of every implementation, declined ones with their reason."""
    inputs = case.inputs()
    names = implementations(case.op, case.device, compiled=compiled)
    refused, wrong = _through_gate(case, inputs, names)
    runs: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name not in refused and name not in wrong:
            runs[name], _ = case.runner(name, inputs)
    graphed = [name for name in _GRAPHED if name in runs] if case.device == "cuda" else []
    timings = interleaved(runs, case.device, seconds, graphed)
    baseline = timings.get(case.baseline)
    baseline_ms = baseline.median_ms if baseline else None
    floor_ms = 1e3 * limits.floor_seconds(case.work, case.dtype) if limits else None
    rows = []
    for name in names:
        if name in refused:
            rows.append(Row(case, name, None, baseline_ms, floor_ms, refused[name], correct=None))
        elif name in wrong:
            rows.append(Row(case, name, None, baseline_ms, floor_ms, wrong[name], correct=False))
        else:
            rows.append(Row(case, name, timings[name], baseline_ms, floor_ms))
    return rows


def _through_gate(
    case: Case, inputs: dict[str, Any], names: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Reasons of the implementations that decline, and of those that are wrong."""
    gate = Gate(case, inputs)
    refused, wrong = {}, {}
    for name in names:
        refusals = _REFUSALS if case.draws_its_own(name) and name != TORCH else (Unsupported,)
        try:
            gate.check(name)
        except Incorrect as error:
            wrong[name] = str(error)
        except refusals as error:
            refused[name] = str(error) or type(error).__name__
    assert REFERENCE not in refused
    return refused, wrong
