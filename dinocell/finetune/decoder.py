"""The decoder: tokens from four depths and the image itself become maps at full resolution.

A U-Net whose encoder is the vision transformer. All token maps have the resolution of the patches: the deeper ones
enter at the coarse levels of the decoder, the shallower ones at the fine levels. A shallow convolutional branch adds
from the image what patches do not resolve, the exact position of edges.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel.

    It has no statistics over the batch, which would be unreliable for a batch of 1 or 4, and none over the image, which
    would make the map of a cell depend on the rest of its tile.
    """

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convolutions(inputs: int, outputs: int, count: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [
            nn.Conv2d(inputs if index == 0 else outputs, outputs, 3, padding=1, bias=False),
            ChannelNorm(outputs),
            nn.GELU(approximate="tanh"),
        ]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """Turn four token maps and the image into maps of the image's size (logits, no sigmoid).

    Parameters
    ----------
    width
        Channels of the token maps.
    in_channels
        Channels of the image.
    out_channels
        Number of output maps.
    hidden
        Channels at 1/8 of the resolution; they decrease to a half, a sixth and a sixteenth towards the full resolution,
        where convolutions are expensive. By default the tokens' width, at most 512.
    """

    def __init__(self, width: int, *, in_channels: int = 1, out_channels: int = 1, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or min(width, 512)
        widths = [max(8, -(-hidden // share // 4) * 4) for share in (1, 2, 6, 16)]
        fine = [max(8, channels // 2) for channels in widths[1:]]  # of the image branch at 1/4, 1/2 and 1
        # Before upsampling, each token map is projected to the width of the level that it joins, the deepest first.
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels in (widths[0], *widths[:3]))
        self.stem = nn.ModuleList(
            [
                _convolutions(in_channels, fine[2], 1),
                nn.Sequential(nn.Conv2d(fine[2], fine[1], 3, stride=2, padding=1), nn.GELU(approximate="tanh")),
                nn.Sequential(nn.Conv2d(fine[1], fine[0], 3, stride=2, padding=1), nn.GELU(approximate="tanh")),
            ]
        )
        self.narrow = nn.ModuleList(nn.Conv2d(wide, narrow, 1) for wide, narrow in pairwise(widths))
        self.merge = nn.ModuleList(
            [
                _convolutions(2 * widths[0], widths[0], 4),
                _convolutions(2 * widths[1] + fine[0], widths[1]),
                _convolutions(2 * widths[2] + fine[1], widths[2]),
                _convolutions(widths[3] + fine[2], widths[3]),
            ]
        )
        self.head = nn.Conv2d(widths[3], out_channels, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise convolutions by He's normal distribution, biases to 0, norms to the identity, the head near 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(
        self, tokens: Sequence[Float[Tensor, "b d rows columns"]], images: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b k h w"]:
        """Return the maps.

        Parameters
        ----------
        tokens
            Four maps, the shallowest block first; of any resolution (patch 8, 14, 16).
        images
            The images that the tokens were computed from.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        full = self.stem[0](images)
        half = self.stem[1](full)
        quarter = self.stem[2](half)
        height, width = images.shape[-2:]
        eighth = (-(-height // 8), -(-width // 8))
        lateral = [layer(maps) for layer, maps in zip(self.lateral, reversed(tokens), strict=True)]
        # Coarse to fine: upsample, then fuse with the token map and the image branch of that level.
        x = self.merge[0](_resize_and_stack(eighth, *lateral[:2]))
        x = self.merge[1](_resize_and_stack(quarter.shape[-2:], self.narrow[0](x), lateral[2], quarter))
        x = self.merge[2](_resize_and_stack(half.shape[-2:], self.narrow[1](x), lateral[3], half))
        x = self.merge[3](_resize_and_stack((height, width), self.narrow[2](x), full))
        maps: Tensor = self.head(x)
        return maps


def _resize_and_stack(size: Sequence[int], *maps: Tensor) -> Tensor:
    """Resize maps bilinearly to one size and stack their channels."""
    size = tuple(size)
    resized = [
        x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps
    ]
    return torch.cat(resized, dim=1)
