"""What a segmenter is, in words and numbers."""

from dinocell.finetune.files import SegmenterFile
from dinocell.finetune.preprocess import SegmenterSettings


def describe_segmenter(file: SegmenterFile) -> dict[str, str]:
    """Return what there is to know about a segmenter, as lines of name and value in reading order."""
    vit, settings = file.vit, file.settings
    count = {
        part: sum(tensor.numel() for name, tensor in file.tensors.items() if name.startswith(part))
        for part in ("backbone.", "decoder.")
    }
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()})
    clahe = (
        f"CLAHE {settings.clahe_clip:g} in tiles of {settings.clahe_tile_px} px" if settings.clahe_clip else "no CLAHE"
    )
    size = f"{settings.pixel_size_um:g} um" if settings.pixel_size_um is not None else "not stated"
    low, high = settings.percentiles
    return {
        "format": "DINOCell segmenter",
        "architecture": f"ViT of width {vit.width}, {vit.depth} blocks, patch {vit.patch_size} px; decoder at blocks "
        f"{', '.join(map(str, file.blocks))}",
        "parameters": f"{count['backbone.']:,} backbone, {count['decoder.']:,} decoder ({', '.join(dtypes)})",
        "target": settings.target,
        "input": f"{settings.convention}, percentiles {low:g} and {high:g}, {clahe}",
        "windows": f"{settings.window_px} px",
        "pixel size": size,
        "cells": _rule(settings),
        "trained on": ", ".join(settings.trained_on) or "not stated",
        "derived from": " | ".join(file.card.derived_from) or "trained from random weights",
        "licence": file.card.licence or "not stated",
    }


def _rule(settings: SegmenterSettings) -> str:
    """Say how maps become cells."""
    if settings.target == "flows":
        return f"chance above {settings.probability:.3g}, flow error up to {settings.flow_error:.3g}"
    merging = "no merging" if settings.merge_px is None else f"merging at {settings.merge_px:g} px"
    border = "borders restored" if settings.restore_border else "borders as cut"
    return f"peaks above {settings.cells_max:.3g}, fill above {settings.cell_fill:.3g}, {merging}, {border}"
