"""``mage-fast pretrain``: the paper's pre-training (section 4.1), on one device or many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from mage_fast.config import MAGEConfig
from mage_fast.contrastive import MAGEC
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.recipes.loading import fitting_batch_size, load_tokenizer, preset
from mage_fast.recipes.pictures import curves, loss_curve, read_metrics, write_grid
from mage_fast.recipes.pretrain_config import (
    FREE,
    RECIPES,
    CheckpointChoices,
    ContrastiveChoices,
    ModelChoices,
    PretrainConfig,
    ProcessChoices,
    Recipe,
    WatchChoices,
)
from mage_fast.sampler import SamplerConfig, generate
from mage_fast.tokenizer import VQGAN
from mage_fast.training.checkpoints import Checkpoints
from mage_fast.training.data import Batch, open_source, steps_per_epoch
from mage_fast.training.device_augment import NvImageCodec
from mage_fast.training.distributed import Processes, parallelized, torchrun_processes, whole_model
from mage_fast.training.initialize import initialize_from
from mage_fast.training.logs import METRICS_FILE, RunLogger
from mage_fast.training.loop import Skips, train
from mage_fast.training.memory import keep_freed_memory
from mage_fast.training.micro_batches import step_batches, with_random_states
from mage_fast.training.optim import Ema, build_adamw
from mage_fast.training.precision import autocast
from mage_fast.training.run import CHECKPOINTS, Run, pick_device
from mage_fast.training.run_state import Part, module_fingerprint
from mage_fast.training.schedule import cosine_lr, scaled_lr, set_lr
from mage_fast.training.sources import TokenSource
from mage_fast.training.step import TrainStep
from mage_fast.training.throughput import Throughput, flops_per_image, peak_flops
from mage_fast.training.trackers import open_tracker
from mage_fast.training.watch import OnlineProbe, Watch

__all__ = [
    "FREE",
    "RECIPES",
    "CheckpointChoices",
    "ContrastiveChoices",
    "ModelChoices",
    "PretrainConfig",
    "ProcessChoices",
    "Recipe",
    "WatchChoices",
    "run",
]

SAMPLES, CURVES = "samples.png", "curves.png"
#: Folder of the averaged model, in the run's.
AVERAGE = "ema"


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train to the end or to a stop; returns steps, the first and last logged loss, and the folder.

    Started by torchrun, each process trains a share of each batch; the first one logs, saves and returns what
    was said, the others only what stopped them.

    Raises:
        InputError: an unknown source, a cache of another tokenizer, a folder that holds another run.
        TrainingError: the loss is not finite, too many steps were skipped, a process is lost.
    """
    recipe = config.recipe()
    with torchrun_processes(pick_device(config.device), config.processes.timeout) as processes:
        if processes.device.type == "cpu":
            keep_freed_memory()
        return _Pretraining(config, recipe, processes).run()


class _Pretraining:
    """One process's part of a run."""

    def __init__(self, config: PretrainConfig, recipe: Recipe, processes: Processes) -> None:
        self.config, self.processes, device = config, processes, processes.device
        tokenizer = load_tokenizer(config.tokenizer, device)
        size = tokenizer.config.image_size
        self.source = open_source(config.data, image_size=size, split=config.split)
        fingerprint = module_fingerprint(tokenizer)
        if isinstance(self.source, TokenSource):
            _check_cache(self.source, tokenizer, fingerprint)
        self.views = 2 if config.contrastive.enabled else 1
        self.source.require_views(self.views)
        self.decoder = None if config.decode == "cpu" else NvImageCodec(device)
        self.split = processes.count * config.processes.accumulate
        fitting = fitting_batch_size(
            *("pretrain", self.source, config.batch_size, recipe.batch_size),
            *(processes, config.processes.accumulate),
        )
        recipe = dataclasses.replace(recipe, batch_size=fitting)
        self.recipe, self.highest_lr = recipe, scaled_lr(recipe.base_lr, recipe.batch_size)
        self.steps_an_epoch = steps_per_epoch(self.source, recipe.batch_size)
        self.total_steps = self.steps_an_epoch * recipe.epochs
        self.sizes = self._sizes(tokenizer)
        if self.sizes.encoder_input == "features":
            self._check_features()

        torch.manual_seed(config.seed)
        self.model = self._model(tokenizer).to(device)
        starts = config.resume == "auto" and not Checkpoints(config.out / CHECKPOINTS).paths()
        if config.init is not None and starts:
            initialize_from(self.model, config.init)
        parallel = parallelized(self.model, processes, config.processes.parallel)
        self.optimizer = build_adamw(self.model, self.highest_lr, weight_decay=config.weight_decay)
        self.ema = None if config.ema_decay is None else Ema(self.model, config.ema_decay)
        self.step = TrainStep(
            self.model,
            self.optimizer,
            clip_norm=config.clip_norm,
            precision=config.precision,
            ema=self.ema,
            graph=config.graph,
            parallel=parallel,
        )
        parts: dict[str, Part] = {"model": self.model, "optimizer": self.optimizer}
        parts |= {} if self.step.loss_scale is None else {"loss_scale": self.step.loss_scale}
        parts |= {} if self.ema is None else {"ema": self.ema}
        choices = config.checkpoints
        self.folder = Run(
            config.out,
            config.settings(recipe) | {"model": self.sizes.to_dict(), "tokenizer_fingerprint": fingerprint},
            Checkpoints(
                config.out / CHECKPOINTS,
                keep_last=choices.keep_last,
                keep_every=choices.keep_every,
                sharded=choices.sharded,
            ),
            **parts,
        )

    def _sizes(self, tokenizer: VQGAN) -> MAGEConfig:
        choices = {k: v for k, v in dataclasses.asdict(self.config.model).items() if v is not None}
        sizes = preset(self.config.preset, tokenizer, **choices)
        if not self.config.conditional:
            return sizes
        if self.source.num_classes < 2:
            raise InputError(
                f"pretrain: conditional, but {self.source.spec} has no labels, wanted two or more"
            )
        return sizes.for_classes(self.source.num_classes)

    def _check_features(self) -> None:
        if self.source.kind != "images":
            raise InputError(f'pretrain: encoder_input is "features", but {self.source.spec} has tokens only')
        if self.config.watch.every_epochs is not None:
            raise InputError(
                'pretrain: encoder_input is "features", which neither samples nor reads tokens: '
                "watch.every_epochs wants another"
            )

    def _model(self, tokenizer: VQGAN) -> MAGE:
        choices = self.config.contrastive
        if not choices.enabled:
            return MAGE(self.sizes, tokenizer)
        weights = {"contrastive_weight": choices.weight, "temperature": choices.temperature}
        return MAGEC(self.sizes, tokenizer, **weights)

    def run(self) -> dict[str, Any]:
        config, processes = self.config, self.processes
        tracker = open_tracker(config.tracker, config=self.folder.settings) if processes.is_main else None
        start_step = self.folder.resume(config.resume)
        watch = self._watch()
        self.model.train()
        tokenizes = self.source.kind == "images"
        throughput = Throughput(
            self.recipe.batch_size,
            flops_per_image=self.views * flops_per_image(self.sizes, tokenizes=tokenizes),
            peak_flops=peak_flops(processes.device, config.precision, processes.count),
            device=processes.device,
        )
        with ExitStack() as stack:
            logger = None
            if processes.is_main:
                logger = stack.enter_context(
                    RunLogger(
                        config.out, self.total_steps, "pretrain", start_step=start_step, tracker=tracker
                    )
                )
                logger.resumed(self._other_split())
            if watch is not None:
                watch.logger = logger
            result = train(
                self._train_step,
                total_steps=self.total_steps,
                batches_from=self._batches,
                save=lambda step: self.folder.save(step, {"micro_batches": self.split}),
                logger=logger,
                start_step=start_step,
                log_every=config.log_every,
                save_every_steps=config.checkpoints.every,
                save_every_seconds=config.checkpoints.every_seconds,
                skips=Skips(most_in_a_row=config.max_skipped),
                throughput=throughput,
                evaluation=watch,
                processes=processes,
            )
        bad_files = self._bad_files()
        last = SAMPLES if self.sizes.encoder_input == "tokens" else CURVES
        finished_before = start_step == self.total_steps and (config.out / last).exists()
        if result.step == self.total_steps and not finished_before:
            self._finish(watch)
        if not processes.is_main:
            return {"stopped_by": result.stopped_by}
        losses = [line["loss"] for line in read_metrics(config.out / METRICS_FILE)]
        return {
            "steps": result.step,
            "total_steps": self.total_steps,
            "stopped_by": result.stopped_by,
            "skipped_steps": result.skipped,
            "bad_files": bad_files,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "out": str(config.out),
        }

    def _train_step(self, batches: list[Batch], step: int) -> Mapping[str, Any]:
        config, processes = self.config, self.processes
        lr = cosine_lr(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.steps_an_epoch * self.recipe.warmup_epochs,
            base_lr=self.highest_lr,
        )
        set_lr(self.optimizer, lr)
        micro_batches = with_random_states(
            batches, seed=config.seed, step=step, processes=processes, labelled=config.conditional
        )
        return self.step.accumulate(micro_batches) | {"lr": lr}

    def _batches(self, step: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step from one on."""
        config = self.config
        return step_batches(
            self.source,
            self.recipe.batch_size,
            step=step,
            accumulate=config.processes.accumulate,
            processes=self.processes,
            views=self.views,
            seed=config.seed,
            augment=self.recipe.augment,
            workers=config.workers,
            decoder=self.decoder,
        )

    def _other_split(self) -> str:
        """What a run resumed with other micro-batches than before is told."""
        before = self.folder.extra.get("micro_batches", self.split)
        if before == self.split:
            return ""
        return f"; {self.split} micro-batches a step draw other masks than the {before} before"

    def _bad_files(self) -> int:
        """Damaged files that any process has met; each names its own."""
        return int(self.processes.sum([float(len(self.source.bad_files))])[0])

    def _watch(self) -> _Looks | None:
        choices = self.config.watch
        if choices.every_epochs is None:
            return None
        probe = None
        if choices.probe != "none" and self.processes.is_main:
            spec, size = choices.data or self.config.data, self.source.image_size
            train = self.source  # opening it reads every name, of shards every header
            if (spec, self.config.split) != (self.config.data, "train"):
                train = open_source(spec, image_size=size, split="train")
            test = open_source(spec, image_size=size, split="test")
            probe = OnlineProbe(self.model, choices.probe, train, test, workers=self.config.workers)
        labels = range(min(self.source.num_classes, 10)) if self.config.conditional else None
        every = choices.every_epochs * self.steps_an_epoch
        watch = Watch(self.model, self.config.out, every, columns=choices.columns, labels=labels, probe=probe)
        return _Looks(watch, self)

    def _finish(self, watch: _Looks | None) -> None:
        """The trained model, its average, pictures of the metrics and, last, one of samples."""
        out = self.config.out
        with whole_model(self.model, self.processes) as model:
            if model is not None:
                model.eval().save_pretrained(out)
        with whole_model(self.model, self.processes, self.ema) as model:
            if model is None:
                return
            if self.ema is not None:
                model.eval().save_pretrained(out / AVERAGE)
            if watch is not None:
                watch.watch.write_progress(self.total_steps)
            loss_curve(out / METRICS_FILE, out / "loss.png")
            curves(out / METRICS_FILE, out / CURVES)
            if self.sizes.encoder_input != "tokens":
                return  # it reads images only, and generates none
            labels_B = None
            if self.config.conditional:
                labels_B = torch.arange(16) % self.source.num_classes
            samples = generate(model, 16, labels_B=labels_B, config=SamplerConfig(), seed=self.config.seed)
            write_grid(samples, out / SAMPLES)


class _Looks:
    """A :class:`Watch` at the averaged weights if there are any, in the first process; the others wait."""

    def __init__(self, watch: Watch, training: _Pretraining) -> None:
        self.watch, self.training = watch, training
        self.every_steps = watch.every_steps
        self.logger: RunLogger | None = None

    def __call__(self, step: int) -> Mapping[str, float]:
        training, precision = self.training, self.training.config.precision
        with whole_model(training.model, training.processes, training.ema) as model:
            if model is None:
                return {}
            with autocast(precision, training.processes.device):
                found = self.watch(step, model)
            if self.logger is not None and self.watch.columns:
                self.logger.image("samples", step, self.watch.picture(step))
            return found


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
