"""Make a part of an image anew, and leave the rest.

    python examples/edit_image.py out/demo/pretrain photo.png     # a trained model, an image
    python examples/edit_image.py                                 # an untrained one and noise

What one learns: a mask is in pixels, the model thinks in tokens; tokens outside of the mask stay exactly as
they were. Prints how many tokens were made anew, and writes edited.png: the image, what is made anew, and
three variants.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image

import mage_fast
from mage_fast import MAGE, MAGEConfig, SamplerConfig
from mage_fast.recipes.pictures import write_grid

words = sys.argv[1:]
torch.manual_seed(0)
model = MAGE.from_pretrained(words[0]) if words else MAGE(MAGEConfig.tiny()).eval()
assert model.config.tokenizer is not None
side = model.config.tokenizer.image_size

image = torch.rand(3, side, side)
if len(words) > 1:
    photo = Image.open(words[1]).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
mask = torch.zeros(side, side, dtype=torch.bool)
mask[:, side // 2 :] = True  # the right half

variants = 3
images, masks = image.expand(variants, -1, -1, -1), mask.expand(variants, -1, -1)
edited = mage_fast.edit(model, images, masks, config=SamplerConfig(steps=8), seed=0)

before = model.tokenize(images)
is_new = edited.is_edited_BL
assert torch.equal(edited.ids_BL[~is_new], before[~is_new])
print(f"{int(is_new[0].sum())} of {is_new.shape[1]} tokens were made anew, the others stayed as they were")
write_grid(torch.stack([image, image.masked_fill(mask, 0.5), *edited.images_B3HW]), "edited.png", columns=5)
print("written: edited.png")
