"""What ``mage-fast pretrain`` can be told, and the paper's recipes by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mage_fast.errors import InputError
from mage_fast.training.distributed import Parallel
from mage_fast.training.precision import Precision
from mage_fast.training.trackers import TrackerName


@dataclass(frozen=True)
class Recipe:
    """What a preset sets where the command line does not."""

    epochs: int
    warmup_epochs: int
    batch_size: int
    #: For a batch of 256.
    base_lr: float
    augment: str


@dataclass(frozen=True)
class ModelChoices:
    """What a user may choose of a model beside its size, see :class:`mage_fast.MAGEConfig`."""

    #: paper: the encoder sees half of the tokens, some of them as [M]. unmasked: only unmasked tokens.
    encoder_tokens: Literal["paper", "unmasked"] = "paper"
    #: features: the tokenizer's features before they are quantized, for images only (table 6).
    encoder_input: Literal["tokens", "features"] = "tokens"
    #: What stands at masked positions of the decoder's input.
    padding: Literal["class_token", "mask_token"] = "class_token"
    #: One mask ratio a batch (the paper) or a sample.
    ratio_per: Literal["batch", "sample"] = "batch"
    #: Mode of the truncated normal law of the mask ratio.
    mask_ratio_mode: float = 0.55
    #: Its standard deviation; 0 always masks the mode.
    mask_ratio_std: float = 0.25
    #: Its lower bound.
    mask_ratio_min: float = 0.5
    #: Its upper bound.
    mask_ratio_max: float = 1.0
    #: Part of the tokens the encoder does not see; at most the lowest mask ratio.
    drop_ratio: float = 0.5
    #: Drop probability; the preset's without (vit_b 0.1, small 0).
    dropout: float | None = None
    #: Part of the target spread over the codebook.
    label_smoothing: float = 0.1
    #: With --conditional: part of the labels replaced by no label, for classifier-free guidance.
    label_dropout: float = 0.1


@dataclass(frozen=True)
class ContrastiveChoices:
    """MAGE-C (section 3.1 of the paper), see :class:`mage_fast.MAGEC`."""

    #: Train MAGE-C: two views of each image, reconstructed and contrasted.
    enabled: bool = False
    #: Lambda of equation 3.
    weight: float = 0.1
    #: Tau of equation 2.
    temperature: float = 0.2


@dataclass(frozen=True)
class ProcessChoices:
    """How the processes that torchrun starts share the work; one alone has nothing to share."""

    #: ddp: each has all parameters. fsdp: each keeps a part of them (FSDP2).
    parallel: Parallel = "ddp"
    #: Micro-batches that each computes one after the other before an optimizer step.
    accumulate: int = 1
    #: Seconds that a process is waited for before the run is given up; the first one looks and saves in them.
    timeout: float = 1800.0


@dataclass(frozen=True)
class CheckpointChoices:
    """When states are written, and which of them stay."""

    #: Seconds between checkpoints.
    every_seconds: float = 600.0
    #: Steps between checkpoints, beside those by time.
    every: int | None = None
    #: How many of the newest stay.
    keep_last: int = 2
    #: Checkpoints of steps that are multiples of this stay for ever.
    keep_every: int | None = None
    #: Each process writes its own part, with FSDP2; else the first writes one file.
    sharded: bool = False


@dataclass(frozen=True)
class WatchChoices:
    """Looks at the model while it trains."""

    #: Epochs between two looks; without, none.
    every_epochs: int | None = None
    #: Samples along a side of a look's picture; 0 makes none.
    columns: int = 4
    #: Classifier on frozen features of labelled data: weighted k nearest neighbours, or a linear one.
    probe: Literal["none", "knn", "linear"] = "none"
    #: Where its data is, with a train and a test split; the training's without.
    data: str | None = None


#: vit_b and vit_l as in the paper's section 4.1.
RECIPES = {
    "vit_b": Recipe(1600, 80, 4096, 1.5e-4, "strong"),
    "vit_l": Recipe(1600, 80, 2048, 1.5e-4, "strong"),
    "vit_h": Recipe(1600, 80, 2048, 1.5e-4, "strong"),
    "small": Recipe(70, 2, 64, 8e-3, "weak"),
}


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train MAGE. The same command resumes a run that stopped; Ctrl-C or SIGTERM saves it first."""

    #: Where the data is: digits, folder:PATH, webdataset:PATH, hf:NAME[:SPLIT], tokens:PATH (a token cache).
    data: str = "digits"
    #: train leaves out what the data holds out, without a split of its own a fifth of it; all does not.
    split: Literal["train", "all"] = "train"
    #: A tokenizer's folder, a model's folder, or a published .pth.
    tokenizer: Path = Path("out/tokenizer")
    #: Folder of the run: checkpoints, logs, pictures and, at the end, the model.
    out: Path = Path("out/pretrain")
    #: Size of the model, and the recipe for what is not given below. vit_b and vit_l are the paper's.
    preset: Literal["vit_b", "vit_l", "vit_h", "small"] = "small"
    #: Masking, padding and regularisation; the paper's by default.
    model: ModelChoices = field(default_factory=ModelChoices)
    contrastive: ContrastiveChoices = field(default_factory=ContrastiveChoices)
    #: Train with the data's labels: a class can then be asked for, and guided towards.
    conditional: bool = False
    #: Start from the weights of this model's folder or published .pth; its class slots may be others.
    init: Path | None = None
    #: Passes over the data; the preset's without (vit_b 1600, small 70).
    epochs: int | None = None
    #: Epochs in which the learning rate rises; the preset's without (vit_b 80, small 2).
    warmup_epochs: int | None = None
    #: Images a step over all processes; without, the preset's (vit_b 4096, small 64) or all there are.
    batch_size: int | None = None
    #: Learning rate for a batch of 256, it scales with the batch; the preset's without (vit_b 1.5e-4).
    base_lr: float | None = None
    #: Of matrices; biases and norms have none.
    weight_decay: float = 0.05
    #: Largest norm of the gradient.
    clip_norm: float = 3.0
    #: strong (the paper), weak, weak-no-flip, window or eval; the preset's without. Token caches have theirs.
    augment: str | None = None
    #: Also keep a moving average of the weights, of this decay a step (0.9999 for long runs).
    ema_decay: float | None = None
    #: Of weights, order, crops, masks and dropout.
    seed: int = 0
    #: Processes that decode images for each training process; 0 decodes in this one.
    workers: int = 0
    #: gpu: JPEG files are decoded, cropped and resized on the GPU (the extra gpu-decode), not in the workers.
    decode: Literal["cpu", "gpu"] = "cpu"
    #: auto, cpu, cuda or cuda:N.
    device: str = "auto"
    #: bf16 and fp16: autocast; parameters stay float32. fp16 scales the loss against underflow.
    precision: Precision = "fp32"
    #: On CUDA: capture the step in a few graphs and replay them, which spares the host's time.
    graph: bool = False
    processes: ProcessChoices = field(default_factory=ProcessChoices)
    #: Steps in a row whose gradients are not finite, and which change nothing, before the run stops.
    max_skipped: int = 20
    checkpoints: CheckpointChoices = field(default_factory=CheckpointChoices)
    #: auto: the newest checkpoint in --out that is whole, if there is one; or a checkpoint's folder.
    resume: Literal["auto"] | Path = "auto"
    #: Steps between logs.
    log_every: int = 10
    #: Also tell Weights & Biases or Trackio; metrics.jsonl and TensorBoard are always there.
    tracker: TrackerName = "none"
    watch: WatchChoices = field(default_factory=WatchChoices)

    def recipe(self) -> Recipe:
        """The preset's recipe with what was given in place.

        Raises:
            InputError: numbers out of range, choices that exclude each other.
        """
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)}
        changes = {name: value for name, value in given.items() if value is not None}
        recipe = dataclasses.replace(RECIPES[self.preset], **changes)
        if min(recipe.epochs, recipe.batch_size) < 1 or not 0 <= recipe.warmup_epochs <= recipe.epochs:
            raise InputError(
                f"pretrain: epochs {recipe.epochs}, warmup_epochs {recipe.warmup_epochs}, batch_size "
                f"{recipe.batch_size}: wanted 0 <= warmup_epochs <= epochs and the others 1 or more"
            )
        for name, value in (
            ("processes.accumulate", self.processes.accumulate),
            ("processes.timeout", self.processes.timeout),
            ("max_skipped", self.max_skipped),
            ("log_every", self.log_every),
            ("watch.every_epochs", self.watch.every_epochs),
            ("checkpoints.every", self.checkpoints.every),
        ):
            if value is not None and not value >= 1:
                raise InputError(f"pretrain: {name} is {value}, wanted 1 or more")
        if self.graph and self.processes.accumulate > 1:
            raise InputError(
                f"pretrain: graph with processes.accumulate {self.processes.accumulate}, wanted 1: a graph "
                "holds a whole step"
            )
        if self.contrastive.enabled and self.processes.accumulate > 1:
            raise InputError(
                f"pretrain: contrastive with processes.accumulate {self.processes.accumulate}, wanted 1: "
                "images are contrasted with those computed at the same time"
            )
        return recipe

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """What must not change when a run goes on: all that decides its numbers."""
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}
        return kept | dataclasses.asdict(recipe) | {"init": None if self.init is None else str(self.init)}


#: Settings that may change when a run goes on. Another number of micro-batches draws other masks.
FREE = (
    *("tokenizer", "out", "workers", "decode", "device", "graph", "processes", "max_skipped"),
    *("checkpoints", "resume", "log_every", "tracker", "watch"),
)
