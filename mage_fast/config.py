"""The configurations that define a model: :class:`MAGEConfig` with its :class:`TokenizerConfig`, and
:class:`ClassifierConfig`.

They are frozen, checked when made, and round-trip through ``config.json``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} is {value!r}, wanted a positive integer")


def _ratio(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{type(config).__name__}: {name} is {value!r}, wanted a ratio in [0, 1]")


class _Config:
    """JSON conversion shared by the configurations."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for ``json.dump``."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration of a ``config.json``.

        Raises:
            ValueError: a key that does not exist, a value of another type or out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown keys {unknown}, known are {sorted(known)}")
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{cls.__name__}: a value is missing or of another type ({error})") from error

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class TokenizerConfig(_Config):
    """A convolutional VQGAN: images of any size to a grid of codebook ids and back.

    The defaults are the published tokenizer: 256 x 256 images, 16 x 16 tokens, 1024 codes.
    """

    #: Pixels along a side.
    image_size: int = 256
    #: Codes, each an id.
    codebook_size: int = 1024
    #: Channels of a code.
    codebook_dim: int = 256
    #: Channels of the first level.
    base_width: int = 128
    #: Width of each level over base_width; each level but the last halves the resolution.
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    #: Residual blocks of each level.
    blocks_per_level: int = 2
    #: Groups of each GroupNorm.
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "width_multipliers", tuple(self.width_multipliers))
        _positive(
            self,
            *("image_size", "codebook_size", "codebook_dim", "base_width", "blocks_per_level", "norm_groups"),
        )
        if not self.width_multipliers or min(self.width_multipliers) < 1:
            raise ValueError(
                f"TokenizerConfig: width_multipliers is {self.width_multipliers}, wanted positive integers"
            )
        if self.image_size % self.downsampling:
            raise ValueError(
                f"TokenizerConfig: image_size is {self.image_size}, wanted a multiple of {self.downsampling} "
                f"(2 ** {len(self.width_multipliers) - 1} for {len(self.width_multipliers)} levels)"
            )
        for multiplier in self.width_multipliers:
            if self.base_width * multiplier % self.norm_groups:
                raise ValueError(
                    f"TokenizerConfig: width {self.base_width * multiplier} is not a multiple of "
                    f"norm_groups {self.norm_groups}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels a token, along one side."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.downsampling


@dataclass(frozen=True)
class MAGEConfig(_Config):
    """Encoder, decoder, vocabulary, masking law and loss of a MAGE model.

    The defaults are ViT-B as published. Vocabulary: ``codebook_size`` codes, then ``class_slots`` class
    ids, then the mask token [M]; unconditional sequences start with class id
    ``codebook_size + unconditional_class``. In the published layout that slot lies among the first 1000: see
    :meth:`for_classes` before training with labels.
    """

    grid_size: int = 16
    codebook_size: int = 1024
    class_slots: int = 1000
    unconditional_class: int = 76
    #: Classes of a model trained with labels, which are then ``[0, num_classes)``. None: any other slot.
    num_classes: int | None = None
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    label_smoothing: float = 0.1
    #: Part of the labels that training replaces by the unconditional class (classifier-free guidance).
    label_dropout: float = 0.1
    #: Truncated normal of the mask ratio: mode, standard deviation (0: always the mode), bounds.
    mask_ratio_mode: float = 0.55
    mask_ratio_std: float = 0.25
    mask_ratio_min: float = 0.5
    mask_ratio_max: float = 1.0
    #: Part of the tokens that the encoder does not see in training; at most mask_ratio_min.
    drop_ratio: float = 0.5
    #: One mask ratio for the batch, as the paper, or one a sample.
    ratio_per: Literal["batch", "sample"] = "batch"
    #: "paper": drop drop_ratio of the tokens, keep the other masked ones as [M]. "unmasked": the
    #: encoder sees the class token and the unmasked tokens only.
    encoder_tokens: Literal["paper", "unmasked"] = "paper"
    #: "features": the encoder sees the tokenizer's features before they are quantized, projected linearly,
    #: in place of token embeddings (the ablation of table 6; such a model does not generate).
    encoder_input: Literal["tokens", "features"] = "tokens"
    #: What stands at dropped and masked positions of the decoder's input.
    padding: Literal["class_token", "mask_token"] = "class_token"
    tokenizer: TokenizerConfig | None = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, dict):
            object.__setattr__(self, "tokenizer", TokenizerConfig.from_dict(self.tokenizer))
        _positive(self, "grid_size", "codebook_size", "class_slots")
        for part in ("encoder", "decoder"):
            _positive(self, f"{part}_width", f"{part}_depth", f"{part}_heads")
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise ValueError(
                    f"MAGEConfig: {part}_width {width} is not a multiple of {part}_heads {heads}"
                )
        _ratio(
            self,
            *(
                "dropout",
                "label_smoothing",
                "label_dropout",
                "mask_ratio_min",
                "mask_ratio_max",
                "mask_ratio_mode",
            ),
            "drop_ratio",
        )
        if not self.mask_ratio_min <= self.mask_ratio_max:
            raise ValueError(
                f"MAGEConfig: mask_ratio_min {self.mask_ratio_min} is over "
                f"mask_ratio_max {self.mask_ratio_max}"
            )
        if not self.mlp_ratio > 0:
            raise ValueError(f"MAGEConfig: mlp_ratio is {self.mlp_ratio!r}, wanted more than 0")
        if self.mask_ratio_std < 0:
            raise ValueError(f"MAGEConfig: mask_ratio_std is {self.mask_ratio_std}, wanted 0 or more")
        if self.drop_ratio > self.lowest_mask_ratio:
            raise ValueError(
                f"MAGEConfig: drop_ratio is {self.drop_ratio}, wanted at most the lowest mask ratio "
                f"{self.lowest_mask_ratio} (only masked tokens are dropped): give drop_ratio="
                f"{self.lowest_mask_ratio}, or mask more"
            )
        if not 0 <= self.unconditional_class < self.class_slots:
            raise ValueError(
                f"MAGEConfig: unconditional_class is {self.unconditional_class}, wanted 0 <= it < "
                f"class_slots {self.class_slots}"
            )
        if self.num_classes is not None and not 1 <= self.num_classes <= self.unconditional_class:
            raise ValueError(
                f"MAGEConfig: num_classes is {self.num_classes}, wanted 1 <= it <= unconditional_class "
                f"{self.unconditional_class}: config.for_classes({self.num_classes}) makes room"
            )
        for name, wanted in (
            ("ratio_per", ("batch", "sample")),
            ("encoder_tokens", ("paper", "unmasked")),
            ("encoder_input", ("tokens", "features")),
            ("padding", ("class_token", "mask_token")),
        ):
            if getattr(self, name) not in wanted:
                raise ValueError(f"MAGEConfig: {name} is {getattr(self, name)!r}, wanted one of {wanted}")
        if self.tokenizer is not None:
            mine = (self.grid_size, self.codebook_size)
            its = (self.tokenizer.grid_size, self.tokenizer.codebook_size)
            if mine != its:
                raise ValueError(
                    f"MAGEConfig: (grid_size, codebook_size) is {mine}, the tokenizer's is {its}; they differ"
                )

    @property
    def num_tokens(self) -> int:
        """Tokens an image, without the class token."""
        return self.grid_size**2

    @property
    def lowest_mask_ratio(self) -> float:
        """Smallest mask ratio that training can draw."""
        return self.mask_ratio_min if self.mask_ratio_std > 0 else self.mask_ratio_mode

    @property
    def vocabulary_size(self) -> int:
        """Codes, class slots and the mask token."""
        return self.codebook_size + self.class_slots + 1

    @property
    def mask_token_id(self) -> int:
        """Id of [M]: the last one."""
        return self.vocabulary_size - 1

    @property
    def unconditional_class_id(self) -> int:
        """Id that stands first in an unconditional sequence."""
        return self.codebook_size + self.unconditional_class

    def for_classes(self, num_classes: int) -> Self:
        """A copy for training with labels ``[0, num_classes)``, none of which is the unconditional class.

        Slots stay as they are where they have room below the unconditional class (76 in the published
        layout); else the unconditional class moves to the slot after the labels, and slots are added as
        needed.

        Raises:
            ValueError: fewer classes than one.
        """
        if num_classes < 1:
            raise ValueError(f"MAGEConfig: number of classes is {num_classes}, wanted 1 or more")
        if num_classes <= self.unconditional_class:
            return self.replace(num_classes=num_classes)
        return self.replace(
            num_classes=num_classes,
            class_slots=max(self.class_slots, num_classes + 1),
            unconditional_class=num_classes,
        )

    @classmethod
    def vit_b(cls, **changes: Any) -> Self:
        """MAGE ViT-B as published."""
        return cls(**changes)

    @classmethod
    def vit_l(cls, **changes: Any) -> Self:
        """MAGE ViT-L as published."""
        large: dict[str, Any] = {
            **{"encoder_width": 1024, "encoder_depth": 24, "encoder_heads": 16},
            **{"decoder_width": 1024, "decoder_depth": 8, "decoder_heads": 16},
        }
        return cls(**(large | changes))

    @classmethod
    def vit_h(cls, **changes: Any) -> Self:
        """A ViT-H encoder with a ViT-H-wide decoder; ours, the paper stops at ViT-L."""
        huge: dict[str, Any] = {
            **{"encoder_width": 1280, "encoder_depth": 32, "encoder_heads": 16},
            **{"decoder_width": 1280, "decoder_depth": 8, "decoder_heads": 16},
        }
        return cls(**(huge | changes))

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """A model for small images and laptops, without dropout: what the demo trains in minutes."""
        sizes: dict[str, Any] = {
            **{"encoder_width": 96, "encoder_depth": 4, "encoder_heads": 3},
            **{"decoder_width": 96, "decoder_depth": 2, "decoder_heads": 3},
            "dropout": 0.0,
        }
        return cls(**(sizes | changes))

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """A model for tests and laptops: 4 x 4 tokens of a 32-code codebook, width 32."""
        small: dict[str, Any] = {
            **{"grid_size": 4, "codebook_size": 32, "class_slots": 11, "unconditional_class": 10},
            **{"encoder_width": 32, "encoder_depth": 2, "encoder_heads": 2},
            **{"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2},
            "tokenizer": TokenizerConfig(
                image_size=16,
                codebook_size=32,
                codebook_dim=8,
                base_width=8,
                width_multipliers=(1, 1, 2),
                blocks_per_level=1,
                norm_groups=4,
            ),
        }
        return cls(**(small | changes))


@dataclass(frozen=True)
class ClassifierConfig(_Config):
    """A classifier on a MAGE encoder, see :class:`mage_fast.MAGEClassifier`."""

    mage: MAGEConfig
    num_classes: int
    #: Probability that training leaves out a branch of the last block; lower ones rise to it linearly from 0.
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.mage, dict):
            object.__setattr__(self, "mage", MAGEConfig.from_dict(self.mage))
        if not isinstance(self.mage, MAGEConfig):
            raise ValueError(f"ClassifierConfig: mage is {self.mage!r}, wanted a MAGEConfig")
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ValueError(f"ClassifierConfig: num_classes is {self.num_classes!r}, wanted 2 or more")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"ClassifierConfig: drop_path is {self.drop_path!r}, wanted 0 <= drop_path < 1")
