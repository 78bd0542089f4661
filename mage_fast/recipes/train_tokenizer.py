"""``mage-fast train-tokenizer``: train a VQGAN of any size on any image source, from scratch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mage_fast.config import TokenizerConfig
from mage_fast.errors import InputError
from mage_fast.recipes.loading import Precision
from mage_fast.recipes.pictures import write_grid
from mage_fast.recipes.tokenizer_trainer import Trainer, evaluate
from mage_fast.storage import CONFIG_NAME, WEIGHTS_NAME
from mage_fast.training.augment import named
from mage_fast.training.data import open_source, steps_per_epoch, training_batches
from mage_fast.training.logs import RunLogger
from mage_fast.training.loop import train
from mage_fast.training.perceptual import PerceptualDistance
from mage_fast.training.run import Run, pick_device

GRID_NAME = "reconstructions.png"
#: For small images, trained in minutes without a GPU.
SMALL = TokenizerConfig(
    image_size=24,
    codebook_size=64,
    codebook_dim=16,
    base_width=16,
    width_multipliers=(1, 1, 2),
    blocks_per_level=1,
    norm_groups=8,
)

DEFAULT_BATCH = 64
#: Settings that may change when a run goes on.
FREE = ("out", "device", "workers", "log_every", "save_every")


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a VQGAN tokenizer. The same command again goes on where it stopped."""

    #: Images: digits, folder:PATH, webdataset:PATH or hf:NAME[:SPLIT].
    data: str = "digits"
    #: Folder of the run and, when it is done, of the tokenizer.
    out: Path = Path("out/tokenizer")
    #: Size of the tokenizer; the published one has 256-pixel images, see the options.
    model: TokenizerConfig = SMALL
    #: Training steps.
    steps: int = 400
    #: Images a step; without, 64 or all there are.
    batch_size: int | None = None
    #: Highest learning rate; it falls to 0 along a cosine.
    lr: float = 2e-3
    #: Steps in which the learning rate rises from 0.
    warmup_steps: int = 0
    #: AdamW's weight decay of convolution weights; codes have none.
    weight_decay: float = 0.0
    #: AdamW's betas, also the discriminator's.
    betas: tuple[float, float] = (0.9, 0.95)
    #: Weight of the squared distance from features to their codes.
    commitment_weight: float = 0.25
    #: Codes follow a moving average of their features, or a loss moves them.
    codebook: Literal["ema", "loss"] = "ema"
    #: Decay a step of the moving averages: of how often a code is used and, in mode ema, of its features.
    ema_decay: float = 0.99
    #: A code that gets fewer features a batch (moving average) restarts at a random feature; 0: never.
    #: Keep it well under batch_size * tokens / codebook_size, what a code gets on average.
    dead_below: float = 0.5
    #: Weight of the LPIPS distance; needs the extra lpips.
    perceptual_weight: float = 0.0
    #: Weight of the adversarial loss, beside the adaptive one; 0: no discriminator.
    adversarial_weight: float = 0.0
    #: Step at which the discriminator and its loss set in.
    adversarial_start: int = 0
    #: Channels of the discriminator's first layer.
    discriminator_width: int = 64
    #: Crops and flips: eval (centre crop), weak, weak-no-flip or strong.
    augment: str = "eval"
    #: Data-loading processes; 0 loads in this one.
    workers: int = 0
    #: Of weights, order, crops and revived codes.
    seed: int = 0
    #: auto, cpu, cuda or cuda:N.
    device: str = "auto"
    #: bf16: convolutions under autocast; losses, codebook and parameters stay in float32.
    precision: Precision = "fp32"
    #: Steps between logs.
    log_every: int = 10
    #: Steps between saves; beside that every ten minutes.
    save_every: int = 1000

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "log_every", "save_every", "discriminator_width")
        others = (
            *("lr", "weight_decay", "commitment_weight", "perceptual_weight", "adversarial_weight"),
            *("adversarial_start", "workers", "seed"),
        )
        limits = dict.fromkeys(positive, (1, math.inf)) | dict.fromkeys(others, (0, math.inf))
        limits["warmup_steps"] = (0, self.steps)
        for name, (low, high) in limits.items():
            got = getattr(self, name)
            if got is not None and not low <= got <= high:
                wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise InputError(f"train-tokenizer: {name} is {got}, wanted {wanted}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"train-tokenizer: betas is {self.betas}, wanted 0 <= beta < 1")
        for name, values in (("codebook", ("ema", "loss")), ("precision", ("fp32", "bf16"))):
            if (given := getattr(self, name)) not in values:
                raise InputError(f"train-tokenizer: {name} is {given!r}, wanted one of {values}")
        named(self.augment)


def run(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Train, or go on, until ``config.steps``; write the tokenizer and measure it on the held-out split.

    ``config.out`` holds the run's ``checkpoints``, ``metrics.jsonl`` and TensorBoard events, and in the
    end ``config.json`` and ``model.safetensors`` (:meth:`VQGAN.from_pretrained` reads them) and
    ``reconstructions.png``, pairs of held-out images and their reconstructions. A finished run returns its
    metrics again. A function of the configuration: where a run was interrupted changes no bit on a CPU.

    Returns:
        ``folder`` (str), ``steps`` done, ``stopped_by`` (a signal's name or None) and, of a finished run,
        ``psnr_db``, ``codes_used``, ``perplexity``, ``images`` of the held-out split.

    Raises:
        InputError: a setting or the data is wrong, or the folder holds something else; before any work.
        TrainingError: the loss is not finite; the last good state stays.
    """
    device = pick_device(config.device)
    trainer = Trainer(config, device)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    state = Run(config.out, {"recipe": "train-tokenizer", **settings}, **trainer.parts)
    state.refuse_others()
    start = state.resume()
    about = {"folder": str(config.out), "steps": config.steps, "stopped_by": None}
    files = (config.out / name for name in (CONFIG_NAME, WEIGHTS_NAME, GRID_NAME))
    if start == config.steps and all(file.exists() for file in files) and state.extra:
        return about | state.extra

    size = config.model.image_size
    source, held_out = (open_source(config.data, image_size=size, split=s) for s in ("train", "test"))
    if source.kind != "images":
        raise InputError(f"data is {config.data!r}, wanted images: a tokenizer learns from pixels")
    batch_size = config.batch_size or min(DEFAULT_BATCH, len(source))
    steps_per_epoch(source, batch_size)
    if config.perceptual_weight > 0:
        trainer.perceptual = PerceptualDistance().to(device)

    with RunLogger(
        config.out, config.steps, "tokenizer", start_step=start, samples_per_step=batch_size
    ) as logger:
        logger.resumed()
        result = train(
            trainer.step,
            total_steps=config.steps,
            batches_from=lambda step: training_batches(
                source,
                batch_size,
                step=step,
                seed=config.seed,
                augment=config.augment,
                workers=config.workers,
                pin_memory=device.type == "cuda",
            ),
            save=state.save,
            logger=logger,
            start_step=start,
            log_every=config.log_every,
            save_every_steps=config.save_every,
            finite=("loss", "gradient_norm"),
        )
        if result.stopped_by:
            return about | {"steps": result.step, "stopped_by": result.stopped_by}
        metrics, pairs = evaluate(trainer.model, held_out, batch_size, config.workers)
        write_grid(pairs, config.out / GRID_NAME, columns=8)
        trainer.model.save_pretrained(config.out)
        state.save(config.steps, extra=metrics)
        logger.message(
            f"held-out PSNR {metrics['psnr_db']:.2f} dB, {metrics['codes_used']} of "
            f"{config.model.codebook_size} codes in use; the tokenizer is in {config.out}"
        )
    return about | metrics
