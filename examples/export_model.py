"""Write encoder and decoding step as programs that torch alone runs, and generate with them.

    python examples/export_model.py                       # an untrained model, to see the calls
    python examples/export_model.py out/demo/pretrain     # a trained one

What one learns: what a program takes, that one serves any number of images and any step, and how the loop
around it looks where mage_fast is not installed. Writes encoder.pt2 and step.pt2; prints that the ids are
those of the model itself.
"""

from __future__ import annotations

import sys

import torch

from mage_fast import MAGE, MAGEConfig, SamplerConfig, generate_ids, use_implementation
from mage_fast.export import export_decoding_step, export_encoder

torch.manual_seed(0)
small = MAGEConfig.tiny(encoder_depth=1, decoder_depth=1, tokenizer=None)
model = MAGE.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else MAGE(small).eval()
config, steps, batch, seed = model.config, 6, 5, 7

torch.export.save(export_encoder(model, "ids"), "encoder.pt2")
torch.export.save(export_decoding_step(model, SamplerConfig(steps=steps)), "step.pt2")

# The loop needs torch alone: the numbers of config are in config.json
encoder, step = (torch.export.load(name).module() for name in ("encoder.pt2", "step.pt2"))
ids = torch.full((batch, config.num_tokens), config.mask_token_id)
class_ids = torch.full((batch,), config.codebook_size + config.unconditional_class)
num_unknown = (ids == config.mask_token_id).sum(1)
for t in range(steps):
    decided, ids = step(ids, class_ids, num_unknown, torch.arange(batch), torch.tensor([seed, t]))
features = encoder(decided)

with use_implementation("reference"):
    wanted = generate_ids(model, batch, config=SamplerConfig(steps=steps), seed=seed)
    error = (features - model.features(wanted)).abs().max()
print("same ids as the model's own:", torch.equal(decided, wanted))
print(f"features {tuple(features.shape)}, {error:.1e} away from the model's own")
