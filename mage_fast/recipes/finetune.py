"""``mage-fast finetune``: the paper's fine-tuning (section 4.3), on one device or many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from mage_fast.classification import MAGEClassifier
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.recipes.finetune_config import NO_RAND_AUGMENT, RECIPES, FinetuneConfig, FinetuneRecipe
from mage_fast.recipes.loading import fitting_batch_size, load_model
from mage_fast.recipes.pictures import curves, read_metrics
from mage_fast.training.augment import check_rand_augment, named
from mage_fast.training.checkpoints import Checkpoints
from mage_fast.training.classifier_step import ClassifierStep
from mage_fast.training.data import Batch, batches, open_source, steps_per_epoch
from mage_fast.training.distributed import Processes, replicated, torchrun_processes
from mage_fast.training.logs import METRICS_FILE, RunLogger
from mage_fast.training.loop import Skips, train
from mage_fast.training.memory import keep_freed_memory
from mage_fast.training.micro_batches import step_batches, with_random_states
from mage_fast.training.mixing import Mixing
from mage_fast.training.optim import build_adamw, layer_decay_groups
from mage_fast.training.precision import Precision, autocast
from mage_fast.training.run import CHECKPOINTS, Run, pick_device
from mage_fast.training.run_state import Part, module_fingerprint
from mage_fast.training.schedule import cosine_lr, scaled_lr, set_lr
from mage_fast.training.sources import Source
from mage_fast.training.throughput import Throughput
from mage_fast.training.trackers import open_tracker
from mage_fast.training.watch import check_labelled, check_same_classes, undisturbed

__all__ = ["RECIPES", "FinetuneConfig", "FinetuneRecipe", "run"]

CURVES = "curves.png"
#: Of the fine-tuning recipe.
BETAS = (0.9, 0.999)


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Train to the end or to a stop; returns steps, losses, held-out accuracies in [0, 1], and the folder.

    Started by torchrun, each process trains a share of each batch; the first one logs, saves and returns what
    was said, the others only what stopped them.

    Raises:
        InputError: unlabelled data, a cache of another tokenizer, numbers out of range, a missing package, a
            folder that holds another run or another model.
        TrainingError: the loss is not finite, too many steps were skipped, a process is lost.
    """
    with torchrun_processes(pick_device(config.device)) as processes:
        if processes.device.type == "cpu":
            keep_freed_memory()
        return _Finetuning(config, processes).run()


class _Finetuning:
    """One process's part of a run."""

    def __init__(self, config: FinetuneConfig, processes: Processes) -> None:
        self.config, self.processes, device = config, processes, processes.device
        mage = load_model(config.model, device)
        recipe = config.recipe(mage.config)
        self.train_source, self.test_source = _open(config, mage)
        classes = self.train_source.num_classes
        self.mixing = Mixing(recipe.mixup, recipe.cutmix)
        self.augmentation = named(recipe.augment)
        if self.train_source.kind == "images":
            if recipe.rand_augment != NO_RAND_AUGMENT:
                check_rand_augment(recipe.rand_augment)
                self.augmentation = dataclasses.replace(self.augmentation, rand_augment=recipe.rand_augment)
        elif self.mixing:
            raise InputError(
                f"finetune: mixup {recipe.mixup} and cutmix {recipe.cutmix} mix images, and "
                f"{self.train_source.spec} has tokens only: give --mixup 0 --cutmix 0, or images"
            )
        batch_size = fitting_batch_size(
            *("finetune", self.train_source, config.batch_size, recipe.batch_size),
            *(processes, config.accumulate),
        )
        self.recipe = recipe = dataclasses.replace(recipe, batch_size=batch_size)
        self.split = processes.count * config.accumulate
        self.highest_lr = scaled_lr(recipe.base_lr, batch_size)
        self.steps_an_epoch = steps_per_epoch(self.train_source, batch_size)
        self.total_steps = self.steps_an_epoch * recipe.epochs

        torch.manual_seed(config.seed)
        fingerprint = module_fingerprint(mage)
        self.model = MAGEClassifier(mage, classes, drop_path=recipe.drop_path).to(device)
        self.optimizer = build_adamw(
            layer_decay_groups(self.model.layers, recipe.layer_decay, config.weight_decay),
            self.highest_lr,
            betas=BETAS,
        )
        self.step = ClassifierStep(
            self.model,
            self.optimizer,
            mixing=self.mixing,
            label_smoothing=config.label_smoothing,
            precision=config.precision,
            parallel=replicated(self.model, processes),
        )
        parts: dict[str, Part] = {"model": self.model, "optimizer": self.optimizer}
        parts |= {} if self.step.loss_scale is None else {"loss_scale": self.step.loss_scale}
        choices = config.checkpoints
        self.folder = Run(
            config.out,
            config.settings(recipe) | {"model_fingerprint": fingerprint, "num_classes": classes},
            Checkpoints(config.out / CHECKPOINTS, keep_last=choices.keep_last, keep_every=choices.keep_every),
            **parts,
        )

    def run(self) -> dict[str, Any]:
        config, processes = self.config, self.processes
        self.folder.refuse_others()
        tracker = open_tracker(config.tracker, config=self.folder.settings) if processes.is_main else None
        start_step = self.folder.resume(config.resume)
        held_out = HeldOut(
            self.model,
            self.test_source,
            every_steps=config.evaluate_every * self.steps_an_epoch,
            batch_size=self.recipe.batch_size // config.accumulate,
            workers=config.workers,
            precision=config.precision,
            processes=processes,
        )
        self.model.train()
        with ExitStack() as stack:
            logger = None
            if processes.is_main:
                logger = stack.enter_context(
                    RunLogger(
                        config.out, self.total_steps, "finetune", start_step=start_step, tracker=tracker
                    )
                )
                logger.resumed(self._other_split())
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
                skips=Skips(),
                throughput=Throughput(self.recipe.batch_size, device=processes.device),
                evaluation=held_out,
                processes=processes,
            )
            is_done = result.step == self.total_steps
            # all processes look, if the first has not written what one saw
            if is_done and processes.sum([float(processes.is_main and not self._accuracies())])[0]:
                found = held_out(result.step)
                if logger is not None:
                    logger.log(result.step, found)
        if not processes.is_main:
            return {"stopped_by": result.stopped_by}
        if is_done:
            self.model.eval().save_pretrained(config.out)
            curves(config.out / METRICS_FILE, config.out / CURVES)
        losses = [line["loss"] for line in read_metrics(config.out / METRICS_FILE) if "loss" in line]
        return {
            "steps": result.step,
            "total_steps": self.total_steps,
            "stopped_by": result.stopped_by,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            **(self._accuracies() if is_done else {}),
            "test_images": len(self.test_source),
            "out": str(config.out),
        }

    def _accuracies(self) -> dict[str, float]:
        """What was found on the held-out data after the last step; nothing if nobody has looked."""
        lines = read_metrics(self.config.out / METRICS_FILE)
        at_the_end = [line for line in lines if line["step"] == self.total_steps and "test_top1" in line]
        return {k: v for line in at_the_end for k, v in line.items() if k.startswith("test_")}

    def _train_step(self, batches: list[Batch], step: int) -> Mapping[str, Any]:
        config, processes = self.config, self.processes
        lr = cosine_lr(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.steps_an_epoch * self.recipe.warmup_epochs,
            base_lr=self.highest_lr,
            min_lr=config.min_lr,
        )
        set_lr(self.optimizer, lr)
        micro_batches = with_random_states(batches, seed=config.seed, step=step, processes=processes)
        return self.step.accumulate(micro_batches) | {"lr": lr}

    def _batches(self, step: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step from one on."""
        config = self.config
        return step_batches(
            self.train_source,
            self.recipe.batch_size,
            step=step,
            accumulate=config.accumulate,
            processes=self.processes,
            seed=config.seed,
            augment=self.augmentation,
            workers=config.workers,
        )

    def _other_split(self) -> str:
        """What a run resumed with other micro-batches than before is told."""
        before = self.folder.extra.get("micro_batches", self.split)
        if before == self.split:
            return ""
        return f"; {self.split} micro-batches a step mix and drop otherwise than the {before} before"


class HeldOut:
    """Loss and accuracies of a classifier on held-out data, of which each process reads a share.

    ``test_loss`` in nats, without smoothing; ``test_top1`` and, where there are more than five classes,
    ``test_top5`` in [0, 1]. Every process must call.
    """

    def __init__(
        self,
        model: MAGEClassifier,
        source: Source,
        *,
        every_steps: int,
        batch_size: int,
        workers: int = 0,
        precision: Precision = "fp32",
        processes: Processes | None = None,
    ) -> None:
        self.model, self.source, self.every_steps = model, source, every_steps
        self.batch_size, self.workers, self.precision = batch_size, workers, precision
        self.processes = processes or Processes()

    def __call__(self, step: int) -> dict[str, float]:
        """Of the model as it is."""
        processes, device = self.processes, self.model.head.bias.device
        found = batches(
            self.source,
            self.batch_size,
            shuffle=False,
            drop_last=False,
            augment="eval",
            split=processes.count,
            shares=(processes.rank,),
            workers=self.workers,
        )
        sums, seen = torch.zeros(3, device=device), 0
        with undisturbed(self.model):
            for batch in found:
                with autocast(self.precision, device):
                    logits_BK = self.model(batch.inputs.to(device, non_blocking=True)).float()
                labels_B = batch.labels.to(device, non_blocking=True)
                best_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices == labels_B[:, None]
                loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
                sums += torch.stack([loss, best_B5[:, 0].sum(), best_B5.sum()])
                seen += len(labels_B)
        *totals, count = processes.sum([*sums.tolist(), float(seen)])
        if not count:
            raise InputError(f"finetune: none of the images of {self.source.spec} is readable")
        names = ("test_loss", "test_top1", "test_top5")
        means = {name: total / count for name, total in zip(names, totals, strict=True)}
        if self.model.config.num_classes <= 5:
            del means["test_top5"]
        return means


def _open(config: FinetuneConfig, mage: MAGE) -> tuple[Source, Source]:
    """Training and held-out data of the same classes, that the model can read."""
    tokenizer = mage.config.tokenizer
    size = tokenizer.image_size if tokenizer else 256
    train_source = open_source(config.data, image_size=size, split="train")
    test_source = open_source(config.test_data or config.data, image_size=size, split="test")
    check_same_classes("finetune", train_source, test_source)
    for source in (train_source, test_source):
        check_labelled("finetune", mage, source)
    highest, classes = int(test_source.labels.max()), train_source.num_classes
    if highest >= classes:
        raise InputError(
            f"finetune: {test_source.spec} has the label {highest}, wanted those of {train_source.spec}: "
            f"0 to {classes - 1}"
        )
    return train_source, test_source
