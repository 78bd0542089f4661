"""What ``mage-fast finetune`` can be told, and the paper's recipes by the size of the encoder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mage_fast.config import MAGEConfig
from mage_fast.errors import InputError
from mage_fast.recipes.pretrain_config import CheckpointChoices
from mage_fast.training.precision import Precision
from mage_fast.training.trackers import TrackerName

#: What the command line calls no RandAugment.
NO_RAND_AUGMENT = "none"


@dataclass(frozen=True)
class FinetuneRecipe:
    """What the encoder's size sets where the command line does not."""

    epochs: int
    warmup_epochs: int
    batch_size: int
    #: For a batch of 256.
    base_lr: float
    layer_decay: float
    drop_path: float
    mixup: float
    cutmix: float
    augment: str
    rand_augment: str


_VIT_B = FinetuneRecipe(100, 5, 1024, 2.5e-4, 0.65, 0.1, 0.8, 1.0, "strong", "rand-m9-mstd0.5-inc1")
#: By the least width of the encoder: the paper's for ViT-L and ViT-B, and one for small models and data.
RECIPES = {
    1024: dataclasses.replace(_VIT_B, epochs=50, layer_decay=0.75, drop_path=0.2),
    768: _VIT_B,
    0: FinetuneRecipe(30, 3, 64, 4e-3, 0.75, 0.1, 0.0, 0.0, "weak", NO_RAND_AUGMENT),
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Train a classifier from a pre-trained model, all of it. The same command resumes; Ctrl-C saves first.

    What is not given below is the paper's recipe for encoders as wide as ViT-B or ViT-L, and one for small
    data for narrower ones.
    """

    #: A model's folder (as pretrain writes it) or a published .pth.
    model: Path = Path("out/pretrain")
    #: Labelled data: digits, folder:PATH, webdataset:PATH, hf:NAME or tokens:PATH (wants mixup and cutmix 0).
    data: str = "digits"
    #: What accuracies are measured on; the held-out part of --data without.
    test_data: str | None = None
    #: Folder of the run: checkpoints, logs, curves and, at the end, the classifier.
    out: Path = Path("out/finetuned")
    #: Passes over the data (ViT-B 100, ViT-L 50, small 30).
    epochs: int | None = None
    #: Epochs in which the learning rate rises (ViT 5, small 3).
    warmup_epochs: int | None = None
    #: Images a step over all processes (ViT 1024, small 64), or all there are.
    batch_size: int | None = None
    #: Micro-batches that each process computes one after the other before an optimizer step.
    accumulate: int = 1
    #: Learning rate of the head for a batch of 256, it scales with the batch (ViT 2.5e-4, small 4e-3).
    base_lr: float | None = None
    #: Where the head's learning rate ends.
    min_lr: float = 1e-6
    #: Learning rate of a layer over that of the layer after it (ViT-B 0.65, others 0.75).
    layer_decay: float | None = None
    #: Of matrices; biases and norms have none.
    weight_decay: float = 0.05
    #: Probability that the last block's branches are left out, lower before it (ViT-L 0.2, others 0.1).
    drop_path: float | None = None
    #: Part of the target that is spread over all classes.
    label_smoothing: float = 0.1
    #: Alpha of Mixup; 0 for none (ViT 0.8, small 0).
    mixup: float | None = None
    #: Alpha of CutMix, which takes turns with Mixup; 0 for none (ViT 1, small 0).
    cutmix: float | None = None
    #: strong, weak, weak-no-flip, window or eval (ViT strong, small weak). Token caches have theirs.
    augment: str | None = None
    #: RandAugment in timm's words (ViT rand-m9-mstd0.5-inc1), or none (small). Wants the extra finetune.
    rand_augment: str | None = None
    #: Epochs between two looks at the held-out data; there is one at the end.
    evaluate_every: int = 1
    #: Of the head, order, crops, mixing and dropout.
    seed: int = 0
    #: Processes that decode images for each training process; 0 decodes in this one.
    workers: int = 0
    #: auto, cpu, cuda or cuda:N.
    device: str = "auto"
    #: bf16 and fp16: autocast; parameters stay float32. fp16 scales the loss against underflow.
    precision: Precision = "fp32"
    checkpoints: CheckpointChoices = field(default_factory=CheckpointChoices)
    #: auto: the newest checkpoint in --out that is whole, if there is one; or a checkpoint's folder.
    resume: Literal["auto"] | Path = "auto"
    #: Steps between logs.
    log_every: int = 10
    #: Also tell Weights & Biases or Trackio; metrics.jsonl and TensorBoard are always there.
    tracker: TrackerName = "none"

    def recipe(self, model: MAGEConfig) -> FinetuneRecipe:
        """The recipe for a model's size with what was given in place.

        Raises:
            InputError: numbers out of range.
        """
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(FinetuneRecipe)}
        least = next(width for width in RECIPES if model.encoder_width >= width)
        changes = {name: value for name, value in given.items() if value is not None}
        recipe = dataclasses.replace(RECIPES[least], **changes)
        if min(recipe.epochs, recipe.batch_size) < 1 or not 0 <= recipe.warmup_epochs <= recipe.epochs:
            raise InputError(
                f"finetune: epochs {recipe.epochs}, warmup_epochs {recipe.warmup_epochs}, batch_size "
                f"{recipe.batch_size}: wanted 0 <= warmup_epochs <= epochs and the others 1 or more"
            )
        for name, value, least_value in (
            *(("base_lr", recipe.base_lr, 0), ("min_lr", self.min_lr, 0)),
            *(("weight_decay", self.weight_decay, 0), ("label_smoothing", self.label_smoothing, 0)),
            *(("mixup", recipe.mixup, 0), ("cutmix", recipe.cutmix, 0)),
            *(("accumulate", self.accumulate, 1), ("evaluate_every", self.evaluate_every, 1)),
            *(("seed", self.seed, 0), ("workers", self.workers, 0)),
            *(("log_every", self.log_every, 1), ("checkpoints.every", self.checkpoints.every or 1, 1)),
        ):
            if not least_value <= value < math.inf:
                raise InputError(f"finetune: {name} is {value}, wanted {least_value} or more")
        if self.label_smoothing > 1:
            raise InputError(f"finetune: label_smoothing is {self.label_smoothing}, wanted at most 1")
        return recipe

    def settings(self, recipe: FinetuneRecipe) -> dict[str, Any]:
        """What must not change when a run goes on: all that decides its numbers."""
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}
        return kept | dataclasses.asdict(recipe)


#: Settings that may change when a run goes on; of the model, its place. Another number of micro-batches mixes
#: and drops otherwise.
FREE = (
    *("model", "test_data", "out", "accumulate", "evaluate_every", "workers", "device"),
    *("checkpoints", "resume", "log_every", "tracker"),
)
