"""A model as ``torch.export`` programs of plain aten operators, which run where mage_fast is not installed.

Every op of ours is written out as its reference implementation, so a program loads with torch alone, and
AOTInductor can compile it. Where mage_fast is installed the model itself is faster (docs/adr/0020).

Shape suffixes: B samples, L tokens, S = L + 1 positions (0 is the class token), D features, T steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode

from mage_fast.decoding import Decoding
from mage_fast.kernels import dispatch
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.kernels.ops.sample_confident.reference import sample_confident
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig, halton_order, last_in_order, masked_counts

Inputs = Literal["images", "ids"]


def export_encoder(model: MAGE, inputs: Inputs = "images") -> ExportedProgram:
    """The encoder as a program, for any number of samples: ``program.module()(images)`` gives features.

    Equivalent PyTorch::

        model.eval().features(images_or_ids)        # [B, D]

    >>> torch.export.save(export_encoder(model), "encoder.pt2")
    >>> features = torch.export.load("encoder.pt2").module()(images)      # needs torch alone

    Args:
        model: any :class:`MAGE`; the program has its device and dtype.
        inputs: images ``[B, 3, H, W]`` in [0, 1], of the side that the tokenizer wants, or ids ``[B, L]``.

    Raises:
        ValueError: images for a model without a tokenizer, or ids for one whose encoder sees features.

    Source: MAGE section 3.2 (features).
    """
    if inputs not in get_args(Inputs):
        raise ValueError(f"export_encoder: inputs is {inputs!r}, wanted one of {', '.join(get_args(Inputs))}")
    config = model.config
    if inputs == "ids" and config.encoder_input != "tokens":
        raise ValueError(
            f'export_encoder: inputs is "ids", wanted "images": this model\'s encoder_input is '
            f'"{config.encoder_input}", what the tokenizer computes before it quantizes'
        )
    if inputs == "images":
        side = _image_side(model, "export_encoder: inputs is 'images'")
        example = torch.rand(2, 3, side, side)
    else:
        example = torch.zeros(2, config.num_tokens, dtype=torch.int64)
    return _export(model, _Features(model), images_or_ids=example)


def export_image_decoder(model: MAGE) -> ExportedProgram:
    """The tokenizer's decoder as a program: ids ``[B, L]`` to images ``[B, 3, H, W]``, about [0, 1].

    Raises:
        ValueError: a model without a tokenizer.
    """
    _image_side(model, "export_image_decoder")
    ids_BL = torch.zeros(2, model.config.num_tokens, dtype=torch.int64)
    return _export(model, _Images(model), ids_BL=ids_BL)


def export_decoding_step(model: MAGE, config: SamplerConfig | None = None) -> ExportedProgram:
    """One step of iterative decoding as a program, for any number of samples and any step.

    Its arguments are those of :meth:`DecodingStep.forward`. The loop, which gives the ids that
    :func:`mage_fast.generate_ids` gives, needs torch alone::

        step = torch.export.load("step.pt2").module()
        ids = torch.full((B, L), mask_token_id)         # of model.config; known ids elsewhere
        num_unknown = (ids == mask_token_id).sum(1)
        for t in range(steps):                          # as many as the settings have
            decided, ids = step(ids, class_ids, num_unknown, torch.arange(B), torch.tensor([seed, t]))

    Every position is computed at each step, as how many are masked is not known to a program.

    Args:
        model: any :class:`MAGE` of tokens.
        config: settings, which the program keeps; the published release's by default.

    Raises:
        ValueError: a model that sees features, or settings with an approximation.

    Source: MAGE section 3.2 (iterative decoding).
    """
    config = Decoding(model, config).config  # refuses what cannot be decoded
    if config.approximation != "none":
        raise ValueError(
            f"export_decoding_step: approximation is {config.approximation!r}, wanted 'none': one "
            "program serves all steps"
        )
    batch, length = 2, model.config.num_tokens
    step = DecodingStep(model, config)
    return _export(
        model,
        step,
        ids_BL=torch.full((batch, length), model.config.mask_token_id),
        class_ids_B=torch.full((batch,), model.config.unconditional_class_id),
        num_unknown_B=torch.full((batch,), length),
        samples_B=torch.arange(batch),
        rng_state=torch.tensor([0, 0]),
    )


class _Features(nn.Module):
    def __init__(self, model: MAGE) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_or_ids: Tensor) -> Float[Tensor, "B D"]:
        model = self.model
        ids_BL, inputs = model._encoder_inputs(images_or_ids)
        plan = whole_plan(torch.zeros_like(ids_BL, dtype=torch.bool))
        x_TD = model.embedding(inputs, model.class_ids(None, ids_BL.shape[0]), plan, None)
        x_TD = model.encoder.block_output(x_TD, plan, model.config.encoder_depth - 1, None)
        return x_TD.unflatten(0, plan.source_BS.shape)[:, 1:].mean(1)


class _Images(nn.Module):
    def __init__(self, model: MAGE) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer

    def forward(self, ids_BL: Tensor) -> Float[Tensor, "B 3 H W"]:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids_BL)


class DecodingStep(nn.Module):
    """One step of :class:`Decoding` without a number that the host must know."""

    counts_TU: Tensor
    choice_temperature_T: Tensor
    temperature_T: Tensor
    guidance_T: Tensor
    order_L: Tensor

    def __init__(self, model: MAGE, config: SamplerConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        unknown_U = torch.arange(model.config.num_tokens + 1)
        tables = {
            # what a step wants masked, for each number of tokens that were unknown at the start
            "counts_TU": masked_counts(config.schedule, config.steps, unknown_U),
            "choice_temperature_T": _table(config.choice_temperature_at, config.steps),
            "temperature_T": _table(config.temperature_at, config.steps),
            "guidance_T": _table(config.guidance_at, config.steps),
            "order_L": halton_order(model.config.grid_size),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(model.head.bias.device), persistent=False)

    def forward(
        self,
        ids_BL: Int64[Tensor, "B L"],
        class_ids_B: Int64[Tensor, "B"],
        num_unknown_B: Int64[Tensor, "B"],
        samples_B: Int64[Tensor, "B"],
        rng_state: Int64[Tensor, "2"],
    ) -> tuple[Int64[Tensor, "B L"], Int64[Tensor, "B L"]]:
        """``(decided, next ids)``: all tokens as decided at this step, and the next step's ``ids_BL``.

        Args:
            ids_BL: int64, ``mask_token_id`` at unknown tokens; known ones stay.
            class_ids_B: int64, ``codebook_size + label``, or the configuration's ``unconditional_class_id``.
            num_unknown_B: int64, how many tokens were unknown before the first step.
            samples_B: int64, index of each sample in the whole run: noise belongs to a sample.
            rng_state: int64 ``(seed, number of the step from 0)``.
        """
        config, mask_token_id = self.config, self.model.config.mask_token_id
        step_1 = rng_state[1:]
        logits_BLC = self._logits(ids_BL, class_ids_B)
        guidance_BLC: Tensor | None = None
        if config.guidance_scale != 0.0:
            unconditional_B = torch.full_like(class_ids_B, self.model.config.unconditional_class_id)
            guidance_BLC = self._logits(ids_BL, unconditional_B)
        num_masked_B = self.counts_TU.index_select(0, step_1)[0][num_unknown_B]
        sampled_BL, next_BL = sample_confident(
            logits_BLC,
            ids_BL,
            num_masked_B,
            None,
            guidance_BLC,
            # tensors, as they differ from step to step
            _value(self.guidance_T, step_1),
            mask_token_id,
            _value(self.choice_temperature_T, step_1),
            _value(self.temperature_T, step_1),
            config.top_k,
            config.top_p,
            samples_B,
            rng_state,
            0,
        )
        if config.order == "halton":
            # counted from the last, so what is still unknown has the places it had at the start
            place_BL = last_in_order(ids_BL == mask_token_id, self.order_L)
            next_BL = sampled_BL.masked_fill(place_BL <= num_masked_B[:, None], mask_token_id)
        return sampled_BL, next_BL

    def _logits(self, ids_BL: Tensor, class_ids_B: Tensor) -> Float[Tensor, "B L C"]:
        model = self.model
        is_masked_BL = ids_BL == model.config.mask_token_id
        plan = whole_plan(is_masked_BL, drop=model.config.encoder_tokens == "unmasked")
        x_TD = model.decode_features(ids_BL, class_ids_B, plan, None)
        x_BSD = x_TD.unflatten(0, plan.source_BS.shape)
        return model.head(x_BSD[:, 1:], model.embedding.word_embeddings.weight)


def _table(of_step: Callable[[int], float], steps: int) -> Tensor:
    return torch.tensor([of_step(t) for t in range(steps)], dtype=torch.float64)


def _value(table_T: Tensor, step_1: Tensor) -> Any:
    """A step's number, as a tensor that promotes as a number does."""
    return table_T.index_select(0, step_1)[0]


def whole_plan(is_masked_BL: Bool[Tensor, "B L"], *, drop: bool = False) -> MaskPlan:
    """A plan of given masks whose shapes depend on the batch alone: every position has an encoder row.

    Where masked tokens are to be dropped, each sample is two sequences, one of what the encoder sees and one
    of what it would not: nothing reads the second's rows.
    """
    batch, length = is_masked_BL.shape
    positions, device = length + 1, is_masked_BL.device
    is_masked_BS = torch.nn.functional.pad(is_masked_BL, (1, 0))
    first_B = torch.arange(batch, device=device) * positions
    ends_B = first_B + positions
    position_BS = torch.arange(positions, device=device).expand(batch, positions)
    cu_seqlens = ends_B
    row_BS = position_BS
    if drop:
        position_BS = is_masked_BS.to(torch.uint8).argsort(dim=1, stable=True)
        row_BS = position_BS.argsort(dim=1)
        cu_seqlens = torch.stack([first_B + (~is_masked_BS).sum(1), ends_B], 1).flatten()
    row_BS = (row_BS + first_B[:, None]).masked_fill(is_masked_BS, -1)
    int32 = torch.int32
    start_cu_seqlens = torch.nn.functional.pad(ends_B, (1, 0)).to(int32)
    return MaskPlan(
        positions_T=(position_BS + first_B[:, None]).flatten().to(int32),
        cu_seqlens=torch.nn.functional.pad(cu_seqlens, (1, 0)).to(int32),
        masked_index_N=torch.empty(0, dtype=int32, device=device),  # no row is left out
        source_BS=row_BS.to(int32),
        is_masked_BL=is_masked_BL,
        visible_V=None,
        visible_cu_seqlens=start_cu_seqlens,
        max_seqlen=positions,
    )


def _image_side(model: MAGE, who: str) -> int:
    """Side of the images of a model's tokenizer."""
    if model.tokenizer is None:
        raise ValueError(f"{who}, and this model has no tokenizer; ids are what it takes and gives")
    if not isinstance(model.tokenizer, nn.Module):
        raise ValueError(
            f"{who}, and the tokenizer is a {type(model.tokenizer).__name__}, wanted a torch.nn.Module: its "
            "weights belong to the program"
        )
    ids_1L = torch.zeros(1, model.config.num_tokens, dtype=torch.int64, device=model.head.bias.device)
    with torch.no_grad():
        return model.tokenizer.decode(ids_1L).shape[-1]  # a tokenizer of your own need not tell otherwise


def _export(model: MAGE, module: nn.Module, **examples: Tensor) -> ExportedProgram:
    """The program of a module in eval mode, free of ops of ours, with weights of its own, for any batch."""
    device, batch = model.head.bias.device, Dim("batch", min=1)
    arguments = tuple(x.to(device) for x in examples.values())
    shapes = tuple(None if name == "rng_state" else {0: batch} for name in examples)
    module = copy.deepcopy(module).eval().requires_grad_(False)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as files have weights
    with torch.no_grad(), _References():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
    _drop_unread_weights(program)
    return program


def _drop_unread_weights(program: ExportedProgram) -> None:
    """Leave out the weights that nothing reads, as an encoder's program has no use for the decoder."""
    graph, read = program.graph_module.graph, []
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.PARAMETER and not node.users:
            graph.erase_node(node)
            del program.state_dict[spec.target]
        else:
            read.append(spec)
    program.graph_signature.input_specs[:] = read
    program.graph_module.recompile()


class _References(TorchFunctionMode):
    """Inside, a call of an op of ours is one of its reference implementation, which tracing sees through."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "mage_fast":
            name = function._opname
            reference = dispatch.select(name, "reference", "cpu")
            return getattr(reference, name)(*args[:-1])  # the last names an implementation
        return function(*args, **(kwargs or {}))
