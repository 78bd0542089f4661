"""The recipes of the linear probe side by side on digits: accuracy over seeds, and what each costs.

    python -m benchmarks.linear_probe --model out/demo/pretrain [--out out/linear_probe]

Seeds are those of the head's weights, of the order and of the crops; the encoder is the same. The paper's
recipe is for a million images: its 90 epochs at batch 4096 would be 90 steps on 1438 digits, at a trust
coefficient of 0.001 too few to get anywhere. So, said here and not hidden in defaults: batch 256, base lr
10, and the crops of the pre-training on digits (weak), as a digit is not known by a fifth of its area. What
stays: 90 epochs, 10 of warm-up, LARS, cosine, the head. Times are of the whole verb after the model's first
use, CPU seconds beside the clock's, recipes alternating. Writes linear_probe.json and linear_probe.md into
--out. A run that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.ablations import spread
from mage_fast.files import atomic_path, write_json
from mage_fast.model import MAGE
from mage_fast.recipes.probe import HeadChoices, ProbeConfig, run
from mage_fast.training.run_state import module_fingerprint

RECIPES: tuple[Literal["solved", "cached", "exact"], ...] = ("solved", "cached", "exact")


def measure(model: Path, recipe: Literal["solved", "cached", "exact"], head: HeadChoices) -> dict[str, Any]:
    """Accuracy and seconds of one probe, in a folder of its own, so that nothing is there yet."""
    with tempfile.TemporaryDirectory() as folder:
        config = ProbeConfig(model=model, recipe=recipe, out=Path(folder) / "probe", head=head)
        started, started_cpu = time.perf_counter(), time.process_time()
        found = run(config)
        times = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - started_cpu,
        }
    if found.get("stopped_by"):
        raise KeyboardInterrupt
    return {"recipe": recipe, "seed": head.seed, "test_top1": found["test_top1"]} | times


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, means with the least and the greatest over seeds, and how much cheaper."""
    lines = [
        "| recipe | seeds | held-out top-1 | seconds | CPU seconds | CPU seconds of exact over these |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    of = {name: [r for r in records if r["recipe"] == name] for name in RECIPES}
    for name, mine in of.items():
        if not mine:
            continue
        cells = [
            spread((r[key] for r in mine), form)
            for key, form in (("test_top1", "{:.1%}"), ("seconds", "{:.1f}"), ("cpu_seconds", "{:.1f}"))
        ]
        ratio = "-"
        if of["exact"]:
            mean, exact = (statistics.fmean(r["cpu_seconds"] for r in found) for found in (mine, of["exact"]))
            ratio = f"{exact / mean:.1f}"
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("out/demo/pretrain"))
    parser.add_argument("--out", type=Path, default=Path("out/linear_probe"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--base-lr", type=float, default=10.0)
    parser.add_argument("--augment", default="weak")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "linear_probe.json"
    head = {
        name: getattr(options, name)
        for name in ("epochs", "warmup_epochs", "batch_size", "base_lr", "augment")
    }
    settings = head | {"model": module_fingerprint(MAGE.from_pretrained(options.model))}
    records: list[dict[str, Any]] = []
    if path.exists():
        saved = json.loads(path.read_text("utf-8"))
        if saved["settings"] != settings:
            raise SystemExit(f"{path} holds other settings, {saved['settings']}: give another --out")
        records = saved["runs"]
    run(ProbeConfig(model=options.model))  # imports and first calls
    for seed in range(options.seeds):
        for recipe in RECIPES:
            if any((r["recipe"], r["seed"]) == (recipe, seed) for r in records):
                continue
            records.append(measure(options.model, recipe, HeadChoices(seed=seed, **head)))
            versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            write_json(path, {"runs": records, "settings": settings, "versions": versions})
    with atomic_path(options.out / "linear_probe.md") as temporary:
        temporary.write_text(table(records), encoding="utf-8")
    print(table(records), end="")


if __name__ == "__main__":
    main()
