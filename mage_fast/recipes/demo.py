"""``mage-fast demo``: the whole of MAGE on real handwritten digits, in a few minutes on a laptop.

Tokenizer, token cache, pre-training, generation, masked reconstruction, linear probe; then a report.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mage_fast.editing import hide_tokens, reconstruct
from mage_fast.files import write_json
from mage_fast.kernels import rng
from mage_fast.model import MAGE
from mage_fast.probe import chance_level, linear_probe
from mage_fast.recipes import pretrain, tokenize, train_tokenizer
from mage_fast.recipes.classifier import DigitClassifier
from mage_fast.recipes.demo_report import Report, write_report
from mage_fast.recipes.features import extract_features
from mage_fast.recipes.loading import load_model
from mage_fast.recipes.pictures import write_grid
from mage_fast.sampler import generate
from mage_fast.sampler_config import SamplerConfig
from mage_fast.tokenizer import VQGAN
from mage_fast.training.data import batches, open_source
from mage_fast.training.metrics import frechet_distance
from mage_fast.training.run import pick_device

#: Images of the Frechet distances; real ones are the whole training split.
FRECHET_IMAGES = 1024
SAMPLER = SamplerConfig(steps=12, choice_temperature=8.0)


@dataclass(frozen=True)
class DemoConfig:
    """Train, generate and probe on scikit-learn's real handwritten digits; writes report.html."""

    #: Folder of the report, the pictures and the runs. The same command goes on where it stopped.
    out: Path = Path("out/demo")
    #: Training steps of the tokenizer.
    tokenizer_steps: int = 200
    #: Epochs of pre-training.
    epochs: int = 70
    seed: int = 0
    device: str = "auto"


def run(config: DemoConfig) -> dict[str, float]:
    """Run all stages and write ``report.html``, ``samples.png`` and ``metrics.json``; returns the metrics."""
    console = Console(stderr=True)
    device = pick_device(config.device)
    started = time.monotonic()

    def stage(name: str) -> None:
        console.print(f"[bold]{name}[/bold] ({time.monotonic() - started:.0f} s)", highlight=False)

    stage("1/5 tokenizer")
    tokenizer_result = train_tokenizer.run(
        train_tokenizer.TrainTokenizerConfig(
            data="digits",
            out=config.out / "tokenizer",
            steps=config.tokenizer_steps,
            seed=config.seed,
            device=config.device,
        )
    )
    if tokenizer_result.get("stopped_by"):
        return tokenizer_result
    stage("2/5 pre-training")
    cache = config.out / "tokens"
    tokenize.run(
        tokenize.TokenizeConfig(
            data="digits",
            tokenizer=config.out / "tokenizer",
            out=cache,
            split="train",
            device=config.device,
        )
    )
    pretrain_result = pretrain.run(
        pretrain.PretrainConfig(
            data=f"tokens:{cache}",
            tokenizer=config.out / "tokenizer",
            out=config.out / "pretrain",
            preset="small",
            model=pretrain.ModelChoices(ratio_per="sample"),
            epochs=config.epochs,
            warmup_epochs=min(config.epochs, 2),
            seed=config.seed,
            device=config.device,
        )
    )
    if pretrain_result["stopped_by"]:
        return pretrain_result
    model = load_model(config.out / "pretrain", device)
    assert isinstance(model.tokenizer, VQGAN)
    train, test = (images_of(split, model.tokenizer.config.image_size, device) for split in ("train", "test"))

    stage("3/5 generation")
    metrics: dict[str, float] = {
        "tokenizer_psnr_db": tokenizer_result["psnr_db"],
        "pretrain_loss_first": pretrain_result["loss_first"],
        "pretrain_loss_last": pretrain_result["loss_last"],
    }
    generated = generate(model, FRECHET_IMAGES, config=SAMPLER, seed=config.seed, batch_size=128)
    marginal = model.tokenizer.decode(marginal_tokens(model.tokenizer, train[0], config.seed))
    classifier = DigitClassifier.trained(*train, seed=config.seed)
    real = classifier.features(train[0])
    metrics |= {
        "classifier_top1": classifier.accuracy(*test),
        "fid_generated": frechet_distance(classifier.features(generated), real),
        "fid_marginal_tokens": frechet_distance(classifier.features(marginal), real),
        "fid_reconstructed": frechet_distance(
            classifier.features(_reconstruct(model.tokenizer, train[0])), real
        ),
        "fid_held_out_real": frechet_distance(classifier.features(test[0]), real),
    }

    stage("4/5 linear probe")
    torch.manual_seed(config.seed + 1)
    random_encoder = MAGE(model.config, model.tokenizer).to(device).eval()
    trained, untrained = (_probe(encoder) for encoder in (model, random_encoder))
    metrics |= {
        "probe_top1": trained,
        "probe_top1_random_encoder": untrained,
        "probe_chance": chance_level(test[1].cpu()),
    }

    stage("5/5 report")
    shown = test[0][:8]
    completed = reconstruct(model, shown, ratio=0.75, tries=3, config=SAMPLER, seed=config.seed)
    write_grid(generated[:64], config.out / "samples.png")
    report = Report(
        originals=shown,
        reconstructions=_reconstruct(model.tokenizer, shown),
        masked=hide_tokens(shown, completed.is_masked_BL),
        completions=list(completed.images_TB3HW),
        generated=generated[:64],
        marginal=marginal[:16],
        metrics_log=config.out / "pretrain" / "metrics.jsonl",
    )
    metrics["seconds"] = time.monotonic() - started
    write_report(report, metrics, config.out / "report.html")
    write_json(config.out / "metrics.json", metrics)
    console.print(f"report: {config.out / 'report.html'}", highlight=False)
    return metrics


def images_of(split: str, image_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images of a split of the digits, and their labels."""
    source = open_source("digits", image_size=image_size, split=split)  # type: ignore[arg-type]
    stream = batches(source, 256, shuffle=False, drop_last=False, augment="eval")
    images, labels, _ = zip(*stream, strict=True)
    return torch.cat(images).to(device), torch.cat(labels).to(device)


@torch.no_grad()
def _reconstruct(tokenizer: VQGAN, images: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(256)])


@torch.no_grad()
def marginal_tokens(tokenizer: VQGAN, images: Tensor, seed: int) -> Tensor:
    """Tokens drawn at each position from the law of that position alone: what no model is needed for."""
    ids_NL = torch.cat([tokenizer.encode(part) for part in images.split(256)])
    length = ids_NL.shape[1]
    words = rng.words(rng.new_state(seed), rng.stream(rng.Stream.SAMPLE_ID), FRECHET_IMAGES, length)
    return ids_NL.gather(0, (words % len(ids_NL)).to(ids_NL.device))


def _probe(model: MAGE) -> float:
    train, test = (extract_features(model, "digits", split) for split in ("train", "test"))
    return linear_probe(*train, *test).test_top1
