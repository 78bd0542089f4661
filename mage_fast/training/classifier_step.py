"""A training step of a classifier: mixing, tokens, forward, backward, AdamW."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mage_fast.classification import MAGEClassifier
from mage_fast.errors import InputError
from mage_fast.kernels import check
from mage_fast.training.mixing import Mix, Mixing, soft_cross_entropy
from mage_fast.training.precision import Precision, autocast
from mage_fast.training.step import Metrics, MicroBatch, Step


class ClassifierStep(Step):
    """One step of fine-tuning a :class:`~mage_fast.MAGEClassifier`, as ``mage-fast finetune`` takes it.

    >>> optimizer = build_adamw(layer_decay_groups(classifier.layers, 0.65), 2.5e-4, betas=(0.9, 0.999))
    >>> step = ClassifierStep(classifier, optimizer, precision="bf16")
    >>> metrics = step(images, labels, rng_state=rng.new_state(seed, number))

    The state governs mixing, dropout and drop path. Images are mixed, then tokenized, without gradients.

    Args:
        model: in training mode, on its device.
        optimizer: as of :class:`~mage_fast.training.step.Step`, and the following likewise.
        mixing: of images; ids are not mixed.
        label_smoothing: part of the target that is spread over all classes.
        precision: see there.
        parallel: see there.

    Raises:
        InputError: as :class:`~mage_fast.training.step.Step`; a label smoothing outside [0, 1].
    """

    def __init__(
        self,
        model: MAGEClassifier,
        optimizer: torch.optim.Optimizer,
        *,
        mixing: Mixing | None = None,
        label_smoothing: float = 0.1,
        precision: Precision = "fp32",
        parallel: DistributedDataParallel | None = None,
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise InputError(f"ClassifierStep: label_smoothing is {label_smoothing}, wanted 0 to 1")
        super().__init__(model, model.head.bias.device, optimizer, precision=precision, parallel=parallel)
        self.model, self.mixing, self.label_smoothing = model, mixing or Mixing(0, 0), label_smoothing

    def _prepare(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels_B, rng_state = micro_batch
        assert rng_state is not None
        if labels_B is None:
            raise ValueError("ClassifierStep: got no labels, wanted one for each sample")
        classes = self.model.config.num_classes
        check.integer("ClassifierStep", "labels", labels_B)
        check.shape("ClassifierStep", "labels", labels_B, (len(inputs),))
        check.values("ClassifierStep", "labels", labels_B, 0, classes)
        mix = Mix()
        if inputs.is_floating_point():
            generator = np.random.default_rng(rng_state.tolist())
            mix = self.mixing.drawn(inputs.shape[-2], inputs.shape[-1], generator)
            inputs = mix.images(inputs.to(self.device, non_blocking=True))
        if self.model.config.mage.encoder_input == "tokens":
            with autocast(self.precision, self.device):
                inputs = self.model.mage.tokenize(inputs)
        labels_B = labels_B.to(self.device, non_blocking=True)
        targets_BK = mix.targets(labels_B, classes, self.label_smoothing)
        return inputs, targets_BK, rng_state.to(self.device, non_blocking=True)

    def _loss(self, inputs: Tensor, targets_BK: Tensor, rng_state: Tensor) -> tuple[Tensor, Metrics]:
        loss = soft_cross_entropy(self.forward(inputs, rng_state=rng_state), targets_BK)
        return loss, {"loss": loss.detach()}
