"""A newcomer's hour: every command of MAGE once, on images of your own, each printed before it runs.

    python examples/newcomers_hour.py                        # on digits that it writes as PNGs first
    python examples/newcomers_hour.py --photos my_photos     # on yours: one sub-folder a class
    python examples/newcomers_hour.py --quick                # all steps in two minutes, nothing well trained

Before: `make setup` in a clone, or `pip install --no-build-isolation .` beside the torch you have. No GPU is
needed. It takes about a quarter of an hour on two CPU cores. Stop it with Ctrl-C: the same command goes on.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

#: Side of the images that the tokenizer sees, in pixels; a multiple of 4.
IMAGE_SIZE = 32


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def mage_fast(verb: str, *options: object) -> None:
    """Run a command of the command line, with the Python that runs this."""
    words = [str(option) for option in options]
    print("$ mage-fast", shlex.join([verb, *words]), flush=True)
    done = subprocess.run([sys.executable, "-m", "mage_fast.cli", verb, *words])
    if done.returncode != 0:
        sys.exit(f"mage-fast {verb} ended with code {done.returncode}: what it says above is why")


def write_digits(folder: Path, how_many: int) -> None:
    """scikit-learn's handwritten digits as PNG files, one sub-folder a class: photos/3/0042.png."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if number < how_many:
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((image * 15.9).astype("uint8")).convert("RGB")
            picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(
                folder / str(label) / f"{number:04d}.png"
            )


def right_half(photos: Path) -> tuple[Path, tuple[int, int, int, int]]:
    """The first image that can be read, and (left, top, right, bottom) of its right half in pixels."""
    from PIL import Image

    for path in sorted(photos.rglob("*.*")):
        try:
            width, height = Image.open(path).size
        except OSError:
            continue
        return path, (width // 2, 0, width, height)
    sys.exit(f"newcomers_hour: no image in {photos}")


def accelerate_a_model_of_your_own() -> None:
    """A plain PyTorch model, here this package's own, before and after ``mage_fast.accelerate``."""
    import torch

    import mage_fast
    from mage_fast import reference  # any class whose parameters have the published names will do

    torch.manual_seed(0)
    model = reference.MAGE(
        grid_size=8, codebook_size=64, encoder_width=96, encoder_depth=4, encoder_heads=3,
        decoder_width=96, decoder_depth=2, decoder_heads=3,
    )  # fmt: skip
    ids = torch.randint(64, (16, 64))

    def milliseconds_a_step() -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            loss, _logits, _mask = model(ids)
            loss.backward()
            times.append(time.perf_counter() - start)
        return 1000 * min(times)

    before = milliseconds_a_step()
    accelerated = mage_fast.accelerate(model)
    print(accelerated)
    print(f"one training step: {before:.1f} ms before, {milliseconds_a_step():.1f} ms after")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of images, one sub-folder a class")
    parser.add_argument("--out", type=Path, default=Path("out/hour"), help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args()
    out, quick = arguments.out, arguments.quick
    if arguments.photos is not None and not arguments.photos.is_dir():
        sys.exit(f"newcomers_hour: --photos {arguments.photos}: no such folder")

    say("1. What runs here: is the C++ extension there, is a GPU?")
    mage_fast("env")

    say("2. The demo: tokenizer, pre-training, samples and a probe on handwritten digits")
    short = ("--tokenizer-steps", 10, "--epochs", 1) if quick else ()
    mage_fast("demo", "--out", out / "demo", *short)
    print("Open in a browser:", out / "demo/report.html")

    photos = arguments.photos
    if photos is None:
        photos = out / "photos"
        say(f"3. Images of our own: digits as PNG files in {photos}, one sub-folder a class")
        write_digits(photos, 200 if quick else 1797)
    else:
        say(f"3. Images of our own: {photos}")
    data = f"folder:{photos}"

    say("4. A tokenizer: each image becomes a grid of 8 x 8 numbers, and back")
    steps = ("--steps", 10 if quick else 400, "--model.image-size", IMAGE_SIZE)
    mage_fast("train-tokenizer", "--data", data, "--out", out / "tokenizer", *steps)

    say("5. All images as tokens, twice, cropped a little differently: training then needs no images")
    views = ("--views", 2, "--augment", "weak-no-flip")
    mage_fast("tokenize", "--data", data, "--tokenizer", out / "tokenizer", "--out", out / "tokens", *views)

    say("6. Pre-training: guess the masked tokens")
    tokens, epochs = f"tokens:{out / 'tokens'}", ("--epochs", 2 if quick else 60, "--warmup-epochs", 1)
    model = out / "pretrain"
    mage_fast("pretrain", "--data", tokens, "--tokenizer", out / "tokenizer", "--out", model, *epochs)

    say("7. New images, from nothing")
    mage_fast("generate", "--model", model, "--out", out / "generated", "--count", 16, "--animate")
    print("Look at:", out / "generated/grid.png", "and", out / "generated/animation.webp")

    picture, box = right_half(photos)
    say(f"8. Edit an image: the right half of {picture} is made anew, three times")
    mage_fast("edit", "--model", model, "--images", picture, "--out", out / "edited", "--box", *box)
    print("Look at:", out / "edited/grid.png", "(above: the image, and what the model sees of it)")

    if sum(path.is_dir() for path in photos.iterdir()) > 1:
        say("9. What the encoder has learned: a linear classifier on its features")
        mage_fast("probe", "--model", model, "--data", data, "--out", out / "probe")
    else:
        say("9. A linear probe wants one sub-folder a class: left out")

    say("10. The same kernels under a plain PyTorch model: put yours in the place of reference.MAGE")
    accelerate_a_model_of_your_own()

    say("Made in this hour")
    for name, what in (
        ("demo/report.html", "the demo's report"),
        ("tokenizer", "a tokenizer: mage_fast.VQGAN.from_pretrained(...)"),
        ("tokens", "the images as tokens"),
        ("pretrain", "a model: mage_fast.MAGE.from_pretrained(...)"),
        ("generated/grid.png", "new images"),
        ("edited/grid.png", "edited images"),
        ("probe/probe.json", "how well the probe classifies"),
    ):
        if (out / name).exists():
            print(f"{out / name}: {what}")
    print("Next: the other files of examples/, each on one thing, and docs/pretraining.md for long runs.")


if __name__ == "__main__":
    main()
