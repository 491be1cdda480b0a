"""The sizes and conventions of a vision transformer, and the table of known sizes."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dinocell.models.positions import LearnedPositionConfig, RopeConfig


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Everything that determines the tensors of a `VisionTransformer` and what they compute in eval mode.

    The defaults are DINOv3's, but for patch size 8 and one grey channel.
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
        for name in ("width", "depth", "heads", "mlp_hidden", "patch_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.registers < 0:
            raise ValueError(f"registers: expected at least 0, got {self.registers}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps: expected a small positive number, got {self.norm_eps}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.positions == "rope" and (self.width // self.heads) % 4:
            raise ValueError(f"rotary positions need a head width divisible by 4, got {self.width // self.heads}")

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return 1 + self.registers


def _size(width: int, depth: int, heads: int, mlp: Literal["gelu", "swiglu"], hidden: int, **more: Any) -> ViTConfig:
    return ViTConfig(width=width, depth=depth, heads=heads, mlp=mlp, mlp_hidden=hidden, **more)


# Sizes: DINOv3 paper (arXiv 2508.10104) table 2 and the entries of its torch.hub file; giant: DINOv2 (arXiv 2304.07193)
# table 17; tiny: DeiT (arXiv 2012.12877) table 1; nano: ours, for CPUs. SwiGLU widths are those of the released
# tensors.
VARIANTS: dict[str, ViTConfig] = {
    #                  width depth heads  mlp      hidden          backbone parameters (patch 16, 3 channels)
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
    """Return a configuration of `VARIANTS` with some fields changed.

    Raises
    ------
    ValueError
        If the variant is unknown.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown variant {name!r}: expected one of {', '.join(VARIANTS)}{hint}")
    return replace(VARIANTS[name], **changes)


def variant_of(config: ViTConfig) -> str | None:
    """Return the name that a configuration's sizes have in `VARIANTS`; None for other sizes."""
    sizes = ("width", "depth", "heads", "mlp", "mlp_hidden")
    same = (n for n, known in VARIANTS.items() if all(getattr(known, s) == getattr(config, s) for s in sizes))
    return next(same, None)
