"""Configuration of a vision transformer, the table of sizes, its cost, and the card of its weights."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dinocell.models.positions import LearnedPositionConfig, RopeConfig


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Everything that determines the tensors of a `VisionTransformer` and its output in eval mode.

    The defaults are those of DINOv3, except patch size 8 and one channel.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_hidden: int = 1536
    patch_size: int = 8
    in_channels: int = 1
    registers: int = 4
    positions: Literal["rope", "learned"] = "rope"
    rope: RopeConfig = field(default_factory=RopeConfig)
    learned: LearnedPositionConfig = field(default_factory=LearnedPositionConfig)
    qkv_bias: bool = True
    key_bias: bool = False
    layer_scale: bool = True
    norm_eps: float = 1e-5
    cls_norm: bool = False
    local_cls_norm: bool = False

    def __post_init__(self) -> None:
        minimum = dict.fromkeys(("width", "depth", "heads", "mlp_hidden", "patch_size", "in_channels"), 1)
        low = {name: least for name, least in {**minimum, "registers": 0}.items() if getattr(self, name) < least}
        problems = [f"{name}: expected at least {least}, got {getattr(self, name)}" for name, least in low.items()]
        if not 0 < self.norm_eps < 1:
            problems.append(f"norm_eps: expected a small positive number, got {self.norm_eps}")
        multiple = self.heads * (4 if self.positions == "rope" else 1)
        if not problems and self.width % multiple:
            kind = "4 * heads (rotary positions)" if self.positions == "rope" else "heads"
            problems.append(f"width: expected a multiple of {kind} = {multiple}, got {self.width}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def num_prefix(self) -> int:
        """Number of tokens before the patches: CLS and registers."""
        return 1 + self.registers


SIZES = ("width", "depth", "heads", "mlp", "mlp_hidden")


def _size(width: int, depth: int, heads: int, mlp: Literal["gelu", "swiglu"], hidden: int, **more: Any) -> ViTConfig:
    return ViTConfig(width=width, depth=depth, heads=heads, mlp=mlp, mlp_hidden=hidden, **more)


# Sizes: DINOv3 paper (arXiv 2508.10104) table 2 and the entries of its torch.hub file; giant: DINOv2 (arXiv 2304.07193)
# table 17; tiny: DeiT (arXiv 2012.12877) table 1; nano, pico: ours, for CPUs. SwiGLU widths are those of the released
# tensors.
VARIANTS: dict[str, ViTConfig] = {
    #                  width depth heads  mlp      hidden          backbone parameters (patch 16, 3 channels)
    "pico": _size(64, 4, 2, "gelu", 256),  #                         0.3 M
    "nano": _size(192, 4, 3, "gelu", 768),  #                        1.9 M
    "tiny": _size(192, 12, 3, "gelu", 768),  #                       5.5 M
    "small": _size(384, 12, 6, "gelu", 1536),  #                    21.6 M
    "small_plus": _size(384, 12, 6, "swiglu", 1536),  #             28.7 M
    "base": _size(768, 12, 12, "gelu", 3072),  #                    85.7 M
    "large": _size(1024, 24, 16, "gelu", 4096),  #                   303 M
    "huge_plus": _size(1280, 32, 20, "swiglu", 5120),  #             841 M
    "giant": _size(1536, 40, 24, "swiglu", 4096),  #               1,135 M
    "7b": _size(4096, 40, 32, "swiglu", 8192, qkv_bias=False, local_cls_norm=True),  # 6.7 B
}


def variant_config(name: str, **changes: Any) -> ViTConfig:
    """Return a configuration of `VARIANTS` with some fields changed."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown variant {name!r}: expected one of {', '.join(VARIANTS)}{hint}")
    return replace(VARIANTS[name], **changes)


def variant_of(config: ViTConfig) -> str | None:
    """Return the name of a configuration's sizes in `VARIANTS`; None for other sizes."""
    matches = (name for name, v in VARIANTS.items() if all(getattr(v, s) == getattr(config, s) for s in SIZES))
    return next(matches, None)


def forward_flop(config: ViTConfig, image_size: int) -> float:
    """Return the operations of the forward pass of one image by the formula, for steps where tracing takes seconds.

    Two operations per multiply-accumulate, matrix products only; `dinocell.models.weights.forward_gflop` traces a
    model with fvcore.
    """
    patches = (image_size // config.patch_size) ** 2
    tokens = patches + config.num_prefix
    width, hidden = config.width, config.mlp_hidden
    matrices = 2 if config.mlp == "gelu" else 3
    linear = 2 * (4 * width**2 + matrices * width * hidden)
    attention = 4 * tokens * width
    embedding = 2 * patches * config.in_channels * config.patch_size**2 * width
    return float(config.depth * tokens * (linear + attention) + embedding)


def head_flop(width: int, hidden: int, bottleneck: int, layers: int, num_prototypes: int) -> float:
    """Return the operations of one token in a projection head with its prototypes."""
    inside = width * hidden + (layers - 2) * hidden**2 + hidden * bottleneck if layers > 1 else width * bottleneck
    return 2.0 * (inside + bottleneck * num_prototypes)


Convention = Literal["unit", "standardised", "imagenet"]
"""Pixel values that a model expects.

``unit``: values in [0, 1]. ``standardised``: zero mean and unit variance per image and channel.
``imagenet``: RGB in [0, 1], normalised with the ImageNet mean and standard deviation (the released RGB models).
"""


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """How images are converted to the model's input.

    ``convention`` is binding. The other fields record the training: the
    channel policy of the views, the names of the channels if their order matters, the percentiles of intensity that
    were mapped to [0, 1], and the pixel size.
    """

    convention: Convention = "standardised"
    channel_policy: str | None = None
    channel_names: tuple[str, ...] = ()
    percentiles: tuple[float, float] | None = None
    pixel_size_um: float | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsCard:
    """Input settings, provenance and licence of a model.

    ``derived_from`` lists every source and conversion, oldest first.
    """

    input: InputSettings = field(default_factory=InputSettings)
    derived_from: tuple[str, ...] = ()
    licence: str = ""


LICENCES = {
    "dinov3": "DINOv3 License (Meta): whoever passes on these weights or anything derived from them must do so under "
    "that agreement and include a copy of it; publications must acknowledge DINOv3. "
    "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    "dinov2": "Apache License 2.0 (Meta, DINOv2)",
    "cell_dino": "FAIR Non-Commercial Research License (Meta, Cell-DINO): non-commercial research only; not for "
    "medical use, diagnostics included. https://github.com/facebookresearch/dinov2",
}
"""Licences of the released families, from their pages."""

UNKNOWN_LICENCE = (
    "not stated in the file: ask its author, and respect the licence of the weights that the training started from"
)
