"""The paper's ablations on digits: mask ratios (table 5), padding (appendix), unquantized inputs (table 6).

    python -m benchmarks.ablations [--out out/ablations] [--variants "base" "fixed ratio"]
    python -m benchmarks.ablations --smoke --out out/ablations-smoke    # an epoch of each, to try the script

The demo's model and recipe, over seeds 0, 1, 2, ...; of each run the Frechet distance of samples, the linear
probe and the loss. Runs compare with the one that sees the same data: "base", tokens of the images as they
are; "images", fresh crops in each epoch; "16 views", tokens of 16 crops an image, two of which MAGE-C sees in
a step. Writes ablations.json and ablations.md into --out. A run that is done is not done again, one that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mage_fast.files import atomic_path, write_json
from mage_fast.recipes import pretrain, tokenize, train_tokenizer
from mage_fast.recipes.classifier import DigitClassifier
from mage_fast.recipes.demo import FRECHET_IMAGES, SAMPLER, images_of
from mage_fast.recipes.loading import load_model
from mage_fast.recipes.probe import ProbeConfig
from mage_fast.recipes.probe import run as probe
from mage_fast.sampler import generate
from mage_fast.training.metrics import frechet_distance
from mage_fast.training.run import pick_device

RESULT = "ablation.json"


@dataclass(frozen=True)
class Variant:
    """What a run changes of the demo's."""

    #: Fields of :class:`pretrain.ModelChoices`.
    model: dict[str, Any] = field(default_factory=dict)
    #: Other fields of :class:`pretrain.PretrainConfig`.
    settings: dict[str, Any] = field(default_factory=dict)
    #: Views an image of the token cache that it reads; 0: no cache, but images in fresh crops.
    views: int = 1
    #: Whether such a model samples at all.
    generates: bool = True


VARIANTS = {
    "base": Variant(),
    "fixed ratio": Variant({"mask_ratio_std": 0.0, "mask_ratio_mode": 0.55}),
    "mask token": Variant({"padding": "mask_token"}),
    "images": Variant(views=0),
    "unquantized": Variant({"encoder_input": "features"}, views=0, generates=False),
    "16 views": Variant(views=16),
    "MAGE-C": Variant(settings={"contrastive": pretrain.ContrastiveChoices(enabled=True)}, views=16),
}
#: Keys of a record, their titles and how they are written.
FIGURES = (
    ("frechet", "Frechet distance of samples", "{:.1f}"),
    ("probe", "linear probe, held-out digits", "{:.1%}"),
    ("loss", "pre-training loss, last", "{:.3f}"),
)


def measure(
    out: Path,
    variants: Mapping[str, Variant],
    *,
    epochs: int,
    seeds: int,
    tokenizer_steps: int,
    images: int,
) -> list[dict[str, Any]]:
    """Train each variant with each seed, and measure; a record a run."""
    tokenizer, device = out / "tokenizer", pick_device("auto")
    train_tokenizer.run(
        train_tokenizer.TrainTokenizerConfig(data="digits", out=tokenizer, steps=tokenizer_steps)
    )
    caches = {
        views: out / f"tokens-{views}"
        for views in sorted({variant.views for variant in variants.values()} - {0})
    }
    for views, cache in caches.items():
        tokenize.run(
            tokenize.TokenizeConfig(
                data="digits",
                tokenizer=tokenizer,
                out=cache,
                split="train",
                views=views,
                augment="eval" if views == 1 else "weak",
            )
        )
    classifier: DigitClassifier | None = None
    found = []
    for seed in range(seeds):
        for name, variant in variants.items():
            folder = out / f"{name.replace(' ', '-').lower()}-{epochs}-epochs-seed-{seed}"
            if not (folder / RESULT).exists():
                choices: dict[str, Any] = {"ratio_per": "sample"} | variant.model
                done = pretrain.run(
                    pretrain.PretrainConfig(
                        data=f"tokens:{caches[variant.views]}" if variant.views else "digits",
                        tokenizer=tokenizer,
                        out=folder,
                        model=pretrain.ModelChoices(**choices),
                        epochs=epochs,
                        warmup_epochs=min(epochs, 2),
                        seed=seed,
                        **variant.settings,
                    )
                )
                if done["stopped_by"]:
                    sys.exit(f"{done['stopped_by']}: the same command goes on")
                record = {"variant": name, "seed": seed, "epochs": epochs, "loss": done["loss_last"]}
                record["probe"] = probe(ProbeConfig(model=folder))["test_top1"]
                if variant.generates:
                    model = load_model(folder, device)
                    assert model.config.tokenizer is not None
                    real, labels = images_of("train", model.config.tokenizer.image_size, device)
                    if classifier is None:
                        classifier = DigitClassifier.trained(real, labels, seed=0)
                    samples = generate(model, images, config=SAMPLER, seed=seed, batch_size=128)
                    record["frechet"] = frechet_distance(
                        classifier.features(samples), classifier.features(real)
                    )
                write_json(folder / RESULT, record)
            found.append(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    return found


def spread(values: Iterable[float], form: str) -> str:
    """Mean, least and greatest, each written as ``form`` says."""
    found = list(values)
    low, mean, high = (form.format(f(found)) for f in (min, statistics.mean, max))
    return f"{mean} ({low} to {high})"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a variant, a column a figure, means with the least and the greatest over seeds."""
    epochs = sorted({r["epochs"] for r in records})
    lines = [
        f"| {', '.join(map(str, epochs))} epochs | seeds | "
        + " | ".join(title for _, title, _ in FIGURES)
        + " |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(r["variant"] for r in records):
        mine = [r for r in records if r["variant"] == name]
        cells = [
            spread((r[key] for r in mine), form) if all(key in r for r in mine) else "does not generate"
            for key, _, form in FIGURES
        ]
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/ablations"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokenizer-steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=FRECHET_IMAGES, help="samples of a Frechet distance")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.seeds, options.tokenizer_steps, options.images = 1, 1, 4, 64
    options.out.mkdir(parents=True, exist_ok=True)
    records = measure(
        options.out,
        {name: VARIANTS[name] for name in options.variants},
        epochs=options.epochs,
        seeds=options.seeds,
        tokenizer_steps=options.tokenizer_steps,
        images=options.images,
    )
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(options.out / "ablations.json", {"runs": records, "versions": versions})
    with atomic_path(options.out / "ablations.md") as temporary:
        temporary.write_text(table(records), encoding="utf-8")
    print(table(records), end="")


if __name__ == "__main__":
    main()
