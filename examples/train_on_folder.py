"""Train a tokenizer and a MAGE on a folder of images from Python, then generate.

    python examples/train_on_folder.py photos out/photos      # one sub-folder a class
    python examples/train_on_folder.py                        # makes a small folder of coloured squares

What one learns: each command of `mage-fast` is a dataclass of settings and a function `run`; runs go on where
they stopped, and a damaged image is named and left out. Prints the losses and where the samples are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from mage_fast import MAGE, SamplerConfig, TokenizerConfig, generate
from mage_fast.recipes import pretrain, train_tokenizer
from mage_fast.recipes.pictures import write_grid

SIZE = TokenizerConfig(16, 32, 8, 8, (1, 1, 2), 1, 4)  # 16 pixels a side to 4 x 4 tokens of 32 codes
STEPS, EPOCHS = 30, 4  # thousands and hundreds for images worth looking at


def make_squares(folder: Path) -> None:
    for number in range(64):
        name = ("red", "green", "blue")[number % 3]
        path = folder / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16, 16), "black")
        image.paste(name, (number % 8, number // 8, number % 8 + 8, number // 8 + 8))
        image.save(path)


def main(photos: Path | None, out: Path) -> None:
    if photos is None:
        photos = out / "squares"
        make_squares(photos)
    data = f"folder:{photos}"
    tokenizer = train_tokenizer.TrainTokenizerConfig(
        data=data, out=out / "tokenizer", model=SIZE, steps=STEPS, batch_size=16
    )
    print("tokenizer:", train_tokenizer.run(tokenizer)["psnr_db"], "dB on held-out images")
    training = pretrain.PretrainConfig(
        **{"data": data, "tokenizer": tokenizer.out, "out": out / "pretrain"},
        **{"epochs": EPOCHS, "warmup_epochs": 1, "batch_size": 16},
    )
    result = pretrain.run(training)
    print("loss:", result["loss_first"], "at the start,", result["loss_last"], "at the end")
    model = MAGE.from_pretrained(training.out)
    with torch.no_grad():
        write_grid(generate(model, 16, config=SamplerConfig(steps=8), seed=0), out / "samples.png")
    print("samples:", out / "samples.png")


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    main(given[0] if given else None, given[1] if len(given) > 1 else Path("out/train_on_folder"))
