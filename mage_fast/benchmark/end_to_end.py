"""Whole steps side by side: training steps, generations, the tokenizer; each behind a check.

An :class:`Item` is one thing to be done, a :class:`Candidate` one way to do it. Every candidate of an item is
checked against the reference, then they are timed in turns in one process.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mage_fast import checkpoint, reference
from mage_fast.benchmark.gate import Incorrect
from mage_fast.benchmark.timing import FEWEST_ROUNDS, Run, Timing, by_the_clock
from mage_fast.config import MAGEConfig
from mage_fast.kernels.roofline import Device, Work, data_sheet
from mage_fast.model import MAGE

OURS = "mage_fast"
#: Ours under torch.compile, and replayed as CUDA graphs.
COMPILED, GRAPH = "mage_fast-compiled", "mage_fast-graph"
#: The published release's computation: in float32, as it trains on a GPU, and under torch.compile.
EAGER, AMP, REFERENCE_COMPILED = (
    *("reference-eager-fp32", "reference-eager-fp16-amp", "reference-compiled-bf16"),
)
#: Precisions of our own steps: parameters in float32, bfloat16 by autocast.
DTYPES = (torch.float32, torch.bfloat16)
#: Allowed distance from the reference in float32, relative to its length.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Candidate:
    """One way to do an item's work."""

    implementation: str
    dtype: torch.dtype
    run: Run
    #: What is done once before timing: ``run``, or less where that takes long.
    warm_up: Callable[[], Any]
    #: Compares with the reference: a remark, or raises Incorrect. None for what is compared with.
    check: Callable[[], str] | None = None
    #: Bytes that a forward pass keeps for the backward pass.
    kept_bytes: Callable[[], int] | None = None
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.implementation}, {name_of(self.dtype)}"


class Item(ABC):
    """One thing to be done by several candidates."""

    suite: ClassVar[str]
    #: Rounds at the least; a run that takes a minute is content with fewer.
    fewest_rounds: int = FEWEST_ROUNDS
    name: str
    device: str
    batch: int
    #: The implementation that the others are compared with.
    baseline: str = EAGER

    @property
    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """What is done, in numbers; the batch among them."""

    @abstractmethod
    def work(self, dtype: torch.dtype) -> Work:
        """The products that the results need, and the weights and optimizer state that must move."""

    @abstractmethod
    def candidates(self, *, compiled: bool) -> list[Candidate]:
        """Who does it; the baseline is among them."""


@dataclass
class Measured:
    """The records of an item, and what they have no room for."""

    records: list[dict[str, Any]] = field(default_factory=list)
    #: Wrong results, one line each.
    incorrect: list[str] = field(default_factory=list)
    #: Candidates that cannot run here, one line each.
    declined: list[str] = field(default_factory=list)

    def remarks(self) -> list[str]:
        """What a table has no room for: wrong results, what cannot run here, notes of the records."""
        noted = [
            f"{r['name']}, {r['implementation']}, {r['dtype']}: {r['note']}"
            for r in self.records
            if r.get("note")
        ]
        wrong = [f"incorrect: {line}" for line in self.incorrect]
        return wrong + [f"not measured: {line}" for line in self.declined] + noted


def measure(item: Item, limits: Device, seconds: float, *, compiled: bool = False) -> Measured:
    """Check and time every candidate. A wrong one is recorded without a time."""
    out = Measured()
    right: dict[str, Candidate] = {}
    wrong: list[Candidate] = []
    notes: dict[str, str] = {}
    kept: dict[str, int] = {}

    def attempt(candidate: Candidate, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Incorrect as error:
            out.incorrect.append(f"{item.name}, {candidate.label}: {error}")
            wrong.append(candidate)
        except RuntimeError as error:  # out of memory, or torch.compile and graphs that fail here
            out.declined.append(f"{item.name}, {candidate.label}: {str(error).splitlines()[0]}")
        right.pop(candidate.label)

    for candidate in item.candidates(compiled=compiled):
        right[candidate.label] = candidate
    for label, candidate in list(right.items()):  # all before any runs: a training step changes the weights
        if candidate.check:
            notes[label] = attempt(candidate, candidate.check) or ""
    for label, candidate in list(right.items()):
        if candidate.kept_bytes:
            kept[label] = attempt(candidate, candidate.kept_bytes)
        if label in right:
            attempt(candidate, candidate.warm_up)  # compiles, captures, allocates
    runs = {label: candidate.run for label, candidate in right.items()}
    timings = by_the_clock(runs, item.device, seconds, item.fewest_rounds)
    baseline = next((timings[x] for x, c in right.items() if c.implementation == item.baseline), None)
    for label, candidate in right.items():
        note = "; ".join(filter(None, (candidate.note, notes.get(label))))
        added = {"activation_mib": kept[label] / 2**20 if label in kept else None, "note": note or None}
        out.records.append(_record(item, candidate, timings[label], baseline, limits) | added)
    out.records += [_record(item, candidate, None, baseline, limits) for candidate in wrong]
    return out


def _record(
    item: Item, candidate: Candidate, timing: Timing | None, baseline: Timing | None, limits: Device
) -> dict[str, Any]:
    floor_ms = 1e3 * limits.floor_seconds(item.work(candidate.dtype), candidate.dtype)
    ms = timing.median_ms if timing else None
    sheet = data_sheet(limits.name)
    peak_ms = 1e3 * sheet.compute_seconds(item.work(candidate.dtype), candidate.dtype) if sheet else None
    return {
        "suite": item.suite,
        "name": item.name,
        "dtype": name_of(candidate.dtype),
        "shape": item.shape,
        "implementation": candidate.implementation,
        "baseline": item.baseline,
        "median_ms": ms,
        "baseline_median_ms": baseline.median_ms if baseline else None,
        "ratio": baseline.median_ms / ms if baseline and ms else None,
        "floor_ms": floor_ms,
        "percent_of_floor": 100 * floor_ms / ms if ms else None,
        "peak_mib": timing.peak_mib if timing else None,
        "correct": timing is not None,
        "rounds": len(timing.samples_ms) if timing else 0,
        "activation_mib": None,
        "images_s": 1e3 * item.batch / ms if ms else None,
        "mfu_percent": 100 * peak_ms / ms if peak_ms and ms else None,
    }


class Twins:
    """Our model and the reference's with the same weights, made when first asked for."""

    def __init__(self, name: str, config: MAGEConfig, device: str) -> None:
        self.name, self.config, self.device = name, config, device
        #: Whether this is the tiny model, to see that everything runs.
        self.smoke = name == "tiny"
        self._pair: tuple[MAGE, reference.MAGE] | None = None

    @property
    def pair(self) -> tuple[MAGE, reference.MAGE]:
        """``(ours, the reference's)``, in training mode."""
        if self._pair is None:
            torch.manual_seed(0)
            ours = MAGE(self.config)
            theirs = reference.MAGE.from_config(self.config)
            theirs.load_state_dict(checkpoint.to_published(ours.state_dict(), self.config))
            self._pair = ours.to(self.device).train(), theirs.to(self.device).train()
        return self._pair

    def same_weights(self) -> tuple[MAGE, reference.MAGE]:
        """The pair, the reference's with our weights again: training steps have moved both."""
        ours, theirs = self.pair
        theirs.load_state_dict(checkpoint.to_published(ours.state_dict(), self.config))
        return ours, theirs

    def ids(self, batch: int) -> Tensor:
        """Random ids on the device, always the same."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.config.num_tokens)
        return torch.randint(self.config.codebook_size, shape, generator=generator).to(self.device)

    def images(self, batch: int) -> Tensor:
        """Random images in [0, 1] on the device, always the same."""
        assert self.config.tokenizer is not None
        side = self.config.tokenizer.image_size
        generator = torch.Generator().manual_seed(0)
        return torch.rand(batch, 3, side, side, generator=generator).to(self.device)


def compiled_reference(model: reference.MAGE) -> reference.MAGE:
    """A copy whose parts are compiled; drawing masks, whose counts change in every step, stays as it is."""
    model = copy.deepcopy(model)
    for name in ("forward_encoder", "forward_decoder", "forward_loss"):
        setattr(model, name, torch.compile(getattr(model, name)))
    model.vqgan.encoder.compile()
    model.vqgan.decoder.compile()
    return model


def models(names: tuple[str, ...], device: str, *, smoke: bool) -> list[Twins]:
    """The models that suites are about: of these names, by default ViT-B and, on CUDA, ViT-L."""
    if smoke:
        return [Twins("tiny", MAGEConfig.tiny(), device)]
    make = {"vit_b": MAGEConfig.vit_b, "vit_l": MAGEConfig.vit_l}
    wanted = names or (("vit_b", "vit_l") if device == "cuda" else ("vit_b",))
    return [Twins(name, make[name](), device) for name in wanted]


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to a half dtype; nothing for float32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def distance(got: Tensor, wanted: Tensor) -> float:
    """Of two tensors, relative to the second's length."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def near(what: str, got: Tensor, wanted: Tensor, dtype: torch.dtype, plain: Tensor | None = None) -> None:
    """Raises Incorrect where ``got`` is farther from ``wanted`` than ``TOLERANCE``, and than ``plain``: what
    the reference computes in the same dtype.
    """
    if got.shape != wanted.shape:
        raise Incorrect(f"{what} have shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
    off, allowed = distance(got, wanted), TOLERANCE[dtype]
    if plain is not None:
        allowed = max(allowed, distance(plain, wanted))
    if not off <= allowed:  # NaN too
        raise Incorrect(f"{what} are off by {off:.2g} of their length, allowed {allowed:.2g}")


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the tensors that ``forward`` saves for the backward pass, each storage once; the model's own
    parameters and buffers are not counted. Copies of weights that autocast makes are.
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # holding them keeps their addresses from being used again

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = forward()
    del result
    return sum(x.untyped_storage().nbytes() for x in saved.values())
