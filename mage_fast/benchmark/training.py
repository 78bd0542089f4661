"""Whole training steps, ours beside the reference's: forward, backward, clipping, AdamW.

``tokens-given``: from ids on the device. ``online``: from images, which every step tokenizes, as the release
does, in float32. ``cached``: our step reads ids from a token cache on disk; its baseline is the reference's
online step, as the release cannot train from cached tokens.

Both models have the same weights; each draws masks and dropout as it does in training. Before anything is
timed, loss and gradients without dropout are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mage_fast import checkpoint, counts, reference
from mage_fast.benchmark.end_to_end import (
    AMP,
    COMPILED,
    DTYPES,
    EAGER,
    GRAPH,
    OURS,
    REFERENCE_COMPILED,
    TOLERANCE,
    Candidate,
    Item,
    Twins,
    autocast,
    compiled_reference,
    kept_bytes,
    near,
)
from mage_fast.benchmark.gate import Incorrect
from mage_fast.benchmark.timing import Run
from mage_fast.kernels import rng
from mage_fast.kernels.roofline import Work
from mage_fast.masking import draw_plan
from mage_fast.model import MAGE
from mage_fast.training.optim import adamw_parameter_groups, build_adamw
from mage_fast.training.precision import Precision
from mage_fast.training.step import GRAPHS, TrainStep
from mage_fast.training.token_cache import TokenCache, TokenCacheWriter

Recipe = Literal["tokens-given", "online", "cached"]
Batch = Callable[[], Tensor]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
#: Images a step, by device type.
BATCH = {"cuda": 128, "cpu": 4}
_LR, _MAX_NORM = 1e-4, 3.0
#: Batches in the cache on disk, read in turn.
_CACHED_BATCHES = 16
_BASELINE_NOTE = "baseline tokenizes online: the release cannot train from cached tokens"


@dataclass
class Training(Item):
    """Steps of one model by one recipe."""

    suite = "train"
    twins: Twins
    recipe: Recipe
    batch: int

    def __post_init__(self) -> None:
        self.device = self.twins.device
        self.name = f"{self.twins.name}/{self.recipe}"
        if self.batch != default_batch(self.twins):
            self.name += f"/batch{self.batch}"
        self.baseline = AMP if self.device == "cuda" else EAGER

    @property
    def shape(self) -> dict[str, Any]:
        return {"batch": self.batch, "dropout": self.twins.config.dropout}

    def work(self, dtype: torch.dtype) -> Work:
        flops = counts.training(self.twins.config)
        if self.recipe == "online":
            assert self.twins.config.tokenizer is not None
            flops += counts.tokenizer(self.twins.config.tokenizer, "encode")
        read, written = counts.optimizer_bytes(self.twins.config)
        return Work(read, written, round(self.batch * flops), matrix=True)

    def candidates(self, *, compiled: bool) -> list[Candidate]:
        ours, theirs = self.twins.same_weights()
        images, ids = self.twins.images(self.batch), self.twins.ids(self.batch)
        # what the reference trains on: the release has no other way from images to a step than online
        their_batch = ids if self.recipe == "tokens-given" else images
        found = [self._theirs(theirs, EAGER, torch.float32, their_batch)]
        if self.device == "cuda":
            found.append(self._theirs(theirs, AMP, torch.float16, their_batch))
        if compiled:
            compiled_twin = compiled_reference(theirs)
            found.append(self._theirs(compiled_twin, REFERENCE_COMPILED, torch.bfloat16, their_batch))
        batch: Batch = partial(_same, images if self.recipe == "online" else ids)
        if self.recipe == "cached":
            batch = cached_batches(self.twins, ids)
        for dtype in DTYPES:
            found.append(self._ours(ours, OURS, dtype, batch, ids))
        if self.device == "cuda":
            found.append(self._ours(ours, GRAPH, torch.bfloat16, batch, ids))
        if compiled:
            found.append(self._ours(ours, COMPILED, torch.bfloat16, batch, ids))
        return found

    def _theirs(self, model: reference.MAGE, name: str, dtype: torch.dtype, batch: Tensor) -> Candidate:
        def kept() -> int:
            ids_BL = model.tokenize(batch)
            with autocast(self.device, dtype):
                return kept_bytes(model, lambda: model(ids_BL))

        run = reference_step(model, batch, dtype)
        return Candidate(name, dtype, run, run, kept_bytes=None if name == REFERENCE_COMPILED else kept)

    def _ours(self, model: MAGE, name: str, dtype: torch.dtype, batch: Batch, ids: Tensor) -> Candidate:
        def kept() -> int:
            with autocast(self.device, dtype):
                return kept_bytes(model, lambda: model(ids))

        run = our_step(model, batch, dtype, name)
        return Candidate(
            *(name, dtype, run, partial(_often, run) if name == GRAPH else run),
            check=lambda: self.check(dtype, batch),
            kept_bytes=kept if name == OURS else None,
            note=_BASELINE_NOTE if self.recipe == "cached" else "",
        )

    def check(self, dtype: torch.dtype, batch: Batch) -> str:
        """What our step trains on, and loss and gradients without dropout for the same masks.

        Raises:
            Incorrect: they are farther from the reference's than ``TOLERANCE``.
        """
        ours, theirs = self.twins.pair
        for model in (ours, theirs):  # a step before may have left its gradients
            model.zero_grad()
        remark = ""
        if self.recipe == "online":
            remark = check_features(self.twins, self.batch, dtype)
        if self.recipe == "cached" and not torch.equal(batch().long(), self.twins.ids(self.batch)):
            raise Incorrect("the token cache gives other ids than were written")
        try:
            self._check_gradients(ours.eval(), theirs.eval(), dtype)  # eval: without dropout
        finally:
            for model in (ours, theirs):
                model.zero_grad()
                model.train()
        return remark

    def _check_gradients(self, ours: MAGE, theirs: reference.MAGE, dtype: torch.dtype) -> None:
        config, ids_BL = self.twins.config, self.twins.ids(self.batch)
        plan = draw_plan(config, torch.full((self.batch,), 0.7), rng.new_state(1, device=self.device))
        dropped_BS = torch.ones(plan.source_BS.shape, dtype=torch.bool, device=self.device).flatten()
        dropped_BS[plan.positions_T.long()] = False
        drop_mask_BL = dropped_BS.view_as(plan.source_BS)[:, 1:]
        ours.zero_grad()  # a step leaves its gradients
        with autocast(self.device, dtype):
            got = ours(ids_BL, plan=plan).loss
        got.backward()
        wanted = theirs(ids_BL, drop_mask=drop_mask_BL, mask=plan.is_masked_BL).loss
        wanted.backward()
        state = ours.state_dict(keep_vars=True).items()
        grads = checkpoint.to_published({name: _gradient(p) for name, p in state}, config)
        learned = [(grads[n], _gradient(p)) for n, p in theirs.named_parameters() if p.requires_grad]
        off = sum(float((x - y).square().sum()) for x, y in learned)
        length = sum(float(y.square().sum()) for _, y in learned)
        away, allowed = (off / length) ** 0.5, TOLERANCE[dtype]
        if not (away <= allowed and abs(got - wanted) <= allowed * abs(wanted)):  # NaN too
            raise Incorrect(
                f"loss {got:.6g}, the reference's {wanted:.6g}; gradients are off by {away:.2g} of their "
                f"length, allowed {allowed:.2g}"
            )


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def check_features(twins: Twins, batch: int, dtype: torch.dtype) -> str:
    """The tokenizer's features against the reference's; how many ids agree, as a remark."""
    ours, theirs = twins.pair
    images = twins.images(batch)
    with torch.no_grad():
        wanted, wanted_ids = theirs.vqgan.encoder(images), theirs.tokenize(images)
        with autocast(twins.device, dtype):
            assert ours.tokenizer is not None
            got, ids = ours.tokenizer.encode_features(images), ours.tokenize(images)  # type: ignore[attr-defined]
    near("the tokenizer's features", got, wanted, dtype)
    return f"{100 * float((ids == wanted_ids).double().mean()):.2f}% of ids as the reference's"


def _same(batch: Tensor) -> Tensor:
    return batch


def cached_batches(twins: Twins, ids: Tensor) -> Batch:
    """Batches read from a token cache on disk in turn; the first is ``ids``."""
    batch, length = ids.shape
    folder = tempfile.TemporaryDirectory(prefix="mage_fast_cache_")
    with TokenCacheWriter(folder.name, length=length, codebook_size=twins.config.codebook_size) as writer:
        for _ in range(_CACHED_BATCHES):
            writer.append(ids, torch.zeros(batch, dtype=torch.int64))
    cache = TokenCache(Path(folder.name), verify=False)
    turn = 0

    def read(_: tempfile.TemporaryDirectory = folder) -> Tensor:  # the folder lives as long as who reads it
        nonlocal turn
        first = turn % _CACHED_BATCHES * batch
        turn += 1
        read_BL = torch.from_numpy(cache.batch(np.arange(first, first + batch)))
        return read_BL.pin_memory().to(twins.device, non_blocking=True) if ids.is_cuda else read_BL

    return read


def _often(run: Run) -> None:
    """Until the graphs of most numbers of masked tokens are captured, each in its second step."""
    for _ in range(4 * GRAPHS):
        run()


def our_step(model: MAGE, batch: Batch, dtype: torch.dtype, name: str = OURS) -> Run:
    """Our step; in bfloat16 under autocast, parameters and optimizer in float32."""
    precision: Precision = "fp32" if dtype is torch.float32 else "bf16"
    forward = cast(MAGE, torch.compile(model)) if name == COMPILED else model
    graph = name == GRAPH
    step = TrainStep(forward, build_adamw(model, _LR), clip_norm=_MAX_NORM, precision=precision, graph=graph)
    return lambda: step(batch())


def reference_step(model: reference.MAGE, batch: Tensor, dtype: torch.dtype) -> Run:
    """The release's step: images are tokenized in float32, gradients of float16 are scaled."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adamw_parameter_groups(model), lr=_LR, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(batch.device.type, enabled=dtype is torch.float16)

    def run() -> None:
        ids_BL = model.tokenize(batch)
        with autocast(batch.device.type, dtype):
            loss = model(ids_BL).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return run


def default_batch(twins: Twins) -> int:
    """Images a step where no batch is asked for."""
    return 2 if twins.smoke else BATCH[twins.device]


def items(
    twins: list[Twins], *, batch: int | None = None, recipes: tuple[Recipe, ...] = RECIPES
) -> list[Training]:
    """Every recipe of every model; ``batch`` images a step, or as the device can take."""
    return [Training(twin, recipe, batch or default_batch(twin)) for twin in twins for recipe in recipes]
