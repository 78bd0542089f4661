"""The correctness gate before every timing: against the op's reference, in float64 where that makes sense.

The error against the reference in float64 is at most that of the reference in the tested dtype plus some
roundings of the largest value. An implementation that draws random numbers of its own is checked without
dropout and, where chance remains, on what ``invariant(inputs, outputs)`` of the op's ``specs.py`` takes from
its results. ``comparable(inputs, outputs)`` there does the same for every implementation, where rounding may
choose between results that are equally right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.benchmark.cases import REFERENCE, Case, module, tensors

#: Allowed above the error of the reference, in units of the dtype's rounding of the largest value.
ROUNDINGS = 8
#: Likewise for plain PyTorch chains and other packages, which round to the dtype between their calls.
PEER_ROUNDINGS = 16


class Incorrect(AssertionError):
    """An implementation's results are wrong; the message says which, and by how much."""


class Gate:
    """What the reference gives for one case; it lives as long as implementations of the case are checked."""

    def __init__(self, case: Case, inputs: dict[str, Any]) -> None:
        self._case = case
        self._inputs = {False: inputs, True: inputs}
        if inputs.get("dropout"):
            self._inputs[True] = inputs | {"dropout": 0.0}
        self._expected: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}

    def check(self, implementation: str) -> None:
        """Run the implementation once and compare.

        Raises:
            Incorrect: wrong values; they must not be timed.
            Unsupported: the implementation declines the case.
        """
        chance = self._case.draws_its_own(implementation)
        _, got = self._case.runner(implementation, self._inputs[chance])
        plain, exact = self._results(chance)
        got = self._judged(got, self._inputs[chance], chance)
        compare(self._case.name, got, plain, exact, PEER_ROUNDINGS if chance else ROUNDINGS)

    def _results(self, chance: bool) -> tuple[list[Tensor], list[Tensor]]:
        # without dropout to leave out both are the same inputs, but perhaps judged by other results
        if chance not in self._expected:
            inputs = self._inputs[chance]
            pair = [
                self._judged(self._case.runner(REFERENCE, given)[1], given, chance)
                for given in (inputs, in_float64(inputs))
            ]
            self._expected[chance] = pair[0], pair[1]
        return self._expected[chance]

    def _judged(self, outputs: list[Tensor], inputs: dict[str, Any], chance: bool) -> list[Tensor]:
        specs = module(self._case.op, "specs")
        for name in ("comparable", *(["invariant"] if chance else [])):
            if hasattr(specs, name):
                outputs = tensors(getattr(specs, name)(inputs, outputs))
        return outputs


def compare(
    name: str, got: list[Tensor], plain: list[Tensor], exact: list[Tensor], roundings: float = ROUNDINGS
) -> None:
    """The module's rule for each result; integers and booleans are equal.

    Raises:
        Incorrect: a result breaks it.
    """
    if len(got) != len(plain):
        raise Incorrect(f"{name}: {len(got)} results, the reference has {len(plain)}")
    for index, (x, same_dtype, oracle) in enumerate(zip(got, plain, exact, strict=True)):
        if x.shape != same_dtype.shape:
            raise Incorrect(
                f"{name}: result {index} has shape {tuple(x.shape)}, wanted {tuple(oracle.shape)}"
            )
        if not x.is_floating_point():
            if not torch.equal(x.long(), same_dtype.long()):
                raise Incorrect(f"{name}: result {index} differs from the reference")
            continue
        scale = float(oracle.detach().abs().max()) if oracle.numel() else 0.0
        allowed = error(same_dtype, oracle) + roundings * torch.finfo(x.dtype).eps * scale
        off = error(x, oracle)
        if not off <= allowed:  # NaN too
            raise Incorrect(f"{name}: result {index} is off by {off:.3g}, allowed {allowed:.3g}")


def error(x: Tensor, oracle: Tensor) -> float:
    """The largest difference."""
    return float((x - oracle).detach().abs().max()) if x.numel() else 0.0


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs as fresh leaves, floating tensors in float64."""
    return {
        key: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for key, x in inputs.items()
    }
