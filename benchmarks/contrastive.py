"""MAGE-C beside MAGE at ViT-B: a training step's time, and what InfoNCE costs whole and in chunks.

python -m benchmarks.contrastive            # --smoke tries the script on tiny sizes

Steps are timed in turn, from ids on the device: MAGE-C on two views of each image, MAGE on as many views, and
MAGE on one view of as many images. Writes contrastive.json and contrastive.md into --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mage_fast.benchmark.end_to_end import kept_bytes
from mage_fast.benchmark.timing import Run, by_the_clock
from mage_fast.benchmark.training import BATCH, our_step
from mage_fast.config import MAGEConfig
from mage_fast.contrastive import MAGEC, PROJECTION_WIDTH, info_nce
from mage_fast.files import atomic_path, write_json
from mage_fast.model import MAGE
from mage_fast.training.run import pick_device

Contrast = Callable[[Tensor, Tensor], Tensor]


def plain_info_nce(z_ND: Tensor, positive_ND: Tensor) -> Tensor:
    """What one would write: the whole square of logits, read by rows and by columns."""
    z_ND, positive_ND = F.normalize(z_ND, dim=1), F.normalize(positive_ND, dim=1)
    logits_NN, targets_N = z_ND @ positive_ND.T / 0.2, torch.arange(len(z_ND), device=z_ND.device)
    return (F.cross_entropy(logits_NN, targets_N) + F.cross_entropy(logits_NN.T, targets_N)) / 2


def steps(*, seconds: float, smoke: bool) -> list[dict[str, Any]]:
    """Milliseconds of a training step and images a second."""
    device = pick_device("auto").type
    images, dtype = 2 if smoke else BATCH[device] // 2, torch.bfloat16
    config = (MAGEConfig.tiny if smoke else MAGEConfig.vit_b)(tokenizer=None)
    cases = {
        "MAGE-C, two views": (MAGEC, images, 2),
        "MAGE, as many views": (MAGE, 2 * images, 1),
        "MAGE, as many images": (MAGE, images, 1),
    }
    runs: dict[str, Run] = {}
    for name, (make, count, views) in cases.items():
        torch.manual_seed(0)
        ids_BL = torch.randint(config.codebook_size, (count * views, config.num_tokens)).to(device)
        runs[name] = our_step(make(config).to(device).train(), partial(torch.clone, ids_BL), dtype)
        runs[name]()  # first calls allocate
    timings = by_the_clock(runs, device, seconds)
    return [
        {"name": name, "images": count, "views": count * views, "dtype": "bfloat16", "device": device}
        | {"median_ms": timings[name].median_ms, "low_ms": timings[name].quantile_ms(20)}
        | {"high_ms": timings[name].quantile_ms(80), "rounds": len(timings[name].samples_ms)}
        | {"images_per_second": 1e3 * count / timings[name].median_ms, "peak_mib": timings[name].peak_mib}
        for name, (_, count, views) in cases.items()
    ]


def losses(*, seconds: float, smoke: bool) -> list[dict[str, Any]]:
    """InfoNCE forward and backward: time, bytes kept between the two, and most bytes at once."""
    device = pick_device("auto").type
    rows = 128 if smoke else 4096
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, rows, PROJECTION_WIDTH, generator=generator).to(device).unbind()
    z_ND, positive_ND = (view.clone().requires_grad_() for view in views)
    functions: dict[str, Contrast] = {"in chunks": info_nce, "plain": plain_info_nce}
    results = {name: function(z_ND, positive_ND) for name, function in functions.items()}
    torch.testing.assert_close(results["in chunks"], results["plain"], rtol=1e-4, atol=1e-4)
    runs = {name: partial(_gradients, function, z_ND, positive_ND) for name, function in functions.items()}
    timings = by_the_clock(runs, device, seconds)
    nothing = nn.Module()
    return [
        {"name": name, "rows": rows, "width": PROJECTION_WIDTH, "dtype": "float32", "device": device}
        | {"median_ms": timings[name].median_ms, "rounds": len(timings[name].samples_ms)}
        | {"kept_mib": kept_bytes(nothing, partial(function, z_ND, positive_ND)) / 2**20}
        | {"peak_mib": timings[name].peak_mib if device == "cuda" else peak_mib(runs[name])}
        for name, function in functions.items()
    ]


def _gradients(function: Contrast, z_ND: Tensor, positive_ND: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(z_ND, positive_ND), (z_ND, positive_ND))


def peak_mib(run: Run) -> float:
    """Most memory that a call holds at once beside its inputs, from the CPU allocator's own records."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def table(steps: list[dict[str, Any]], losses: list[dict[str, Any]]) -> str:
    """Markdown: training steps, then InfoNCE."""
    lines = ["| ViT-B training step, bfloat16 | views | ms | images/s |", "|---|--:|--:|--:|"]
    lines += [
        f"| {r['name']} | {r['views']} | {r['median_ms']:.0f} | {r['images_per_second']:.1f} |" for r in steps
    ]
    rows = f"InfoNCE of {losses[0]['rows']} pairs, forward and backward"
    lines += ["", f"| {rows} | ms | kept MiB | most MiB |", "|---|--:|--:|--:|"]
    lines += [
        f"| {r['name']} | {r['median_ms']:.1f} | {r['kept_mib']:.1f} | {r['peak_mib']:.1f} |" for r in losses
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/contrastive"))
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing a function")
    parser.add_argument("--smoke", action="store_true", help="time a tiny model, to try the script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seconds = min(options.seconds, 0.1) if options.smoke else options.seconds
    found: dict[str, Any] = {
        "steps": steps(seconds=seconds, smoke=options.smoke),
        "losses": losses(seconds=seconds, smoke=options.smoke),
    }
    text = table(found["steps"], found["losses"])
    found["versions"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(options.out / "contrastive.json", found)
    with atomic_path(options.out / "contrastive.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
