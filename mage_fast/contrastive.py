"""MAGE-C: MAGE with a contrastive loss on the encoder's output (MAGE section 3.1, equations 2 and 3).

Shape suffixes: B samples, two views of B / 2 images, the first views first; N images of this rank, M of all
ranks; L tokens; T packed encoder rows, V visible ones; D features; C codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from mage_fast import hub
from mage_fast.config import MAGEConfig
from mage_fast.kernels import check
from mage_fast.kernels.ops.linear_cross_entropy.api import linear_cross_entropy
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.linear import Linear
from mage_fast.loss import reconstruction_loss
from mage_fast.model import MAGE
from mage_fast.tokenizer import Tokenizer

#: Features that InfoNCE compares.
PROJECTION_WIDTH = 256
_PROJECTOR = "projector."


def info_nce(
    z_ND: Float[Tensor, "N D"],
    positive_ND: Float[Tensor, "N D"],
    *,
    temperature: float = 0.2,
    group: torch.distributed.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of two views, each contrasted with the other views of all ranks, averaged over the two.

    Equivalent PyTorch, on one process::

        z, positive = F.normalize(z, dim=1), F.normalize(positive, dim=1)
        logits, targets = z @ positive.T / temperature, torch.arange(N)
        (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    The mean over ranks of the ranks' losses is the loss of all their rows on one process; likewise the
    gradients, as ``DistributedDataParallel`` averages them. The square of logits is never held. Without
    autocast, whatever surrounds the call.

    Args:
        z_ND: features of the first views, of any length but 0; float64, float32, bfloat16 or float16.
        positive_ND: features of the second views of the same images, in the same dtype.
        temperature: what cosines are divided by.
        group: ranks to contrast with, by default all there are. Each of them must call, with the same N.

    Returns:
        The mean in nats, computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that disagree, no row, a temperature that is not positive.

    Source: MAGE equation 2; how it is read: docs/adr/0012.
    """
    check.shape("info_nce", "z", z_ND, (None, None))
    check.floating("info_nce", "z", z_ND)
    check.features("info_nce", "z", z_ND)
    if z_ND.shape[0] == 0:
        raise ValueError(f"info_nce: z has shape {tuple(z_ND.shape)}, wanted at least 1 row")
    check.shape("info_nce", "positive", positive_ND, tuple(z_ND.shape))
    check.dtype("info_nce", "positive", positive_ND, (z_ND.dtype,))
    check.same_device("info_nce", z_ND, positive=positive_ND)
    _check_temperature("info_nce", temperature)
    dtype = torch.promote_types(z_ND.dtype, torch.float32)
    with torch.autocast(z_ND.device.type, enabled=False):
        z_ND, positive_ND = (F.normalize(x.to(dtype), dim=1) for x in (z_ND, positive_ND))
        all_z_MD, all_positive_MD, first = _of_all_ranks(z_ND, positive_ND, group)
        targets_N = torch.arange(first, first + z_ND.shape[0], device=z_ND.device)
        losses = [
            linear_cross_entropy(x_ND / temperature, other_MD, None, targets_N, label_smoothing=0.0)
            for x_ND, other_MD in ((z_ND, all_positive_MD), (positive_ND, all_z_MD))
        ]
        return (losses[0] + losses[1]) / 2


def _of_all_ranks(
    z_ND: Tensor, positive_ND: Tensor, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, Tensor, int]:
    """Both views of all ranks, in the order of the ranks, and this rank's first row.

    Gradients of all ranks add up on the way back, as each rank's loss reads all rows.
    """
    distributed = torch.distributed
    if group is None and distributed.is_available() and distributed.is_initialized():
        group = distributed.group.WORLD
    if group is None or group.size() == 1:
        return z_ND, positive_ND, 0
    from torch.distributed import _functional_collectives as collectives

    if hasattr(collectives, "all_gather_single_autograd"):  # torch >= 2.13
        gather = collectives.all_gather_single_autograd
    else:
        gather = collectives.all_gather_tensor_autograd
    rows, rank = len(z_ND), group.rank()
    both = collectives.wait_tensor(gather(torch.cat([z_ND, positive_ND]), 0, group))
    both = both.unflatten(0, (-1, 2, rows))
    return both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1), rank * rows


def pool_tokens(encoded_TD: Float[Tensor, "T D"], plan: MaskPlan) -> Float[Tensor, "B D"]:
    """Mean of each sample's packed rows without the class token's, which stands in where it is alone.

    Equivalent PyTorch, sample by sample::

        class_row, *token_rows = encoded[cu_seqlens[b] : cu_seqlens[b + 1]]
        torch.stack(token_rows or [class_row]).mean(0)

    Args:
        encoded_TD: all packed rows of the encoder; the mean adds up in float32 (float64 for float64).
        plan: of these rows. Nothing of it is read on the host.
    """
    batch, positions = plan.source_BS.shape
    grid_RD = encoded_TD.new_zeros(batch * positions, encoded_TD.shape[1])
    # a row for each position: no two rows add up out of order, so a GPU too gives the same bits each time
    x_BSD = grid_RD.index_copy(0, plan.positions_T.long(), encoded_TD).unflatten(0, (batch, positions))
    tokens_B1 = plan.cu_seqlens.diff()[:, None] - 1
    sum_BD = x_BSD[:, 1:].sum(1, dtype=torch.promote_types(encoded_TD.dtype, torch.float32))
    return torch.where(tokens_B1 > 0, sum_BD / tokens_B1.clamp(min=1), x_BSD[:, 0])


def without_projector(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a plain :class:`~mage_fast.MAGE`, from one of a :class:`MAGEC`."""
    return {name: x for name, x in state.items() if not name.startswith(_PROJECTOR)}


class MAGECOutput(NamedTuple):
    """What a training forward of :class:`MAGEC` gives: :class:`~mage_fast.MAGEOutput` and both losses."""

    #: ``reconstruction_loss + contrastive_weight * contrastive_loss``, to be minimised.
    loss: Float[Tensor, ""]
    #: Scores of the codebook's ids at the masked tokens, in the order of ``plan.masked_index_N``.
    logits_NC: Float[Tensor, "N C"]
    ids_BL: Int64[Tensor, "B L"]
    plan: MaskPlan
    reconstruction_loss: Float[Tensor, ""]
    contrastive_loss: Float[Tensor, ""]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What a training run logs: scalars on the device, without gradient."""
        names = ("loss", "reconstruction_loss", "contrastive_loss")
        return {name: getattr(self, name).detach() for name in names}


class MAGEC(MAGE):
    """MAGE-C: two views of each image, reconstructed and contrasted from one forward pass.

    >>> model = MAGEC(MAGEConfig.vit_b())
    >>> output = model(torch.stack([views_1, views_2]))     # [2, B, 3, 256, 256] in [0, 1]
    >>> output.loss.backward()
    >>> model.save_pretrained(folder)                       # a plain MAGE

    The projector, a two-layer perceptron over the mean of the encoder's tokens, belongs to training: it is
    in the state dict and not in what :meth:`save_pretrained` writes. Everything else is as in :class:`MAGE`.

    Args:
        config: as of :class:`MAGE`.
        tokenizer: as of :class:`MAGE`.
        contrastive_weight: lambda of equation 3.
        temperature: tau of equation 2.

    Raises:
        ValueError: a weight that is negative or not finite, a temperature that is not positive.

    Source: MAGE section 3.1, "Contrastive Co-training"; choices it leaves open: docs/adr/0012.
    """

    def __init__(
        self,
        config: MAGEConfig,
        tokenizer: Tokenizer | None = None,
        *,
        contrastive_weight: float = 0.1,
        temperature: float = 0.2,
    ) -> None:
        if not (math.isfinite(contrastive_weight) and contrastive_weight >= 0):
            raise ValueError(f"MAGEC: contrastive_weight is {contrastive_weight}, wanted at least 0")
        _check_temperature("MAGEC", temperature)
        super().__init__(config, tokenizer)
        self.contrastive_weight, self.temperature = contrastive_weight, temperature
        width = config.encoder_width
        self.projector = nn.Sequential(Linear(width, width), nn.ReLU(), Linear(width, PROJECTION_WIDTH))
        for module in self.projector:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def tokenize(self, images_or_ids: Tensor) -> Int64[Tensor, "B L"]:
        """As :meth:`MAGE.tokenize`; two views ``[2, N, ...]`` become ``[2 N, L]``, the first views first.

        Raises:
            ValueError: another number of views; what :meth:`MAGE.tokenize` raises.
        """
        return super().tokenize(_flattened(images_or_ids))

    def forward(  # type: ignore[override]
        self,
        images_or_ids: Tensor,
        labels_B: Int[Tensor, "B"] | None = None,
        *,
        mask_ratios_B: Float[Tensor, "B"] | None = None,
        plan: MaskPlan | None = None,
        rng_state: Int64[Tensor, "2"] | None = None,
    ) -> MAGECOutput:
        """Both training losses of two views of each image, contrasted with those of all ranks.

        Where there are several ranks each of them must call, with as many images.

        Args:
            images_or_ids: images ``[2, N, 3, H, W]`` or ids ``[2, N, L]``, or flattened: ``[2 N, 3, H, W]``
                or ``[2 N, L]``, all first views first.
            labels_B: class labels of the N images or of the 2 N views; None is unconditional.
            mask_ratios_B: as of :meth:`MAGE.forward`, a ratio for each view.
            plan: as there, of 2 N samples.
            rng_state: as there.

        Raises:
            ValueError: an odd number of samples; what :meth:`MAGE.forward` raises.
        """
        images_or_ids = _flattened(images_or_ids)
        samples = images_or_ids.shape[0] if images_or_ids.dim() else 1
        if samples % 2:
            raise ValueError(f"MAGEC: got {samples} samples, wanted two views of each image: an even number")
        if labels_B is not None and labels_B.shape == (samples // 2,):
            labels_B = labels_B.repeat(2)
        ids_BL, inputs, class_ids_B, plan, rng_state = self._masked(
            images_or_ids, labels_B, mask_ratios_B, plan, rng_state
        )
        x_TD = self.embedding(inputs, class_ids_B, plan, rng_state)
        encoded_TD = self.encoder(x_TD, plan, rng_state, all_rows=True)
        visible_VD = encoded_TD if plan.visible_V is None else encoded_TD.index_select(0, plan.visible_V)
        logits_NC = self.decode_masked(visible_VD, plan, rng_state)
        reconstruction = reconstruction_loss(
            logits_NC, ids_BL, plan.masked_index_N, self.config.label_smoothing
        )
        views = self.projector(pool_tokens(encoded_TD, plan)).chunk(2)
        contrastive = info_nce(*views, temperature=self.temperature)
        loss = reconstruction + self.contrastive_weight * contrastive
        return MAGECOutput(loss, logits_NC, ids_BL, plan, reconstruction, contrastive)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the plain MAGE, see :meth:`MAGE.save_pretrained`."""
        hub.save(self, folder, without_projector(self.state_dict()))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, tokenizer: Tokenizer | None = None, *, revision: str | None = None
    ) -> MAGE:
        """The plain MAGE that :meth:`save_pretrained` wrote, see :meth:`MAGE.from_pretrained`."""
        return MAGE.from_pretrained(path, tokenizer, revision=revision)


def _flattened(images_or_ids: Tensor) -> Tensor:
    """Views ``[2, N, ...]`` one behind the other; whatever else, as it is."""
    name, dimensions = ("images", 5) if images_or_ids.is_floating_point() else ("ids", 3)
    if images_or_ids.dim() != dimensions:
        return images_or_ids
    check.shape("MAGEC", name, images_or_ids, (2, *[None] * (dimensions - 1)))
    return images_or_ids.flatten(0, 1)


def _check_temperature(name: str, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name}: temperature is {temperature}, wanted more than 0")
