"""Small models with random weights."""

import torch

from dinocell.models.vit import VisionTransformer, variant_config


def tiny(in_channels: int = 1, seed: int = 0) -> VisionTransformer:
    """Return a ViT-nano/8 whose blocks count in full from the start."""
    torch.manual_seed(seed)
    vit = VisionTransformer(variant_config("nano", patch_size=8, in_channels=in_channels)).eval()
    vit.init_weights(layer_scale=1.0)
    return vit
