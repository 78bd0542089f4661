"""Iterative decoding of token ids: every step's shapes are known before the first.

The schedule says how many tokens are masked at each step, so the host, which never waits for the device
once decoding has begun, knows all counts. Only masked tokens' rows are computed where no other is read: in
the decoder's last block, in the head and in the sampler. Samples of one class begin alike, with nothing
known, so the first step runs once for each class and is drawn from once for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from mage_fast.cuda_graph import CUDAGraph
from mage_fast.feature_cache import FeatureCache
from mage_fast.kernels import check, dispatch, rng
from mage_fast.kernels.ops.mask_plan.api import plan_of_mask
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.linear import RoundedWeights
from mage_fast.masking import token_counts
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig, halton_order, last_in_order, masked_counts


class _Kind(NamedTuple):
    """What all shapes of a batch's decoding depend on; all of it is known on the host."""

    #: Tokens that are masked before each step, of each sample.
    num_masked: tuple[tuple[int, ...], ...]
    #: Rows of the first step if samples share them, else 0.
    num_classes: int


class _Inputs(NamedTuple):
    """What a batch's decoding reads from the device, beside the model."""

    ids_BL: Int[Tensor, "B L"]
    class_ids_B: Int64[Tensor, "B"]
    #: The classes that share the first step, and which of them each sample is.
    shared_class_ids_G: Int64[Tensor, "G"]
    shared_row_B: Int64[Tensor, "B"]
    #: Index of each sample in the whole run.
    samples_B: Int64[Tensor, "B"]
    #: Tokens that stay masked after each step.
    counts_TB: Int64[Tensor, "steps B"]
    #: Place of each unknown token in the order, from the last one, 1; no columns where confidence orders.
    place_BL: Int64[Tensor, "B L"] | Int64[Tensor, "B 0"]
    #: ``(seed, step)`` of each step.
    rng_states_T2: Int64[Tensor, "steps 2"]


class Decoding:
    """Decodes token ids with one model and one setting, a batch at a time.

    On a GPU the second of two equal batches in a row (as many samples, as many tokens to sample in each) is
    captured: one CUDA graph of all steps, which later batches of the kind replay with their own noise,
    classes and known ids. Moved parameters, another autocast or other implementations capture anew.

    >>> decode = Decoding(model, SamplerConfig(steps=12))
    >>> ids_BL = decode(64, seed=0)
    >>> more_BL = decode(64, seed=0, first_sample=64)

    Args:
        model: any :class:`MAGE`; it decodes in eval mode whatever mode it is in.
        config: settings; the published release's by default.

    Raises:
        ValueError: an approximation that means nothing to this model, a ``top_k`` over its codes, or a model
            that sees features.
    """

    def __init__(self, model: MAGE, config: SamplerConfig | None = None) -> None:
        self.model, self.config = model, config or SamplerConfig()
        if model.config.encoder_input != "tokens":
            raise ValueError(
                f'Decoding: encoder_input is "{model.config.encoder_input}", wanted "tokens": a model that '
                "sees unquantized features of an image cannot see the tokens it has sampled"
            )
        if self.config.approximation != "none" and model.config.encoder_tokens != "paper":
            raise ValueError(
                f"Decoding: approximation is {self.config.approximation!r}, wanted 'none': this model's "
                f"encoder sees {model.config.encoder_tokens} tokens only"
            )
        codes = model.config.codebook_size
        if self.config.top_k > codes:
            raise ValueError(f"Decoding: top_k is {self.config.top_k}, wanted at most the {codes} codes")
        drop_ratio = torch.tensor([model.config.drop_ratio], dtype=torch.float64)
        self._most_dropped = int(token_counts(drop_ratio, model.config.num_tokens))
        self._weights = RoundedWeights(model)
        self._graph: CUDAGraph | None = None
        self._graph_key: tuple | None = None
        self._last_key: tuple | None = None

    @torch.no_grad()
    def __call__(
        self,
        batch: int | None = None,
        *,
        ids_BL: Int[Tensor, "B L"] | None = None,
        labels_B: Int[Tensor, "B"] | None = None,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> Int64[Tensor, "B L"]:
        """Decode one batch; arguments and errors are those of :func:`mage_fast.generate_ids`."""
        kind, inputs = self._prepare(batch, ids_BL, labels_B, seed, first_sample)
        with eval_mode(self.model), self._weights.lent():
            if not CUDAGraph.runs_on(inputs.ids_BL.device):
                return self._last(kind, inputs)
            key = (kind, *self._surroundings())
            if self._graph is None or key != self._graph_key:
                if key != self._last_key:
                    self._last_key = key
                    return self._last(kind, inputs)
                self._graph = None  # its memory is free before the next one takes some
                self._graph = CUDAGraph(lambda *x: self._last(kind, _Inputs(*x)), inputs)
                self._graph_key = key
            return self._graph.replay(inputs)

    @torch.no_grad()
    def steps(
        self,
        batch: int | None = None,
        *,
        ids_BL: Int[Tensor, "B L"] | None = None,
        labels_B: Int[Tensor, "B"] | None = None,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> Iterator[Int64[Tensor, "B L"]]:
        """Yield all tokens as decided after each step; the last are what a call gives."""
        for sampled_BL, _ in self.masked_steps(
            batch, ids_BL=ids_BL, labels_B=labels_B, seed=seed, first_sample=first_sample
        ):
            yield sampled_BL

    @torch.no_grad()
    def masked_steps(
        self,
        batch: int | None = None,
        *,
        ids_BL: Int[Tensor, "B L"] | None = None,
        labels_B: Int[Tensor, "B"] | None = None,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> Iterator[tuple[Int64[Tensor, "B L"], Bool[Tensor, "B L"]]]:
        """Yield as :meth:`steps`, and which of the tokens are masked again; none after the last step."""
        kind, inputs = self._prepare(batch, ids_BL, labels_B, seed, first_sample)
        with eval_mode(self.model):  # weights are not lent: between steps the model is the caller's
            for t, (sampled_BL, next_BL) in enumerate(self._steps(kind, inputs)):
                masked_again_BL = next_BL == self.model.config.mask_token_id
                yield sampled_BL, masked_again_BL & (t + 1 < self.config.steps)

    def _surroundings(self) -> tuple:
        """What else a captured graph holds for good."""
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        return autocast, dispatch.forced(), tuple(x.data_ptr() for x in self.model.parameters())

    def _prepare(
        self,
        batch: int | None,
        ids_BL: Tensor | None,
        labels_B: Tensor | None,
        seed: int | None,
        first_sample: int,
    ) -> tuple[_Kind, _Inputs]:
        """Check the arguments, and read from the device what the host must know: all waiting is here."""
        config, device = self.model.config, self.model.head.bias.device
        if first_sample < 0:
            raise ValueError(f"generate: first_sample is {first_sample}, wanted 0 or more")
        if ids_BL is None:
            if batch is None or batch < 1:
                raise ValueError(f"generate: number of images is {batch}, wanted at least 1")
            ids_BL = torch.full((batch, config.num_tokens), config.mask_token_id, device=device)
            num_unknown = (config.num_tokens,) * batch
        else:
            check.shape("generate", "ids", ids_BL, (None, config.num_tokens))
            check.integer("generate", "ids", ids_BL)
            is_unknown_BL = ids_BL == config.mask_token_id
            known_BL = ids_BL.masked_fill(is_unknown_BL, 0)
            check.values("generate", "ids", known_BL, 0, config.codebook_size)
            ids_BL, num_unknown = ids_BL.to(device), tuple(is_unknown_BL.sum(1).tolist())
        batch = len(num_unknown)
        class_ids_B = self.model.class_ids(labels_B, batch)
        shared_G, row_B = class_ids_B[:0], class_ids_B[:0]
        if batch > 1 and min(num_unknown) == config.num_tokens:
            shared_G, row_B = self._shared_classes(class_ids_B, labels_B is None)
        seed = int(rng.new_state()[0]) if seed is None else seed
        steps = self.config.steps
        counts_TB = masked_counts(self.config.schedule, steps, torch.tensor(num_unknown))
        inputs = _Inputs(
            ids_BL,
            class_ids_B,
            shared_G,
            row_B,
            torch.arange(first_sample, first_sample + batch, device=device),
            counts_TB.to(device),
            self._places(ids_BL),
            torch.stack([rng.new_state(seed, t) for t in range(steps)]).to(device),
        )
        before = (num_unknown, *(tuple(counts_B) for counts_B in counts_TB[:-1].tolist()))
        return _Kind(before, len(shared_G)), inputs

    def _places(self, ids_BL: Tensor) -> Tensor:
        """When each unknown token is decided, where that is known before its confidence."""
        if self.config.order == "confidence":
            return ids_BL.new_empty(len(ids_BL), 0, dtype=torch.int64)
        order_L = halton_order(self.model.config.grid_size).to(ids_BL.device)
        return last_in_order(ids_BL == self.model.config.mask_token_id, order_L)

    @staticmethod
    def _shared_classes(class_ids_B: Tensor, all_alike: bool) -> tuple[Tensor, Tensor]:
        """The distinct classes and each sample's place among them; none where sharing saves nothing."""
        if all_alike:
            return class_ids_B[:1], torch.zeros_like(class_ids_B)
        classes_G, row_B = class_ids_B.unique(return_inverse=True)
        if class_ids_B.is_cuda:  # few numbers of rows, so that batches of many classes are of one kind
            padding = classes_G[-1:].expand((1 << (len(classes_G) - 1).bit_length()) - len(classes_G))
            classes_G = torch.cat([classes_G, padding])
        return (classes_G, row_B) if len(classes_G) < len(class_ids_B) else (row_B[:0], row_B[:0])

    def _last(self, kind: _Kind, inputs: _Inputs) -> Tensor:
        """The ids after all steps."""
        ids_BL = inputs.ids_BL
        for sampled_BL, _ in self._steps(kind, inputs):
            ids_BL = sampled_BL
        return ids_BL

    def _steps(self, kind: _Kind, inputs: _Inputs) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps proper: all tokens as sampled, and the next step's input. A CUDA graph may hold them: no
        wait for the device, no copy from the host.
        """
        config, ids_BL = self.config, inputs.ids_BL
        length, mask_token_id = self.model.config.num_tokens, self.model.config.mask_token_id
        cache = FeatureCache(self.model) if config.approximation == "cached_features" else None
        for t, num_masked in enumerate(kind.num_masked):
            if not any(num_masked):
                yield ids_BL, ids_BL
                continue
            state, scale = inputs.rng_states_T2[t], config.guidance_at(t)
            guided = scale != 0.0
            if t == 0 and kind.num_classes:
                start_GL = ids_BL[: kind.num_classes]
                logits, guidance = self._logits(
                    start_GL, inputs.shared_class_ids_G, (length,) * kind.num_classes, state, guided=guided
                )
                places_L = torch.arange(length, device=ids_BL.device)
                rows_BL = inputs.shared_row_B[:, None] * length + places_L
            else:
                partial = t > 0 and t % 2 == 0
                logits, guidance = self._logits(
                    ids_BL, inputs.class_ids_B, num_masked, state, cache, partial=partial, guided=guided
                )
                rows_BL = ((ids_BL == mask_token_id).flatten().cumsum(0) - 1).view_as(ids_BL)
            sampled_BL, ids_BL = sample_confident(
                logits,
                ids_BL,
                inputs.counts_TB[t],
                mask_token_id=mask_token_id,
                choice_temperature=config.choice_temperature_at(t),
                rng_state=state,
                temperature=config.temperature_at(t),
                top_k=config.top_k,
                top_p=config.top_p,
                guidance_logits_NC=guidance,
                guidance_scale=scale,
                rows_BL=rows_BL,
                samples_B=inputs.samples_B,
            )
            if config.order != "confidence":
                is_later_BL = inputs.place_BL <= inputs.counts_TB[t][:, None]
                ids_BL = sampled_BL.masked_fill(is_later_BL, mask_token_id)
            yield sampled_BL, ids_BL

    def _logits(
        self,
        ids_BL: Tensor,
        class_ids_B: Tensor,
        num_masked: tuple[int, ...],
        rng_state: Tensor,
        cache: FeatureCache | None = None,
        *,
        partial: bool = False,
        guided: bool = False,
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"] | None]:
        """Logits of the masked tokens, one after the other; where guided, those without a class too."""
        if guided:  # one doubled batch, conditional half first
            ids_BL, num_masked = ids_BL.repeat(2, 1), num_masked * 2
            class_ids_B = torch.cat([class_ids_B, self.model.class_ids(None, len(class_ids_B))])
        is_masked_BL = ids_BL == self.model.config.mask_token_id
        plan = plan_of_mask(is_masked_BL, num_masked, *self._dropped(is_masked_BL, num_masked, rng_state))
        if cache is None:
            logits_NC = self.model.masked_logits(ids_BL, class_ids_B, plan)
        else:
            logits_NC = cache.masked_logits(ids_BL, class_ids_B, plan, num_masked, partial=partial)
        conditional, *unconditional = logits_NC.chunk(2) if guided else (logits_NC,)
        return conditional, (unconditional[0] if guided else None)

    def _dropped(
        self, is_masked_BL: Tensor, num_masked: tuple[int, ...], rng_state: Tensor
    ) -> tuple[Tensor, tuple[int, ...]] | tuple[None, None]:
        """The masked tokens that the encoder does not see, and their numbers; Nones if there are none."""
        config = self.model.config
        if config.encoder_tokens == "unmasked":
            return is_masked_BL, num_masked
        if self.config.approximation != "drop_masked":
            return None, None
        most = self._most_dropped
        num_dropped = tuple(min(count, most) for count in num_masked)
        if num_dropped == num_masked:
            return is_masked_BL, num_masked
        # one order for all samples: their common first step stays common, and no batch matters
        order_1L = rng.words(rng_state, rng.stream(rng.Stream.MASK_PLAN), 1, config.num_tokens)
        rank_BL = order_1L.masked_fill(~is_masked_BL, 2**32).argsort(stable=True, dim=1).argsort(1)
        return rank_BL < is_masked_BL.sum(1, keepdim=True).clamp(max=most), num_dropped


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode again afterwards (parts of a model may be frozen)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
