"""A training step from batch to optimizer: masks, forward, backward, clipping, AdamW, moving average.

The host draws mask ratios and counts, and enqueues; it never waits for the device. With ``graph=True`` what
the device does is captured once for each of a few numbers of masked tokens, and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class Step(ABC):
    """One step of training a model: gradients of one or several micro-batches, clipping, the optimizer.

    A subclass says what goes to the device (``_prepare``) and what is minimised there (``_loss``).

    Args:
        model: in training mode, on its device; sharded by ``fully_shard``, or not.
        device: the model's.
        optimizer: of :func:`~mage_fast.training.optim.build_adamw`, or any other.
        clip_norm: largest joint norm of the gradients; None clips nothing.
        precision: ``"fp32"``, ``"bf16"`` (autocast) or ``"fp16"`` (autocast and a dynamic loss scale; the
            attribute ``loss_scale``, a module, belongs to the state of a run). Parameters stay float32.
        ema: updated after each step.
        parallel: the model within ``DistributedDataParallel``, where several processes train it.

    Raises:
        InputError: an unknown precision, a clip_norm that is not positive, ``"fp16"`` with an optimizer that
            is not fused.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        ema: Ema | None = None,
        parallel: DistributedDataParallel | None = None,
    ) -> None:
        name = type(self).__name__
        if precision not in get_args(Precision):
            raise InputError(
                f"{name}: precision is {precision!r}, wanted one of {', '.join(get_args(Precision))}"
            )
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"{name}: clip_norm is {clip_norm}, wanted more than 0, or None")
        if precision == "fp16" and not is_fused(optimizer):
            raise InputError(
                f'{name}: precision="fp16" with an optimizer that is not fused, wanted fused=True'
            )
        self._module, self.device, self.optimizer, self.ema = model, device, optimizer, ema
        self.clip_norm, self.precision = clip_norm, precision
        self.loss_scale = LossScale().to(device) if precision == "fp16" else None
        self.forward: nn.Module = model if parallel is None else parallel

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
            labels_B: class labels.
            rng_state: int64 ``(seed, step)`` on the CPU that governs all that is random; drawn by default.

        Raises:
            ValueError: as the model's forward.
        """
        return self._run(*self._prepare(MicroBatch(inputs, labels_B, _on_cpu(rng_state))))

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """Train on several micro-batches as one batch: the loss is the mean of their losses.

        Each draws its own random numbers. Processes exchange gradients once, after the last.

        Raises:
            ValueError: as a call; none at all.
        """
        if len(micro_batches) == 1:
            return self(*micro_batches[0][:2], rng_state=micro_batches[0].rng_state)
        if not micro_batches:
            raise ValueError(f"{type(self).__name__}: got no micro-batch, wanted one or more")
        self.optimizer.zero_grad(set_to_none=True)
        metrics: list[Metrics] = []
        for number, (inputs, labels_B, rng_state) in enumerate(micro_batches, 1):
            arguments = self._prepare(MicroBatch(inputs, labels_B, _on_cpu(rng_state)))
            with self._exchange(number == len(micro_batches)):
                metrics.append(self._gradients(*arguments, share=1 / len(micro_batches)))
        means = {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
        return means | self._update()

    def compute(self, *arguments: Any) -> Metrics:
        """What the device does in a step; all tensors are there."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._gradients(*arguments) | self._update()

    _run = compute

    @abstractmethod
    def _prepare(self, micro_batch: MicroBatch) -> tuple[Any, ...]:
        """What ``_loss`` takes, on the device; the micro-batch has an rng_state."""

    @abstractmethod
    def _loss(self, *arguments: Any) -> tuple[Tensor, Metrics]:
        """What is minimised, and what is told of it."""

    def _gradients(self, *arguments: Any, share: float = 1.0) -> Metrics:
        """Add a micro-batch's share to the gradients."""
        with autocast(self.precision, self.device):
            loss, metrics = self._loss(*arguments)
        loss = loss if share == 1.0 else loss * share
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()
        return metrics

    def _exchange(self, now: bool) -> AbstractContextManager:
        """Whether processes exchange gradients in the next backward, or keep them."""
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(now)
            self._module.set_is_last_backward(now)
        if isinstance(self.forward, DistributedDataParallel) and not now:
            return self.forward.no_sync()
        return nullcontext()

    def _update(self) -> Metrics:
        norm = clipped_step(self.optimizer, self.clip_norm, self.loss_scale)
        if self.ema is not None:
            self.ema.update(self._module)
        return {"gradient_norm": norm}


def _on_cpu(rng_state: Tensor | None) -> Tensor:
    if rng_state is None:
        return rng.new_state()
    if rng_state.device.type != "cpu":
        raise ValueError(f"training step: rng_state is on {rng_state.device}, wanted it on the CPU")
    return rng_state


class TrainStep(Step):
    """One step of training a :class:`~mage_fast.MAGE`, as ``mage-fast pretrain`` takes it.

    >>> step = TrainStep(model, build_adamw(model, lr=1.5e-4), precision="bf16")
    >>> metrics = step(images_or_ids, rng_state=rng.new_state(seed, number))
    >>> metrics["loss"], metrics["gradient_norm"]        # device tensors; nothing waited for them

    After a step ``.grad`` holds the clipped gradients (with ``graph=True`` nothing); the next one sets them
    anew. A step whose gradient norm is not finite changes neither parameters nor optimizer; as the norm is
    that of the gradients of all processes, all skip it alike, and none waits to learn of it.

    Args:
        model: in training mode, on its device; sharded by ``fully_shard``, or not.
        optimizer: as of :class:`Step`, and the following likewise.
        clip_norm: see there.
        precision: see there.
        ema: see there.
        graph: capture and replay CUDA graphs. A batch size and a number of masked rows, rounded up, have a
            graph; its first step runs without, its second is captured. Set the learning rate with
            :func:`~mage_fast.training.schedule.set_lr`: it becomes a device tensor. Load states of model
            and optimizer as usual.
        parallel: see there.

    Raises:
        InputError: as :class:`Step`; ``graph`` with an optimizer that is not fused, on another device than
            CUDA, with several processes or with ``encoder_tokens="unmasked"``, whose sizes differ at each
            step.
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
        super().__init__(
            model, device, optimizer, clip_norm=clip_norm, precision=precision, ema=ema, parallel=parallel
        )
        if graph:
            _check_graph(model, optimizer, device)
            if parallel is not None or isinstance(model, FSDPModule):
                raise InputError("TrainStep: graph=True with several processes, wanted one")
        self.model = model
        self._graphs = _Graphs(self.compute, optimizer, device) if graph else None

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """As :meth:`Step.accumulate`.

        Raises:
            InputError: several micro-batches with ``graph=True``.
        """
        if self._graphs is not None and len(micro_batches) > 1:
            raise InputError(f"TrainStep: {len(micro_batches)} micro-batches with graph=True, wanted 1")
        return super().accumulate(micro_batches)

    def _run(self, *arguments: Any) -> Metrics:
        return (self.compute if self._graphs is None else self._graphs)(*arguments)

    def _prepare(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None, Tensor, MaskCounts]:
        """Everything on the device, but the counts' sizes."""
        inputs, labels_B, rng_state = micro_batch
        assert rng_state is not None
        config = self.model.config
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

    def _loss(
        self, inputs: Tensor, labels_B: Tensor | None, rng_state: Tensor, counts: MaskCounts
    ) -> tuple[Tensor, Metrics]:
        output = self.forward(inputs, labels_B, plan=counts.plan(rng_state), rng_state=rng_state)
        return output.loss, output.metrics


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


def _check_graph(model: MAGE, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"TrainStep: graph=True with a model on {device.type}, wanted it on cuda")
    if model.config.encoder_tokens != "paper":
        raise InputError(
            f'TrainStep: graph=True with encoder_tokens="{model.config.encoder_tokens}", wanted "paper": '
            "the number of encoded tokens must not change from step to step"
        )
    if not is_fused(optimizer):
        raise InputError("TrainStep: graph=True with an optimizer that is not fused, wanted fused=True")
