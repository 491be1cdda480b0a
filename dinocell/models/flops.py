"""What a pass costs by the formula: two operations a multiply-accumulate, matrix products only.

It costs nothing and knows what a step of several passes adds up to; `dinocell.models.describe.forward_gflop` traces a
model, norms and rotations included.
"""

from dinocell.models.config import ViTConfig


def forward_flop(config: ViTConfig, image_size: int) -> float:
    """Return the operations of one image's forward pass."""
    patches = (image_size // config.patch_size) ** 2
    tokens = patches + config.num_prefix
    width, hidden = config.width, config.mlp_hidden
    matrices = 2 if config.mlp == "gelu" else 3
    linear = 2 * (4 * width**2 + matrices * width * hidden)
    attention = 4 * tokens * width
    embedding = 2 * patches * config.in_channels * config.patch_size**2 * width
    return float(config.depth * tokens * (linear + attention) + embedding)


def head_flop(width: int, hidden: int, bottleneck: int, layers: int, num_prototypes: int) -> float:
    """Return the operations of one token's way through a projection head and its prototypes."""
    inside = width * hidden + (layers - 2) * hidden**2 + hidden * bottleneck if layers > 1 else width * bottleneck
    return 2.0 * (inside + bottleneck * num_prototypes)
