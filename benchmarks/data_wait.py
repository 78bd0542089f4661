"""How long training waits for its data: JPEG photographs decoded online, by workers too, and cached tokens.

    python -m benchmarks.data_wait [--out out/data_wait]
    python -m benchmarks.data_wait --smoke      # a few steps, to try the script

Photographs of ImageNet's usual size are cut from scikit-learn's two. The model is the small preset over an
untrained tokenizer, which costs what a trained one does: fast steps, the hardest case for the data. Each run
is ``mage-fast pretrain`` itself, and the figures are those it logs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mage_fast.config import TokenizerConfig
from mage_fast.files import atomic_path, write_json
from mage_fast.recipes import pretrain, tokenize
from mage_fast.recipes.pictures import read_metrics
from mage_fast.tokenizer import VQGAN

#: Width and height of a photograph, and the JPEG quality it is saved with.
SIZE, QUALITY = (500, 375), 90
BATCH = 32


def photographs(folder: Path, count: int) -> None:
    """Windows of scikit-learn's photographs, at random places, of two classes."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    for label, pixels in enumerate(load_sample_images().images):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        for number in range(count // 2):
            left, top = (
                int(generator.integers(have - want + 1)) for have, want in zip(image.size, SIZE, strict=True)
            )
            window = image.crop((left, top, left + SIZE[0], top + SIZE[1]))
            window.save(folder / str(label) / f"{number:05d}.jpg", quality=QUALITY)


def measure(out: Path, *, count: int, epochs: int) -> list[dict[str, Any]]:
    """A record a way of reading: the medians of what was logged after the first two lines."""
    data, tokenizer, cache = (out / name for name in ("photographs", "tokenizer", "tokens"))
    photographs(data, count)
    torch.manual_seed(0)
    VQGAN(
        TokenizerConfig(
            image_size=64,
            codebook_size=256,
            codebook_dim=32,
            base_width=16,
            width_multipliers=(1, 2, 2, 4),
            norm_groups=8,
        )
    ).save_pretrained(tokenizer)
    tokenize.run(
        tokenize.TokenizeConfig(
            data=f"folder:{data}", tokenizer=tokenizer, out=cache, views=2, augment="strong"
        )
    )
    found = []
    for name, source, workers in (
        ("photographs, decoded in the training process", f"folder:{data}", 0),
        ("photographs, 2 workers", f"folder:{data}", 2),
        ("cached tokens", f"tokens:{cache}", 0),
    ):
        folder = out / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        pretrain.run(
            pretrain.PretrainConfig(
                data=source,
                split="all",
                tokenizer=tokenizer,
                out=folder,
                epochs=epochs,
                warmup_epochs=0,
                batch_size=BATCH,
                workers=workers,
                augment="strong",
                log_every=max(1, count // BATCH // 2),
            )
        )
        lines = read_metrics(folder / "metrics.jsonl")[2:]
        record = {"name": name, "batch": BATCH, "windows": len(lines)}
        for key in ("data_wait", "images_per_second"):
            record[key] = statistics.median(line[key] for line in lines)
        found.append(record)
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a way of reading."""
    lines = ["| data | share of time waiting for data | images/s |", "|---|--:|--:|"]
    lines += [f"| {r['name']} | {r['data_wait']:.1%} | {r['images_per_second']:.0f} |" for r in records]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/data_wait"))
    parser.add_argument("--photographs", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="64 photographs, 3 epochs")
    options = parser.parse_args()
    count, epochs = (64, 3) if options.smoke else (options.photographs, options.epochs)
    records = measure(options.out, count=count, epochs=epochs)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(options.out / "data_wait.json", {"records": records, "versions": versions})
    with atomic_path(options.out / "data_wait.md") as temporary:
        temporary.write_text(table(records), encoding="utf-8")
    print(table(records), end="")


if __name__ == "__main__":
    main()
