"""The two encoder modes side by side, in quality on real digits and in time at ViT-B.

python -m benchmarks.encoder_modes quality   # three seeds a mode: Frechet distance of samples, linear probe
python -m benchmarks.encoder_modes speed     # ViT-B's training step and generation, rounds alternating

Each writes encoder_modes.json and encoder_modes.md into --out. A run that is done is not done again, one that
was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations import FIGURES, Variant, measure, spread
from mage_fast.benchmark.timing import by_the_clock
from mage_fast.benchmark.training import BATCH, our_step
from mage_fast.config import MAGEConfig
from mage_fast.files import atomic_path, write_json
from mage_fast.model import MAGE
from mage_fast.recipes.demo import FRECHET_IMAGES
from mage_fast.sampler import SamplerConfig, generate_ids
from mage_fast.training.run import pick_device

#: By mode what it changes of the demo's run.
MODES = {"paper": Variant(), "unmasked": Variant({"encoder_tokens": "unmasked"})}


def speed(*, seconds: float, smoke: bool) -> list[dict[str, Any]]:
    """Milliseconds of a training step and of generation, per mode, the two modes' rounds alternating."""
    device = pick_device("auto").type
    batch, dtype = BATCH[device], torch.bfloat16
    sampler = SamplerConfig(steps=4 if smoke else 20)
    steps: dict[str, Callable[[], Any]] = {}
    generations: dict[str, Callable[[], Any]] = {}
    for mode in MODES:
        make = MAGEConfig.tiny if smoke else MAGEConfig.vit_b
        config = make(tokenizer=None, encoder_tokens=mode)
        torch.manual_seed(0)
        ids_BL = torch.randint(config.codebook_size, (batch, config.num_tokens)).to(device)
        steps[mode] = our_step(MAGE(config).to(device).train(), partial(torch.clone, ids_BL), dtype)
        model = MAGE(config).to(device).eval()
        generations[mode] = partial(_generate, model, batch, sampler, device, dtype)
    found = []
    for name, runs in (("training step", steps), (f"generation, {sampler.steps} steps", generations)):
        for run in runs.values():  # first calls allocate
            run()
        for mode, timing in by_the_clock(runs, device, seconds).items():
            found.append(
                {"name": name, "mode": mode, "batch": batch, "dtype": "bfloat16", "device": device}
                | {"median_ms": timing.median_ms, "low_ms": timing.quantile_ms(20)}
                | {"high_ms": timing.quantile_ms(80), "rounds": len(timing.samples_ms)}
            )
    return found


@torch.no_grad()
def _generate(model: MAGE, count: int, sampler: SamplerConfig, device: str, dtype: torch.dtype) -> None:
    with torch.autocast(device, dtype):
        generate_ids(model, count, config=sampler, seed=0)


def table(quality: list[dict[str, Any]], speed: list[dict[str, Any]]) -> str:
    """Markdown: a row a figure, a column a mode, means with the least and the greatest over seeds."""
    lines = ["| | " + " | ".join(f"`{mode}`" for mode in MODES) + " |", "|---|--:|--:|"]
    if quality:
        seeds, epochs = len({r["seed"] for r in quality}), quality[0]["epochs"]
        for key, label, form in FIGURES:
            cells = (spread((r[key] for r in quality if r["variant"] == mode), form) for mode in MODES)
            lines.append(f"| {label} ({seeds} seeds, {epochs} epochs) | {' | '.join(cells)} |")
    for name in dict.fromkeys(r["name"] for r in speed):
        of = {r["mode"]: r for r in speed if r["name"] == name}
        cells = (f"{of[mode]['median_ms']:.0f} ms" for mode in MODES)
        lines.append(f"| ViT-B {name}, batch {of['paper']['batch']}, bfloat16 | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("--out", type=Path, default=Path("out/encoder_modes"))
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokenizer-steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=FRECHET_IMAGES, help="samples of a Frechet distance")
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing a function")
    parser.add_argument("--smoke", action="store_true", help="time a tiny model, to try the script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "encoder_modes.json"
    found = {"quality": [], "speed": []} | (json.loads(path.read_text("utf-8")) if path.exists() else {})
    if options.part == "quality":
        found["quality"] = measure(
            options.out,
            MODES,
            epochs=options.epochs,
            seeds=options.seeds,
            tokenizer_steps=options.tokenizer_steps,
            images=options.images,
        )
    else:
        found["speed"] = speed(seconds=options.seconds, smoke=options.smoke)
    found["versions"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(path, found)
    with atomic_path(options.out / "encoder_modes.md") as temporary:
        temporary.write_text(table(found["quality"], found["speed"]), encoding="utf-8")
    print(table(found["quality"], found["speed"]), end="")


if __name__ == "__main__":
    main()
