"""The model, optimisers and losses of tokenizer training, one step of them, and the held-out measures.

Shape suffixes: B images, H and W pixels, C channels, h and w tokens, L = h * w, N = B * L, K codes, D = C.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.recipes.loading import precision_context
from mage_fast.tokenizer import VQGAN
from mage_fast.training.adversarial import PatchDiscriminator, adaptive_weight, hinge_loss
from mage_fast.training.codebook import CodebookEma, CodeUsage, perplexity
from mage_fast.training.data import Batch, batches
from mage_fast.training.metrics import psnr_db
from mage_fast.training.optim import adamw_parameter_groups, build_adamw
from mage_fast.training.perceptual import PerceptualDistance
from mage_fast.training.run_state import Part
from mage_fast.training.schedule import cosine_lr, set_lr
from mage_fast.training.sources import Source

if TYPE_CHECKING:
    from mage_fast.recipes.train_tokenizer import TrainTokenizerConfig

GRID_PAIRS = 16


class Trainer:
    """Model, codebook averages, optimisers, and one step of them."""

    def __init__(self, config: TrainTokenizerConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.perceptual: PerceptualDistance | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = VQGAN(config.model).to(device)
            self.discriminator: PatchDiscriminator | None = None
            if config.adversarial_weight > 0:
                discriminator = PatchDiscriminator(config.model.image_size, config.discriminator_width)
                self.discriminator = discriminator.to(device)
        self.codebook_KD = self.model.quantize.embedding.weight.requires_grad_(False)
        usage = CodebookEma if config.codebook == "ema" else CodeUsage
        self.usage = usage(
            config.model.codebook_size, decay=config.ema_decay, dead_below=config.dead_below
        ).to(device)
        groups = adamw_parameter_groups(self.model, config.weight_decay)
        if config.codebook == "loss":
            groups.append({"params": [self.codebook_KD.requires_grad_()], "weight_decay": 0.0})
        self.optimizer = build_adamw(groups, config.lr, config.betas)
        self.weights = [p for group in groups for p in group["params"]]
        #: What a run's state consists of.
        self.parts: dict[str, Part] = {
            **{"model": self.model, "codebook": self.usage, "optimizer": self.optimizer}
        }
        if self.discriminator is not None:
            optimizer = build_adamw(self.discriminator, config.lr, config.betas, 0.0)
            self.parts |= {"discriminator": self.discriminator, "discriminator_optimizer": optimizer}
            self.discriminator_optimizer = optimizer

    def step(self, batch: Batch, step: int) -> dict[str, float | Tensor]:
        """Losses, gradients, optimisers, codebook; returns the metrics to log."""
        config = self.config
        # channels_last: a step is a tenth quicker on CPUs, and tensor cores want it
        images_B3HW = batch.inputs.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        lr = cosine_lr(step, total_steps=config.steps, warmup_steps=config.warmup_steps, base_lr=config.lr)
        if step == 0:
            with torch.no_grad(), self._autocast():
                z_ND = _rows(self.model.encode_features(images_B3HW))
            self.usage.initialise(self.codebook_KD, z_ND, seed=config.seed)

        with self._autocast():
            reconstruction = self.model(images_B3HW)
        decoded_B3HW, z_BChw = reconstruction.images.float(), reconstruction.z.float()
        error_B3HW = decoded_B3HW - images_B3HW
        metrics: dict[str, Any] = {
            "reconstruction": error_B3HW.abs().mean() + error_B3HW.square().mean(),
            "commitment": F.mse_loss(z_BChw, reconstruction.z_q.detach()),
        }
        pixels = metrics["reconstruction"]
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(decoded_B3HW, images_B3HW)
            pixels = pixels + config.perceptual_weight * metrics["perceptual"]
        loss = pixels + config.commitment_weight * metrics["commitment"]
        if config.codebook == "loss":
            metrics["codebook"] = F.mse_loss(reconstruction.z_q, z_BChw.detach())
            loss = loss + metrics["codebook"]
        adversarial = self.discriminator is not None and step >= config.adversarial_start
        if adversarial:
            metrics |= self._adversarial(decoded_B3HW, pixels)
            loss = loss + config.adversarial_weight * metrics["adaptive_weight"] * metrics["adversarial"]

        self.optimizer.zero_grad()
        loss.backward()
        gradient_norm = torch.nn.utils.get_total_norm(p.grad for p in self.weights if p.grad is not None)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        if adversarial:
            metrics["discriminator"] = self._discriminate(images_B3HW, decoded_B3HW.detach(), lr)
        ids_N = reconstruction.ids.flatten()
        counts_K, revived = self.usage.update(
            self.codebook_KD, _rows(z_BChw.detach()), ids_N, seed=config.seed, step=step + 1
        )
        return {
            **{"loss": loss, **metrics, "gradient_norm": gradient_norm, "lr": lr},
            **{"perplexity": perplexity(counts_K), "codes": (counts_K > 0).sum(), "revived": revived},
        }

    def _autocast(self) -> AbstractContextManager:
        return precision_context(self.config.precision, self.device)

    def _adversarial(self, decoded_B3HW: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """The generator's adversarial loss and what balances it with the loss of the pixels."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        with self._autocast():
            scores = self.discriminator(decoded_B3HW)
        self.discriminator.requires_grad_(True)
        loss = -scores.float().mean()
        return {
            "adversarial": loss,
            "adaptive_weight": adaptive_weight(pixels, loss, self.model.decoder.conv_out.weight),
        }

    def _discriminate(self, images_B3HW: Tensor, decoded_B3HW: Tensor, lr: float) -> Tensor:
        """One step of the discriminator; its loss."""
        assert self.discriminator is not None
        with self._autocast():
            real, fake = self.discriminator(images_B3HW), self.discriminator(decoded_B3HW)
        loss = hinge_loss(real.float(), fake.float())
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        set_lr(self.discriminator_optimizer, lr)
        self.discriminator_optimizer.step()
        return loss


@torch.no_grad()
def evaluate(
    model: VQGAN, source: Source, batch_size: int, workers: int = 0
) -> tuple[dict[str, float], Float[Tensor, "pairs 3 H W"]]:
    """PSNR and codes used over a whole source in float32, and pairs of images and reconstructions.

    Returns:
        ``psnr_db`` (mean over images, reconstructions clamped to [0, 1]), ``codes_used``, ``perplexity``,
        ``images``; and up to 16 pairs, [2 * pairs, 3, H, W] in [0, 1], on the CPU.
    """
    codebook_KD = model.quantize.embedding.weight
    used_K = torch.zeros(len(codebook_KD), device=codebook_KD.device)
    total_db, images = 0.0, 0
    pairs: list[Tensor] = []
    stream = batches(
        source,
        min(batch_size, len(source)),
        shuffle=True,  # the pairs then show several classes of a sorted folder
        drop_last=False,
        on_bad_file="drop",
        workers=workers,
    )
    for batch in stream:
        originals_B3HW = batch.inputs.to(codebook_KD.device)
        ids_BL = model.encode(originals_B3HW)
        decoded_B3HW = model.decode(ids_BL).clamp(0, 1)
        used_K += torch.bincount(ids_BL.flatten(), minlength=len(used_K))
        total_db += psnr_db(decoded_B3HW, originals_B3HW) * len(ids_BL)
        images += len(ids_BL)
        missing = GRID_PAIRS - len(pairs)
        pairs += torch.stack([originals_B3HW, decoded_B3HW], 1)[: max(0, missing)].cpu().unbind()
    if not images:
        raise InputError(f"{source.spec}: none of its {len(source)} images is readable")
    metrics = {
        **{"psnr_db": total_db / images, "codes_used": int((used_K > 0).sum())},
        **{"perplexity": perplexity(used_K).item(), "images": images},
    }
    return metrics, torch.cat(pairs)


def _rows(z_BChw: Tensor) -> Tensor:
    """Features as float32 rows [N, C]."""
    return z_BChw.float().permute(0, 2, 3, 1).flatten(0, 2)
