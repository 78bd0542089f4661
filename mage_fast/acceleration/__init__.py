"""``mage_fast.accelerate(model)``: a model of the user's runs on our ops, with its own parameters."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from mage_fast.acceleration.published import AcceleratedOutput, FastMAGE, has_published_layout, whole_model
from mage_fast.acceleration.replacement import Replacement, replacement_of
from mage_fast.acceleration.search import WANTED, Search, kind_of
from mage_fast.model import MAGE
from mage_fast.sampler import generate
from mage_fast.tokenizer import Tokenizer

__all__ = ["Accelerated", "AcceleratedOutput", "accelerate"]


class Accelerated:
    """What :func:`accelerate` did to a model; printing it gives a table.

    A context manager, too: ``with accelerate(model): ...`` undoes it at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        replacements: dict[str, Replacement],
        skipped: dict[str, str],
        assumed: dict[str, str],
    ) -> None:
        #: The user's model, out of its wrappers.
        self.model = model
        #: Module name ("" is the model itself) -> what runs in place of its forward.
        self.replaced = {name: replacement.what for name, replacement in replacements.items()}
        #: Module name -> why its forward stays as it is.
        self.skipped = skipped
        #: What parameters do not tell about a MAGE -> its value and where that was found.
        self.assumed = assumed
        self._replacements = replacements
        for replacement in replacements.values():
            replacement.install()

    def undo(self) -> None:
        """Give every module its own forward back; once is enough.

        Raises:
            ValueError: someone else has since replaced a forward once more.
        """
        for replacement in self._replacements.values():
            replacement.remove()

    def _step(self) -> FastMAGE:
        whole = self._replacements.get("")
        if not isinstance(whole, FastMAGE):
            reason = self.skipped.get("", "it has not the published MAGE layout")
            raise ValueError(f"accelerate: {type(self.model).__name__} has no step of ours: {reason}")
        return whole

    @property
    def mage(self) -> MAGE:
        """A :class:`mage_fast.MAGE` of the same parameters, for :func:`mage_fast.generate_ids` and the like.

        Ask again after parameters were replaced or moved, or modes changed.

        Raises:
            ValueError: the model has not the published layout, or was changed since.
        """
        return self._step().mage()

    def features(self, images_or_ids: Tensor, *, block: int | None = None, pool: bool = True) -> Tensor:
        """Encoder features with nothing masked, see :meth:`mage_fast.MAGE.features`.

        Raises:
            ValueError: as :attr:`mage`, or images or ids that do not fit.
        """
        return self._step().features(images_or_ids, block=block, pool=pool)

    def generate(self, num_images: int, **options: Any) -> Tensor:
        """Images by iterative decoding, see :func:`mage_fast.generate`.

        Raises:
            ValueError: as :attr:`mage`, a model without tokenizer, or wrong options.
        """
        return generate(self.mage, num_images, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [("replaced", name or "(the model)", text) for name, text in self.replaced.items()]
        rows += [("skipped", name or "(the model)", text) for name, text in self.skipped.items()]
        rows += [("assumed", name, text) for name, text in self.assumed.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([f"{type(self.model).__name__}, accelerated", *lines])


def accelerate(
    model: nn.Module, *, step: bool = True, tokenizer: Tokenizer | None = None, **config: Any
) -> Accelerated:
    """Let a model of your own run on our ops. Its parameters, state dict, hooks and class stay as they are.

    >>> fast = mage_fast.accelerate(model)
    >>> print(fast)                                   # what was replaced, what not and why, what was assumed
    >>> loss, logits, mask = model(images)            # a MAGE of the published layout
    >>> images = fast.generate(16)

    Two things happen:

    * Transformer blocks, or else their attention and MLP modules, with the parts that timm and MAE gave
      them, get a forward of fused ops: the same result to rounding, dropout by the same law. Each is proven
      equal on random weights first. So everything the class does with its blocks runs faster.
    * A model whose parameters are exactly those of a published MAGE also gets another ``forward``: our
      training step, ``model(images_or_ids, drop_mask=, mask=, class_ids=)``, which returns
      :class:`AcceleratedOutput` (loss, logits at the masked tokens only, mask).

    Parameters may be moved, cast and replaced later, the model copied, pickled, compiled and wrapped. Where a
    module below is replaced, or gets hooks, the one above runs its own forward again, with a warning.

    Args:
        model: a module; ``DistributedDataParallel`` and ``torch.compile`` wrappers may stand around it.
        step: False leaves the model's own forward in place and accelerates its blocks.
        tokenizer: in place of a MAGE's ``vqgan.``, see :class:`Tokenizer`.
        config: fields of :class:`MAGEConfig`, in place of what a MAGE's attributes tell or was published:
            ``mask_ratio_mode=0.6``.

    Raises:
        ValueError: nothing can be replaced; it is accelerated already; fields for a model that is no MAGE.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("accelerate: got nn.DataParallel, wanted a module or DistributedDataParallel")
    while isinstance(model, nn.parallel.DistributedDataParallel) or "_orig_mod" in model._modules:
        model = model.get_submodule("module" if "module" in model._modules else "_orig_mod")
    already = [name or "it" for name, module in model.named_modules() if replacement_of(module)]
    if already:
        raise ValueError(
            f"accelerate: {type(model).__name__} is accelerated already ({already[0]}); undo that first"
        )
    search = Search()
    replacements: dict[str, Replacement] = {}
    skipped: dict[str, str] = {}
    assumed: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or any(not done or name.startswith(f"{done}.") for done in replacements):
            continue
        found = search.replacement_for(module, kind)
        if isinstance(found, str):
            skipped[name] = found
        else:
            replacements[name] = found
    is_mage = has_published_layout(model)
    if (config or tokenizer is not None) and not (is_mage and step):
        raise ValueError(
            f"accelerate: got {sorted(config) or 'a tokenizer'}, which a MAGE's step takes; "
            f"{type(model).__name__} {'keeps its own' if is_mage else 'has not the published layout'}"
        )
    if is_mage and step:
        whole = whole_model(model, replacements, tokenizer, config)
        if isinstance(whole, str):
            skipped[""] = whole
        else:
            replacements[""], assumed = whole
    elif is_mage:
        skipped[""] = "step=False was given"
    if not replacements:
        reasons = "".join(f"; {name or 'the model'}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"accelerate: nothing to replace in {type(model).__name__}; looked for {WANTED}; and the "
            f"published MAGE layout{reasons}"
        )
    return Accelerated(model, replacements, skipped, assumed)
