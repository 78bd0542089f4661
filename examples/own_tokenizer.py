"""A tokenizer of your own: here the mean colour of each patch, in 64 colours.

    python examples/own_tokenizer.py

What one learns: a tokenizer is any object with codebook_size, grid_size, encode and decode; a MAGE never
trains it. Prints the loss before and after training on plain images; writes plain.png and plain_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast import MAGE, MAGEConfig, SamplerConfig, generate
from mage_fast.recipes.pictures import write_grid


class Colours:
    """4 levels of red, green and blue, 8 x 8 pixels a token."""

    codebook_size, grid_size, patch = 64, 4, 8

    def encode(self, images: Tensor) -> Tensor:
        levels = (F.avg_pool2d(images, self.patch) * 3).round().long().clamp(0, 3)
        return (levels * torch.tensor([16, 4, 1], device=images.device)[:, None, None]).sum(1).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        levels = torch.stack([ids // 16, ids // 4 % 4, ids % 4], 1).float() / 3
        return levels.unflatten(2, (4, 4)).repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)


def plain_images(count: int) -> Tensor:
    """Each of one colour."""
    return torch.rand(count, 3, 1, 1).round().expand(-1, -1, 32, 32)


torch.manual_seed(0)
config = MAGEConfig.tiny(codebook_size=64, dropout=0.0, label_smoothing=0.0, tokenizer=None)
model = MAGE(config, tokenizer=Colours())
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
losses = []
for _ in range(150):
    loss = model(plain_images(64)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} at the start, {losses[-1]:.2f} at the end")
assert losses[-1] < losses[0] - 1
samples = generate(model, 16, config=SamplerConfig(steps=8, choice_temperature=1.0), seed=0)
write_grid(samples, "plain.png", zoom=2)
print("written: plain.png")
model.save_pretrained("plain_model")  # loads with MAGE.from_pretrained("plain_model", tokenizer=Colours())
