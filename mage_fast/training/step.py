"""A training step from batch to optimizer: masks, forward, backward, clipping, AdamW, moving average.

The host draws mask ratios and counts, and enqueues; it never waits for the device. With ``graph=True`` what
the device does is captured once for each of a few numbers of masked tokens, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Int, Int64
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.masking import MaskCounts, count_masks, draw_mask_ratios
from mage_fast.model import MAGE
from mage_fast.training.optim import Ema, clipped_step, is_fused
from mage_fast.training.precision import LossScale, Precision, autocast

#: ``loss`` (and what else the model tells of it) and ``gradient_norm`` (before clipping), on the device.
Metrics = dict[str, Tensor]
#: Graphs a model is captured in, at most: masked rows are rounded up to a multiple of 1 / GRAPHS of all.
GRAPHS = 8


class MicroBatch(NamedTuple):
    """What is computed at once; arguments as of a :class:`TrainStep`'s call."""

    inputs: Tensor
    labels_B: Int[Tensor, "B"] | None = None
    rng_state: Int64[Tensor, "2"] | None = None


class TrainStep:
    """One step of training a :class:`~mage_fast.MAGE`, as ``mage-fast pretrain`` takes it.

    >>> step = TrainStep(model, build_adamw(model, lr=1.5e-4), precision="bf16")
    >>> metrics = step(images_or_ids, rng_state=rng.new_state(seed, number))
    >>> metrics["loss"], metrics["gradient_norm"]        # device tensors; nothing waited for them

    After a step ``.grad`` holds the clipped gradients (with ``graph=True`` nothing); the next one sets them
    anew. A step whose gradient norm is not finite changes neither parameters nor optimizer; as the norm is
    that of the gradients of all processes, all skip it alike, and none waits to learn of it.

    Args:
        model: in training mode, on its device; sharded by ``fully_shard``, or not.
        optimizer: of :func:`~mage_fast.training.optim.build_adamw`, or any other.
        clip_norm: largest joint norm of the gradients; None clips nothing.
        precision: ``"fp32"``, ``"bf16"`` (autocast) or ``"fp16"`` (autocast and a dynamic loss scale; the
            attribute ``loss_scale``, a module, belongs to the state of a run). Parameters stay float32.
        ema: updated after each step.
        graph: capture and replay CUDA graphs. A batch size and a number of masked rows, rounded up, have a
            graph; its first step runs without, its second is captured. Set the learning rate with
            :func:`~mage_fast.training.schedule.set_lr`: it becomes a device tensor. Load states of model
            and optimizer as usual.
        parallel: the model within ``DistributedDataParallel``, where several processes train it.

    Raises:
        InputError: an unknown precision, a clip_norm that is not positive, ``"fp16"`` or ``graph`` with an
            optimizer that is not fused, ``graph`` on another device than CUDA, with several processes or
            with ``encoder_tokens="unmasked"``, whose sizes differ at each step.
    """

    def __init__(
        self,
        model: MAGE,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = 3.0,
        precision: Precision = "fp32",
        ema: Ema | None = None,
        graph: bool = False,
        parallel: DistributedDataParallel | None = None,
    ) -> None:
        device = model.head.bias.device
        _check(model, optimizer, clip_norm, precision, device.type if graph else None)
        if graph and (parallel is not None or isinstance(model, FSDPModule)):
            raise InputError("TrainStep: graph=True with several processes, wanted one")
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.clip_norm, self.precision, self.device = clip_norm, precision, device
        self.loss_scale = LossScale().to(device) if precision == "fp16" else None
        self.forward: nn.Module = model if parallel is None else parallel
        self._graphs = _Graphs(self.compute, optimizer, device) if graph else None

    def __call__(
        self,
        inputs: Tensor,
        labels_B: Int[Tensor, "B"] | None = None,
        *,
        rng_state: Int64[Tensor, "2"] | None = None,
    ) -> Metrics:
        """Train on a batch.

        Args:
            inputs: images ``[B, 3, H, W]`` in [0, 1], or ids ``[B, L]``, on any device; ``[V, B, ...]`` for V
                views of each.
            labels_B: class labels for class-conditional training.
            rng_state: int64 ``(seed, step)`` on the CPU that governs masks and dropout; drawn by default.

        Raises:
            ValueError: as :meth:`mage_fast.MAGE.forward`.
        """
        arguments = self._prepare(MicroBatch(inputs, labels_B, rng_state))
        return (self.compute if self._graphs is None else self._graphs)(*arguments)

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """Train on several micro-batches as one batch: the loss is the mean of their losses.

        Each draws its own masks and dropout. Processes exchange gradients once, after the last.

        Raises:
            InputError: several micro-batches with ``graph=True``.
            ValueError: as a call; none at all.
        """
        if len(micro_batches) == 1:
            return self(*micro_batches[0][:2], rng_state=micro_batches[0].rng_state)
        if self._graphs is not None:
            raise InputError(f"TrainStep: {len(micro_batches)} micro-batches with graph=True, wanted 1")
        if not micro_batches:
            raise ValueError("TrainStep: got no micro-batch, wanted one or more")
        self.optimizer.zero_grad(set_to_none=True)
        metrics: list[Metrics] = []
        for number, micro_batch in enumerate(micro_batches, 1):
            arguments = self._prepare(micro_batch)
            with self._exchange(number == len(micro_batches)):
                metrics.append(self._gradients(*arguments, share=1 / len(micro_batches)))
        means = {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
        return means | self._update()

    def compute(
        self, inputs: Tensor, labels_B: Tensor | None, rng_state: Tensor, counts: MaskCounts
    ) -> Metrics:
        """What the device does in a step; all tensors are there."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._gradients(inputs, labels_B, rng_state, counts) | self._update()

    def _prepare(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None, Tensor, MaskCounts]:
        """Everything on the device, but the counts' sizes: what ``compute`` takes."""
        inputs, labels_B, rng_state = micro_batch
        config = self.model.config
        if rng_state is None:
            rng_state = rng.new_state()
        if rng_state.device.type != "cpu":
            raise ValueError(f"TrainStep: rng_state is on {rng_state.device}, wanted it on the CPU")
        views = 1
        if inputs.ndim == (5 if inputs.is_floating_point() else 3):
            views, inputs = len(inputs), inputs.flatten(0, 1)
        if inputs.is_floating_point():
            inputs = inputs.to(self.device, non_blocking=True)
        if config.encoder_input == "tokens":
            with autocast(self.precision, self.device):
                inputs = self.model.tokenize(inputs)
        batch, length = len(inputs), config.num_tokens
        if labels_B is not None:  # checked on the CPU, where they are there
            labels_B = self.model.class_ids(labels_B.repeat(views), batch) - config.codebook_size
        counts = count_masks(config, draw_mask_ratios(config, batch, rng_state))
        if self._graphs is not None:
            counts = counts.padded(max(batch * length // GRAPHS, 1))
        return inputs, labels_B, rng_state.to(self.device, non_blocking=True), counts.to(self.device)

    def _gradients(
        self,
        inputs: Tensor,
        labels_B: Tensor | None,
        rng_state: Tensor,
        counts: MaskCounts,
        share: float = 1.0,
    ) -> Metrics:
        """Add a micro-batch's share to the gradients."""
        with autocast(self.precision, self.device):
            output = self.forward(inputs, labels_B, plan=counts.plan(rng_state), rng_state=rng_state)
        loss = output.loss if share == 1.0 else output.loss * share
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()
        return output.metrics

    def _exchange(self, now: bool) -> AbstractContextManager:
        """Whether processes exchange gradients in the next backward, or keep them."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(now)
            self.model.set_is_last_backward(now)
        if isinstance(self.forward, DistributedDataParallel) and not now:
            return self.forward.no_sync()
        return nullcontext()

    def _update(self) -> Metrics:
        norm = clipped_step(self.optimizer, self.clip_norm, self.loss_scale)
        if self.ema is not None:
            self.ema.update(self.model)
        return {"gradient_norm": norm}


class _Graphs:
    """CUDA graphs of a function of ``(ids, labels, rng_state, counts)``, one for each set of sizes."""

    def __init__(
        self, compute: Callable[..., Metrics], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.compute, self.optimizer, self.device = compute, optimizer, device
        self.pool: Any = None
        #: None: ran once, so that kernels are compiled and states made.
        self.captured: dict[Any, tuple[Callable[[], Metrics], list[Tensor]] | None] = {}
        self._prepare(optimizer)
        # a loaded state comes with other tensors than those that were captured
        optimizer.register_load_state_dict_post_hook(self._prepare)

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.captured.clear()
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device).clone()
            group["capturable"] = True

    def __call__(
        self, ids_BL: Tensor, labels_B: Tensor | None, rng_state: Tensor, counts: MaskCounts
    ) -> Metrics:
        key = (counts.sizes, labels_B is None)
        if key not in self.captured:
            self.captured[key] = None
            return self.compute(ids_BL, labels_B, rng_state, counts)
        inputs = [ids_BL, rng_state, counts.num_masked_B, counts.num_dropped_B]
        inputs += [] if labels_B is None else [labels_B]
        found = self.captured[key]
        if found is None:
            ids, state, masked, dropped, *labels = static = [x.clone() for x in inputs]
            arguments = (
                *(ids, labels[0] if labels else None, state),
                replace(counts, num_masked_B=masked, num_dropped_B=dropped),
            )
            found = self.captured[key] = self._capture(lambda: self.compute(*arguments)), static
        replay, static = found
        for x, value in zip(static, inputs, strict=True):
            x.copy_(value)
        # the next replay writes its metrics to the same place
        return {name: value.clone() for name, value in replay().items()}

    def _capture(self, function: Callable[[], Metrics]) -> Callable[[], Metrics]:
        """Record the function, which does not run; the result runs it and gives its metrics."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that pins batches may go on
        mode = "thread_local"
        with torch.cuda.device(self.device), torch.cuda.graph(graph, self.pool, capture_error_mode=mode):
            metrics = function()
        self.optimizer.zero_grad(set_to_none=True)  # their memory is the next graph's too

        def replay() -> Metrics:
            graph.replay()
            return metrics

        return replay


def _check(
    model: MAGE,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    precision: str,
    graph_device: str | None,
) -> None:
    if precision not in get_args(Precision):
        raise InputError(
            f"TrainStep: precision is {precision!r}, wanted one of {', '.join(get_args(Precision))}"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"TrainStep: clip_norm is {clip_norm}, wanted more than 0, or None")
    if graph_device not in (None, "cuda"):
        raise InputError(f"TrainStep: graph=True with a model on {graph_device}, wanted it on cuda")
    if graph_device is not None and model.config.encoder_tokens != "paper":
        raise InputError(
            f'TrainStep: graph=True with encoder_tokens="{model.config.encoder_tokens}", wanted "paper": '
            "the number of encoded tokens must not change from step to step"
        )
    if (precision == "fp16" or graph_device is not None) and not is_fused(optimizer):
        what = "graph=True" if graph_device is not None else 'precision="fp16"'
        raise InputError(f"TrainStep: {what} with an optimizer that is not fused, wanted fused=True")
