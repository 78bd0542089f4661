"""Generating images, ours beside the reference's: twenty decoding steps and the decoded pictures.

Both models have the same weights. Before anything is timed, the logits of partly masked batches are compared,
and the ids of a short decoding with the reference's: its logits, and the sampler's equation in plain PyTorch
(``sample_confident`` on "reference"), fed the same Gumbel noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mage_fast import counts, reference
from mage_fast.benchmark.end_to_end import (
    AMP,
    DTYPES,
    EAGER,
    OURS,
    REFERENCE_COMPILED,
    Candidate,
    Item,
    Twins,
    autocast,
    compiled_reference,
    near,
)
from mage_fast.benchmark.gate import Incorrect
from mage_fast.benchmark.timing import FEWEST_ROUNDS, Run
from mage_fast.decoding import Decoding
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.kernels.roofline import Work
from mage_fast.model import MAGE
from mage_fast.sampler import generate_ids
from mage_fast.sampler_config import SamplerConfig, masked_counts

#: Images at a time, by device type.
BATCHES = {"cuda": (64, 4, 1), "cpu": (4, 1)}
STEPS = 20
#: Rounds at the least on a CPU, where a generation of the reference takes a minute.
_FEWEST_ROUNDS = 2
#: Decoding steps whose ids are compared, and of a warm-up.
_CHECKED_STEPS = 2
#: Of the ids, in float32: rounding may turn a near tie.
_AGREEMENT = 0.99
#: Parts of the tokens that are masked where logits are compared.
_MASKED = (1.0, 0.5, 0.1)


@dataclass
class Generation(Item):
    """Images of one model, so many at a time."""

    suite = "generate"
    twins: Twins
    batch: int
    steps: int = STEPS

    def __post_init__(self) -> None:
        self.device = self.twins.device
        self.name = f"{self.twins.name}/{self.steps}-steps/batch{self.batch}"
        self.fewest_rounds = FEWEST_ROUNDS if self.device == "cuda" else _FEWEST_ROUNDS

    @property
    def shape(self) -> dict[str, Any]:
        return {"batch": self.batch, "steps": self.steps}

    def work(self, dtype: torch.dtype) -> Work:
        config = self.twins.config
        assert config.tokenizer is not None
        flops = counts.decoding(config, self.steps) + counts.tokenizer(config.tokenizer, "decode")
        weights = dtype.itemsize * counts.parameters(config)  # read in every step
        return Work(self.steps * weights, 0, round(self.batch * flops), matrix=True)

    def candidates(self, *, compiled: bool) -> list[Candidate]:
        ours, theirs = self.twins.same_weights()
        ours.eval()
        theirs.eval()
        found = [self._theirs(theirs, EAGER, torch.float32)]
        if self.device == "cuda":
            found.append(self._theirs(theirs, AMP, torch.float16))
        if compiled:
            found.append(self._theirs(compiled_reference(theirs), REFERENCE_COMPILED, torch.bfloat16))
        for dtype in DTYPES:
            run = our_images(ours, self.batch, dtype, self.steps)
            # on a GPU the second batch is captured; on a CPU a short run allocates what a long one does
            short = our_images(ours, self.batch, dtype, _CHECKED_STEPS)
            warm_up = partial(_twice, run) if self.device == "cuda" else short
            found.append(Candidate(OURS, dtype, run, warm_up, partial(self.check, dtype)))
        return found

    def _theirs(self, model: reference.MAGE, name: str, dtype: torch.dtype) -> Candidate:
        def run(steps: int) -> None:
            with torch.no_grad(), autocast(self.device, dtype):
                reference.generate(model, self.batch, steps=steps)

        return Candidate(name, dtype, partial(run, self.steps), partial(run, _CHECKED_STEPS))

    @torch.no_grad()
    def check(self, dtype: torch.dtype) -> str:
        """Logits within tolerance; in float32 the same ids of a short decoding.

        Raises:
            Incorrect: they are not.
        """
        ours, theirs = self.twins.pair
        for part in _MASKED:
            is_masked_BL = self._mask(part)
            ids_BL = self.twins.ids(self.batch)
            wanted_BLC = their_logits(theirs, ids_BL, is_masked_BL)
            with autocast(self.device, dtype):
                got_BLC = ours.logits(ids_BL, is_masked_BL)
            near(f"logits with {part:.0%} of the tokens masked", got_BLC, wanted_BLC, dtype)
        with autocast(self.device, dtype):
            ids_BL = generate_ids(ours, self.batch, config=SamplerConfig(steps=_CHECKED_STEPS), seed=0)
        agreement = float((ids_BL == their_ids(theirs, self.batch, _CHECKED_STEPS)).double().mean())
        if dtype is torch.float32 and agreement < _AGREEMENT:
            raise Incorrect(
                f"{agreement:.2%} of the ids of {_CHECKED_STEPS} steps are the reference's for the same "
                f"noise, wanted {_AGREEMENT:.0%}"
            )
        return f"{agreement:.2%} of ids as the reference's after {_CHECKED_STEPS} steps with the same noise"

    def _mask(self, part: float) -> Tensor:
        length = self.twins.config.num_tokens
        generator = torch.Generator().manual_seed(1)
        order_BL = torch.rand(self.batch, length, generator=generator).argsort(1)
        return (order_BL < round(part * length)).to(self.device)


def our_images(model: MAGE, batch: int, dtype: torch.dtype, steps: int) -> Run:
    """What makes batch after batch as ``mage_fast.generate_batches`` does, in this precision."""
    decode = Decoding(model, SamplerConfig(steps=steps))

    def run() -> Tensor:
        assert model.tokenizer is not None
        with torch.no_grad(), autocast(model.head.bias.device.type, dtype):
            return model.tokenizer.decode(decode(batch, seed=0))

    return run


def _twice(run: Run) -> None:
    run()
    run()


def their_logits(model: reference.MAGE, ids_BL: Tensor, is_masked_BL: Tensor) -> Tensor:
    """The reference's logits over the codebook, nothing dropped."""
    nothing_BL = torch.zeros_like(is_masked_BL)
    x_BSD = model.forward_encoder(ids_BL, nothing_BL, is_masked_BL)
    return model.forward_decoder(x_BSD, nothing_BL, is_masked_BL)[:, 1:, : model.codebook_size].float()


def their_ids(model: reference.MAGE, batch: int, steps: int) -> Tensor:
    """What ``generate_ids`` with seed 0 must give: the reference's logits and the sampler's equation."""
    device, config = model.token_emb.word_embeddings.weight.device, SamplerConfig(steps=steps)
    ids_BL = torch.full((batch, model.num_tokens), model.mask_token_id, device=device)
    unknown_B = torch.full((batch,), model.num_tokens)
    sampled_BL = ids_BL
    for step, left_B in enumerate(masked_counts(config.schedule, steps, unknown_B)):
        sampled_BL, ids_BL = sample_confident(
            their_logits(model, ids_BL, ids_BL == model.mask_token_id),
            *(ids_BL, left_B.to(device)),
            mask_token_id=model.mask_token_id,
            choice_temperature=config.choice_temperature * (1 - (step + 1) / steps),
            rng_state=torch.tensor([0, step], device=device),
            implementation="reference",
        )
    return sampled_BL


def items(twins: list[Twins], *, batch: int | None = None) -> list[Generation]:
    """Every batch size of every model, or one alone."""
    return [
        Generation(twin, size, 3 if twin.smoke else STEPS)
        for twin in twins
        for size in ((batch,) if batch else (2, 1) if twin.smoke else BATCHES[twin.device])
    ]
