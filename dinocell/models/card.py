"""What travels with weights besides the tensors: how to feed them, where they come from, on what terms."""

from dataclasses import dataclass, field

from dinocell.models.resample import Convention


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """How images become the model's input.

    ``convention`` is binding (see `dinocell.models.resample.Convention`). The rest records the training: the
    channel policy of the views, the names of the channels where their order matters, the percentiles of
    intensity that were mapped to [0, 1], and the size of a pixel in micrometres.
    """

    convention: Convention = "standardised"
    channel_policy: str | None = None
    channel_names: tuple[str, ...] = ()
    percentiles: tuple[float, float] | None = None
    pixel_size_um: float | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsCard:
    """Input settings, ancestry and terms of a model.

    ``derived_from`` names every ancestor and every conversion, oldest first.
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
"""Terms of the released families, as their own pages state them."""

UNKNOWN_LICENCE = (
    "not stated in the file: ask whoever trained it, and mind the terms of the weights it was started from"
)
