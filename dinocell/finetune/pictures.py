"""Pictures of what fine-tuning sees and says."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dinocell.finetune.data import Examples

_SHOWN = 4
_GAP_PX = 2


def draw_examples(batch: Examples, maps: Float[Tensor, "b k h w"]) -> UInt8[np.ndarray, "rows columns"]:
    """Draw the first crops, a row each: image, then for each map the target, what was predicted, and the error.

    Images go from -2.5 to 2.5 deviations (or over their own range), maps from 0 to 1 (flows from -1), errors from 0 to
    1.
    """
    rows = []
    for image, target, predicted in list(zip(batch.images, batch.targets, maps, strict=True))[:_SHOWN]:
        planes = [image[0] / 5 + 0.5]
        for wanted, got in zip(target, predicted, strict=True):
            signed = bool(wanted.min() < 0)
            planes += [wanted / 2 + 0.5, got / 2 + 0.5] if signed else [wanted, got]
            planes.append((wanted - got).abs())
        padded = [torch.nn.functional.pad(plane, (0, _GAP_PX, 0, _GAP_PX)) for plane in planes]
        rows.append(torch.cat(padded, dim=1))
    sheet = torch.cat(rows).clamp(0, 1) * 255
    return np.asarray(sheet.byte().numpy())
