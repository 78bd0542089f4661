"""``mage-fast pretrain``: the paper's pre-training (section 4.1) on images or cached tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.model import MAGE
from mage_fast.recipes.loading import load_tokenizer, preset
from mage_fast.recipes.pictures import loss_curve, read_metrics, write_grid
from mage_fast.sampler import SamplerConfig, generate
from mage_fast.tokenizer import VQGAN
from mage_fast.training.data import Batch, open_source, steps_per_epoch, training_batches
from mage_fast.training.logs import METRICS_FILE, RunLogger
from mage_fast.training.loop import train
from mage_fast.training.memory import keep_freed_memory
from mage_fast.training.optim import build_adamw
from mage_fast.training.precision import Precision
from mage_fast.training.run import Run, pick_device
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.schedule import cosine_lr, scaled_lr, set_lr
from mage_fast.training.sources import TokenSource
from mage_fast.training.step import TrainStep

SAMPLES = "samples.png"
#: Settings that may change when a run goes on.
FREE = ("tokenizer", "out", "workers", "device", "graph", "log_every", "save_every_seconds")


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


#: vit_b and vit_l as in the paper's section 4.1.
RECIPES = {
    "vit_b": Recipe(1600, 80, 4096, 1.5e-4, "strong"),
    "vit_l": Recipe(1600, 80, 2048, 1.5e-4, "strong"),
    "vit_h": Recipe(1600, 80, 2048, 1.5e-4, "strong"),
    "small": Recipe(70, 2, 64, 8e-3, "weak"),
}


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train MAGE. The same command resumes a run that stopped; Ctrl-C saves it first."""

    #: Where the data is: digits, folder:PATH, tokens:PATH (a token cache) or hf:NAME[:SPLIT].
    data: str = "digits"
    #: A tokenizer's folder, a model's folder, or a published .pth.
    tokenizer: Path = Path("out/tokenizer")
    #: Folder of the run: state, logs, pictures and, at the end, the model.
    out: Path = Path("out/pretrain")
    #: Size of the model, and the recipe for what is not given below. vit_b and vit_l are the paper's.
    preset: Literal["vit_b", "vit_l", "vit_h", "small"] = "small"
    #: Masking, padding and regularisation; the paper's by default.
    model: ModelChoices = field(default_factory=ModelChoices)
    #: Passes over the data; the preset's without (vit_b 1600, small 70).
    epochs: int | None = None
    #: Epochs in which the learning rate rises; the preset's without (vit_b 80, small 2).
    warmup_epochs: int | None = None
    #: Images a step; without, the preset's (vit_b 4096, small 64) or all there are.
    batch_size: int | None = None
    #: Learning rate for a batch of 256, it scales with the batch; the preset's without (vit_b 1.5e-4).
    base_lr: float | None = None
    #: Of matrices; biases and norms have none.
    weight_decay: float = 0.05
    #: Largest norm of the gradient.
    clip_norm: float = 3.0
    #: strong (the paper), weak, weak-no-flip, window or eval; the preset's without. Token caches have theirs.
    augment: str | None = None
    #: Of weights, order, crops, masks and dropout.
    seed: int = 0
    #: Processes that decode images; 0 decodes in this one.
    workers: int = 0
    #: auto, cpu, cuda or cuda:N.
    device: str = "auto"
    #: bf16 and fp16: autocast; parameters stay float32. fp16 scales the loss against underflow.
    precision: Precision = "fp32"
    #: On CUDA: capture the step in a few graphs and replay them, which spares the host's time.
    graph: bool = False
    #: Steps between logs.
    log_every: int = 10
    save_every_seconds: float = 600.0

    def recipe(self) -> Recipe:
        """The preset's recipe with what was given in place.

        Raises:
            InputError: numbers out of range.
        """
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)}
        changes = {name: value for name, value in given.items() if value is not None}
        recipe = dataclasses.replace(RECIPES[self.preset], **changes)
        if min(recipe.epochs, recipe.batch_size) < 1 or not 0 <= recipe.warmup_epochs <= recipe.epochs:
            raise InputError(
                f"pretrain: epochs {recipe.epochs}, warmup_epochs {recipe.warmup_epochs}, batch_size "
                f"{recipe.batch_size}: wanted 0 <= warmup_epochs <= epochs and the others 1 or more"
            )
        return recipe


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train to the end or to a stop; returns steps, the first and last logged loss, and the folder.

    Raises:
        InputError: an unknown source, a cache of another tokenizer, a folder that holds another run.
        TrainingError: the loss is not finite.
    """
    recipe = config.recipe()
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(config.tokenizer, device)
    choices = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    sizes = preset(config.preset, tokenizer, **choices)
    source = open_source(config.data, image_size=tokenizer.config.image_size)
    fingerprint = module_fingerprint(tokenizer)
    if isinstance(source, TokenSource):
        _check_cache(source, tokenizer, fingerprint)
    if config.batch_size is None and len(source) < recipe.batch_size:
        recipe = dataclasses.replace(recipe, batch_size=len(source))
    highest_lr = scaled_lr(recipe.base_lr, recipe.batch_size)
    steps_an_epoch = steps_per_epoch(source, recipe.batch_size)
    total_steps, warmup_steps = steps_an_epoch * recipe.epochs, steps_an_epoch * recipe.warmup_epochs

    torch.manual_seed(config.seed)
    model = MAGE(sizes, tokenizer).to(device)
    optimizer = build_adamw(model, highest_lr, weight_decay=config.weight_decay)
    train_step = TrainStep(
        model, optimizer, clip_norm=config.clip_norm, precision=config.precision, graph=config.graph
    )
    scaled = {} if train_step.loss_scale is None else {"loss_scale": train_step.loss_scale}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    folder = Run(
        config.out,
        settings
        | dataclasses.asdict(recipe)
        | {"model": sizes.to_dict(), "tokenizer_fingerprint": fingerprint},
        model=model,
        optimizer=optimizer,
        **scaled,
    )
    start_step = folder.resume()

    def step_fn(batch: Batch, step: int) -> dict[str, Any]:
        lr = cosine_lr(step, total_steps=total_steps, warmup_steps=warmup_steps, base_lr=highest_lr)
        set_lr(optimizer, lr)
        return train_step(batch.inputs, rng_state=rng.new_state(config.seed, step)) | {"lr": lr}

    model.train()
    with RunLogger(
        config.out, total_steps, "pretrain", start_step=start_step, samples_per_step=recipe.batch_size
    ) as logger:
        if start_step:
            logger.message(f"{config.out}: resumed after step {start_step} of {total_steps}")
        result = train(
            step_fn,
            total_steps=total_steps,
            batches_from=lambda step: training_batches(
                source,
                recipe.batch_size,
                step=step,
                seed=config.seed,
                augment=recipe.augment,
                workers=config.workers,
                pin_memory=device.type == "cuda",
            ),
            save=folder.save,
            logger=logger,
            start_step=start_step,
            log_every=config.log_every,
            save_every_seconds=config.save_every_seconds,
            # a loss scale skips steps whose gradients overflow
            finite=("loss",) if scaled else ("loss", "gradient_norm"),
        )
    finished_before = start_step == total_steps and (config.out / SAMPLES).exists()
    if result.step == total_steps and not finished_before:
        _finish(model, config)
    losses = [line["loss"] for line in read_metrics(config.out / METRICS_FILE)]
    return {
        "steps": result.step,
        "total_steps": total_steps,
        "stopped_by": result.stopped_by,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "out": str(config.out),
    }


def _check_cache(source: TokenSource, tokenizer: VQGAN, fingerprint: str) -> None:
    if source.cache.tokenizer_fingerprint != fingerprint:
        raise InputError(
            f"{source.spec} was made by another tokenizer than the one given "
            f"({source.cache.tokenizer_fingerprint[:12]} and not {fingerprint[:12]})"
        )
    if source.cache.length != tokenizer.grid_size**2:
        raise InputError(
            f"{source.spec} has {source.cache.length} tokens an image, the tokenizer {tokenizer.grid_size**2}"
        )


def _finish(model: MAGE, config: PretrainConfig) -> None:
    """The trained model, a picture of the loss and, last, one of samples."""
    model.eval().save_pretrained(config.out)
    loss_curve(config.out / METRICS_FILE, config.out / "loss.png")
    write_grid(generate(model, 16, config=SamplerConfig(), seed=config.seed), config.out / SAMPLES)
