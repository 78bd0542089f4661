"""MAGE: one model that learns image representations and generates images.

The forward pass is the paper's, in one direction: ids -> mask plan -> embedding of the kept tokens ->
encoder -> decoder -> head and loss at the masked tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self, cast

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from mage_fast import storage
from mage_fast.conditioning import drop_labels
from mage_fast.config import MAGEConfig
from mage_fast.decoder import Decoder
from mage_fast.embedding import TokenEmbedding, feature_size
from mage_fast.encoder import Encoder
from mage_fast.hub import HubMixin, local_path
from mage_fast.kernels import check, rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, plan_of_mask
from mage_fast.loss import TokenHead, reconstruction_loss, rows_of_tokens
from mage_fast.masking import check_mask_ratios, draw_mask_ratios, draw_plan
from mage_fast.tokenizer import VQGAN, FeatureTokenizer, Tokenizer

#: What token ids may come as; caches of tokens are often 16 bits wide.
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8)


class MAGEOutput(NamedTuple):
    """What a training forward gives."""

    #: Mean over the masked tokens, to be minimised.
    loss: Float[Tensor, ""]
    #: Scores of the codebook's ids at the masked tokens, in the order of ``plan.masked_index_N``.
    logits_NC: Float[Tensor, "N C"]
    ids_BL: Int64[Tensor, "B L"]
    plan: MaskPlan

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What a training run logs: scalars on the device, without gradient."""
        return {"loss": self.loss.detach()}


class MAGE(HubMixin, nn.Module):
    """The masked generative encoder with its tokenizer.

    >>> model = MAGE(MAGEConfig.vit_b())
    >>> loss = model(images).loss                     # images [B, 3, 256, 256] in [0, 1]
    >>> features = model.features(images)             # [B, 768]
    >>> images = mage_fast.generate(model, 16)        # [16, 3, 256, 256]

    The tokenizer is frozen. Pass ``tokenizer=`` for one of your own (see :class:`Tokenizer`).

    Source: MAGE sections 3.1 and 3.2.
    """

    def __init__(self, config: MAGEConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config, feature_size(config, tokenizer))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = TokenHead(config)
        self._initialize()
        if tokenizer is None and config.tokenizer is not None:
            tokenizer = VQGAN(config.tokenizer)
        if tokenizer is not None and tokenizer.codebook_size != config.codebook_size:
            raise ValueError(
                f"MAGE: the tokenizer has {tokenizer.codebook_size} codes, the model {config.codebook_size}"
            )
        self.tokenizer = tokenizer
        if isinstance(tokenizer, nn.Module):
            tokenizer.requires_grad_(False).eval()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.decoder.position_embeddings, std=0.02)
        if self.decoder.mask_token is not None:
            nn.init.normal_(self.decoder.mask_token, std=0.02)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the frozen tokenizer, which stays in eval mode."""
        super().train(mode)
        if isinstance(self.tokenizer, nn.Module):
            self.tokenizer.eval()
        return self

    @property
    def _device(self) -> torch.device:
        return self.embedding.position_embeddings.weight.device

    def tokenize(self, images_or_ids: Tensor) -> Int64[Tensor, "B L"]:
        """Codebook ids, on the model's device, of images ``[B, 3, H, W]`` in [0, 1] or of ids of any
        integer dtype.

        Raises:
            ValueError: neither of the two, images for a model without a tokenizer, another number of tokens
                than the model's, or (read on the CPU only) an id outside the codebook.
        """
        ids_BL = images_or_ids
        if images_or_ids.is_floating_point():
            if self.tokenizer is None:
                raise ValueError("MAGE: got images, but this model has no tokenizer; give ids [B, L]")
            with torch.no_grad():
                ids_BL = self.tokenizer.encode(images_or_ids)
        return self._checked_ids(ids_BL)

    def _encoder_inputs(self, images_or_ids: Tensor) -> tuple[Int64[Tensor, "B L"], Tensor]:
        """Ids, and what the encoder sees of them: the same, or the features ``[B, L, C]`` of images."""
        if self.config.encoder_input == "tokens":
            ids_BL = self.tokenize(images_or_ids)
            return ids_BL, ids_BL
        if not images_or_ids.is_floating_point():
            raise ValueError(
                'MAGE: got ids, wanted images [B, 3, H, W]: this model\'s encoder_input is "features", what '
                "the tokenizer computes before it quantizes"
            )
        tokenizer = cast(FeatureTokenizer, self.tokenizer)
        with torch.no_grad():
            ids_BL, features_BLC = tokenizer.encode_with_features(images_or_ids)
        ids_BL = self._checked_ids(ids_BL)
        check.shape("MAGE", "features", features_BLC, (*ids_BL.shape, tokenizer.feature_size))
        position = self.embedding.position_embeddings.weight
        return ids_BL, features_BLC.to(position.device, position.dtype, non_blocking=True)

    def _checked_ids(self, ids_BL: Tensor) -> Int64[Tensor, "B L"]:
        check.dtype("MAGE", "ids", ids_BL, _ID_DTYPES)
        check.shape("MAGE", "ids", ids_BL, (None, self.config.num_tokens))
        ids_BL = ids_BL.to(torch.int64)
        check.values("MAGE", "ids", ids_BL, 0, self.config.codebook_size)
        return ids_BL.to(self._device, non_blocking=True)

    def class_ids(self, labels_B: Int[Tensor, "B"] | None, batch: int) -> Int64[Tensor, "B"]:
        """Ids of the first position: ``codebook_size + label``, or the unconditional id.

        Raises:
            ValueError: labels that are not integers, another number of them than samples, or (read on the
                CPU only) one outside the model's classes or equal to the unconditional class.
        """
        config, device = self.config, self._device
        if labels_B is None:
            return torch.full((batch,), config.unconditional_class_id, device=device)
        check.integer("MAGE", "labels", labels_B)
        check.shape("MAGE", "labels", labels_B, (batch,))
        check.values("MAGE", "labels", labels_B, 0, config.num_classes or config.class_slots)
        unconditional = config.unconditional_class
        if check.readable(labels_B) and bool((labels_B == unconditional).any()):
            raise ValueError(
                f"MAGE: labels holds {unconditional}, which is no class here but stands for none: for "
                f"samples without a class give no labels, and for more than {unconditional} classes make the "
                "model with config.for_classes(...)"
            )
        return labels_B.to(device, torch.int64, non_blocking=True) + self.config.codebook_size

    def forward(
        self,
        images_or_ids: Tensor,
        labels_B: Int[Tensor, "B"] | None = None,
        *,
        mask_ratios_B: Float[Tensor, "B"] | None = None,
        plan: MaskPlan | None = None,
        rng_state: Int64[Tensor, "2"] | None = None,
    ) -> MAGEOutput:
        """The training loss of a batch.

        Args:
            images_or_ids: images ``[B, 3, H, W]`` in [0, 1], or ids ``[B, L]``; images alone where
                ``encoder_input="features"``.
            labels_B: class labels for class-conditional training; None is unconditional. In training mode
                ``label_dropout`` of them are replaced by the unconditional class.
            mask_ratios_B: mask ratios on the CPU; drawn from the configured law by default.
            plan: a mask plan, in place of ratios.
            rng_state: int64 ``(seed, step)`` that governs masks and dropouts. Drawn from torch's global
                generator by default, so that ``torch.manual_seed`` makes a run repeatable. Give it on the
                CPU: ratios are drawn there, the rest on the model's device.

        Raises:
            ValueError: images or ids of a wrong shape, ids outside the codebook, ratios outside [0, 1],
                ratios beside a plan.
        """
        ids_BL, inputs, class_ids_B, plan, rng_state = self._masked(
            images_or_ids, labels_B, mask_ratios_B, plan, rng_state
        )
        logits_NC = self.masked_logits(inputs, class_ids_B, plan, rng_state)
        loss = reconstruction_loss(logits_NC, ids_BL, plan.masked_index_N, self.config.label_smoothing)
        return MAGEOutput(loss, logits_NC, ids_BL, plan)

    def _masked(
        self,
        images_or_ids: Tensor,
        labels_B: Tensor | None,
        mask_ratios_B: Tensor | None,
        plan: MaskPlan | None,
        rng_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, MaskPlan, Tensor]:
        """Arguments of a forward -> ``(ids_BL, encoder's inputs, class_ids_B, plan, rng_state)``, on the
        model's device.
        """
        ids_BL, inputs = self._encoder_inputs(images_or_ids)
        batch = ids_BL.shape[0]
        if rng_state is None:
            rng_state = rng.new_state()
        device_state = rng_state.to(ids_BL.device, non_blocking=True)
        if plan is None:
            if mask_ratios_B is None:
                if rng_state.device.type != "cpu":
                    raise ValueError(
                        f"MAGE: rng_state is on {rng_state.device} and there are no mask_ratios, wanted it "
                        "on the CPU (drawing ratios elsewhere would wait for the device)"
                    )
                mask_ratios_B = draw_mask_ratios(self.config, batch, rng_state)
            check_mask_ratios(mask_ratios_B, batch)
            plan = draw_plan(self.config, mask_ratios_B, device_state)
        elif mask_ratios_B is not None:
            raise ValueError("MAGE: got both plan and mask_ratios, wanted one of them")
        class_ids_B = self.class_ids(labels_B, batch)
        if labels_B is not None and self.training:
            class_ids_B = drop_labels(class_ids_B, self.config, device_state)
        return ids_BL, inputs, class_ids_B, plan, device_state

    def _dropout_state(self, rng_state: Tensor | None) -> Tensor | None:
        """The given state on the model's device; drawn from torch's generator where dropout wants one."""
        if rng_state is None and self.training and self.config.dropout > 0.0:
            rng_state = rng.new_state()
        return None if rng_state is None else rng_state.to(self._device, non_blocking=True)

    def decode_features(
        self,
        inputs: Tensor,
        class_ids_B: Tensor,
        plan: MaskPlan,
        rng_state: Tensor | None,
    ) -> Float[Tensor, "R D"]:
        """Decoder output (embedding, encoder, decoder) at each position, ``[B * S, D]``."""
        x_TD = self.embedding(inputs, class_ids_B, plan, rng_state)
        return self.decoder(self.encoder(x_TD, plan, rng_state), plan, rng_state)

    def masked_logits(
        self,
        inputs: Int[Tensor, "B L"] | Float[Tensor, "B L C"],
        class_ids_B: Int[Tensor, "B"],
        plan: MaskPlan,
        rng_state: Int64[Tensor, "2"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """Scores of the codebook's ids at the plan's masked tokens, in the order of ``plan.masked_index_N``.

        The decoder's last block and the head compute these rows only.

        Args:
            inputs: ids of the vocabulary, or features where ``encoder_input="features"``; which ones stand
                at masked tokens does not matter.
            class_ids_B: ids of the first position, see :meth:`class_ids`.
            plan: what is masked, and what the encoder sees.
            rng_state: int64 ``(seed, step)`` of the dropout, on the model's device.
        """
        x_TD = self.embedding(inputs, class_ids_B, plan, rng_state)
        return self.decode_masked(self.encoder(x_TD, plan, rng_state), plan, rng_state)

    def decode_masked(
        self, encoded_VD: Float[Tensor, "V D"], plan: MaskPlan, rng_state: Tensor | None
    ) -> Float[Tensor, "N C"]:
        """The second half of :meth:`masked_logits`: decoder and head behind the encoder's visible rows."""
        rows_N = rows_of_tokens(plan.masked_index_N, plan.is_masked_BL.shape[1])
        masked_ND = self.decoder(encoded_VD, plan, rng_state, rows_N)
        return self.head(masked_ND, self.embedding.word_embeddings.weight)

    def logits(
        self,
        ids_BL: Int[Tensor, "B L"],
        is_masked_BL: Bool[Tensor, "B L"],
        class_ids_B: Int[Tensor, "B"] | None = None,
        *,
        num_masked_B: Int[Tensor, "B"] | None = None,
        rng_state: Int64[Tensor, "2"] | None = None,
    ) -> Float[Tensor, "B L C"]:
        """Scores of the codebook's ids at every token, given which are masked; nothing else is dropped.

        In the ``"unmasked"`` mode the encoder sees the unmasked tokens only, as in training.

        Args:
            ids_BL: ids; what stands at masked tokens is not read.
            is_masked_BL: bool.
            class_ids_B: ids of the first position, see :meth:`class_ids`.
            num_masked_B: row sums of the mask on the CPU; counted (waiting for the device) by default.
            rng_state: int64 ``(seed, step)`` of the dropout in training mode; drawn by default.
        """
        if class_ids_B is None:
            class_ids_B = self.class_ids(None, ids_BL.shape[0])
        num_masked = (is_masked_BL.sum(1) if num_masked_B is None else num_masked_B).tolist()
        dropped = (is_masked_BL, num_masked) if self.config.encoder_tokens == "unmasked" else (None, None)
        plan = plan_of_mask(is_masked_BL, num_masked, *dropped)
        ids_BL = ids_BL.masked_fill(is_masked_BL, self.config.mask_token_id)
        x_TD = self.decode_features(ids_BL, class_ids_B, plan, self._dropout_state(rng_state))
        x_BSD = x_TD.unflatten(0, plan.source_BS.shape)
        return self.head(x_BSD[:, 1:], self.embedding.word_embeddings.weight)

    def features(
        self,
        images_or_ids: Tensor,
        *,
        block: int | None = None,
        pool: bool = True,
        rng_state: Int64[Tensor, "2"] | None = None,
    ) -> Tensor:
        """Encoder features with nothing masked: mean of the token outputs after a block.

        The class position is left out and the encoder's final norm is not used.

        Args:
            images_or_ids: images ``[B, 3, H, W]`` in [0, 1], or ids ``[B, L]``.
            block: which block's output, from 0; the last by default.
            pool: False gives every token's feature, ``[B, L, D]``.
            rng_state: int64 ``(seed, step)`` of the dropout in training mode; drawn by default.

        Returns:
            ``[B, D]``, or ``[B, L, D]``.

        Raises:
            ValueError: no such block.

        Source: MAGE section 3.2 and figure 6.
        """
        depth = self.config.encoder_depth
        block = depth - 1 if block is None else block
        if not 0 <= block < depth:
            raise ValueError(f"MAGE: block is {block}, wanted 0 <= block < {depth}")
        x_TD, plan, rng_state = self._unmasked(images_or_ids, rng_state)
        x_TD = self.encoder.block_output(x_TD, plan, block, rng_state)
        tokens_BLD = x_TD.unflatten(0, plan.source_BS.shape)[:, 1:]
        return tokens_BLD.mean(1) if pool else tokens_BLD

    def block_features(
        self, images_or_ids: Tensor, *, rng_state: Int64[Tensor, "2"] | None = None
    ) -> Float[Tensor, "N B D"]:
        """:meth:`features` after each of the encoder's N blocks, in one pass.

        Equivalent PyTorch: ``torch.stack([model.features(images, block=n) for n in range(depth)])``.
        """
        x_TD, plan, rng_state = self._unmasked(images_or_ids, rng_state)
        outputs = self.encoder.block_outputs(x_TD, plan, rng_state)
        return torch.stack([x_TD.unflatten(0, plan.source_BS.shape)[:, 1:].mean(1) for x_TD in outputs])

    def _unmasked(
        self, images_or_ids: Tensor, rng_state: Tensor | None
    ) -> tuple[Tensor, MaskPlan, Tensor | None]:
        """The embedded tokens, a plan that masks nothing, and the dropout's state."""
        ids_BL, inputs = self._encoder_inputs(images_or_ids)
        plan = plan_of_mask(torch.zeros_like(ids_BL, dtype=torch.bool), [0] * len(ids_BL))
        rng_state = self._dropout_state(rng_state)
        x_TD = self.embedding(inputs, self.class_ids(None, len(ids_BL)), plan, rng_state)
        return x_TD, plan, rng_state

    @classmethod
    def from_pretrained(
        cls, path: str | Path, tokenizer: Tokenizer | None = None, *, revision: str | None = None
    ) -> Self:
        """A model, in eval mode, from a folder of :meth:`save_pretrained`, or from a published ``.pth``.

        Args:
            path: the folder or file, or ``"owner/name"`` of a model hub (the extra ``hub``).
            tokenizer: yours, for a model that was saved with one of its own kind.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: missing, truncated or of another width; not to be had from the hub.
            ValueError: ``config.json`` has an unknown key or a value out of range.
        """
        path = local_path(path, revision)
        if path.is_dir():
            values, state = storage.load_pretrained(path)
            config = MAGEConfig.from_dict(values)
        else:
            from mage_fast import checkpoint  # it imports this module for the names and shapes

            state, config = checkpoint.from_published(checkpoint.load_published(path), source=path)
        with torch.device("meta"):  # the checkpoint's tensors become the parameters
            model = cls(config, tokenizer)
        storage.load_state(model, state, path, assign=True)
        return model.eval()
