"""What classifier-free guidance costs: ViT-B's decoding, guided in one doubled batch, in two passes, and not.

    python -m benchmarks.guidance [--out out/guidance.json]
    python -m benchmarks.guidance --smoke       # a tiny model, to try the script

Rounds alternate. Before anything is timed, the ids of the doubled batch are compared in float32 with those of
two passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mage_fast.benchmark.timing import by_the_clock
from mage_fast.config import MAGEConfig
from mage_fast.decoding import Decoding
from mage_fast.files import write_json
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.run import pick_device

BATCH, SCALE = 4, 3.0
#: Of the ids of so many steps: rounding may turn a near tie, and later steps follow from it.
AGREEMENT, CHECKED_STEPS = 0.99, 2


class TwoPasses(Decoding):
    """Guided decoding as it is usually written: a pass with the class, then one without."""

    def _logits(self, ids_BL: Tensor, class_ids_B: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Any]:
        guided = more.pop("guided")
        conditional_NC, _ = super()._logits(ids_BL, class_ids_B, *rest, **more)
        if not guided:
            return conditional_NC, None
        none_B = self.model.class_ids(None, len(class_ids_B))
        return conditional_NC, super()._logits(ids_BL, none_B, *rest, **more)[0]


def measure(device: str, *, batch: int, seconds: float, smoke: bool) -> dict[str, Any]:
    """Milliseconds of a batch's decoding in bfloat16, of each way."""
    torch.manual_seed(0)
    config = (MAGEConfig.tiny if smoke else MAGEConfig.vit_b)(tokenizer=None).for_classes(10)
    model = MAGE(config).to(device).eval()
    labels_B = torch.arange(batch) % 10
    steps = 4 if smoke else 20
    plain = SamplerConfig(steps=steps)
    guided = SamplerConfig(steps=steps, guidance_scale=SCALE)
    rising = SamplerConfig(steps=steps, guidance_scale=SCALE, guidance_schedule="linear")

    def run(decode: Decoding, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Tensor]:
        def generate() -> Tensor:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return decode(batch, labels_B=labels_B, seed=0)

        return generate

    ways = {"two passes": TwoPasses(model, guided), "guided": Decoding(model, guided)}
    ids, ours = (run(decode, torch.float32)() for decode in ways.values())
    agreement = float((ids == ours).double().mean())
    if agreement < AGREEMENT:
        sys.exit(
            f"{agreement:.2%} of the ids of a doubled batch are those of two passes, wanted {AGREEMENT:.0%}"
        )
    ways |= {"guided, linear": Decoding(model, rising), "not guided": Decoding(model, plain)}
    runs = {name: run(decode) for name, decode in ways.items()}
    for function in runs.values():  # the first call allocates; on a GPU the second is captured
        function()
        function()
    timings = by_the_clock(runs, device, seconds)
    return {
        **{"model": "tiny" if smoke else "vit_b", "batch": batch, "steps": steps, "dtype": "bfloat16"},
        **{"device": device, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "agreement_of_ids": agreement,
        "milliseconds": {
            name: {
                **{"median": t.median_ms, "low": t.quantile_ms(20), "high": t.quantile_ms(80)},
                "rounds": len(t.samples_ms),
            }
            for name, t in timings.items()
        },
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a way, its time and its time over that of two passes."""
    slowest = found["milliseconds"]["two passes"]["median"]
    lines = [
        f"| {found['model']}, {found['steps']} steps, batch {found['batch']}, {found['device']} | ms "
        "(20% to 80%) | of two passes |",
        "|---|--:|--:|",
    ]
    for name, t in found["milliseconds"].items():
        times = f"{t['median']:.0f} ({t['low']:.0f} to {t['high']:.0f})"
        lines.append(f"| {name} | {times} | {t['median'] / slowest:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/guidance.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing a way")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    seconds = 0.01 if options.smoke else options.seconds
    device = pick_device(options.device).type
    found = measure(device, batch=options.batch, seconds=seconds, smoke=options.smoke)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)
    print(table(found), end="")


if __name__ == "__main__":
    main()
