"""Score a segmenter on labelled images, as fine-tuning does on its validation images."""

from collections.abc import Sequence

import numpy as np

from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.metrics.matching import matching_score
from dinocell.eval.segmentation.pipeline import DECODERS, DINOCellPipeline, decode
from dinocell.eval.threshold_search import search_parameters
from dinocell.finetune.model import DINOCell
from dinocell.finetune.train import Scored
from dinocell.labelled.dataset import LabelledImage


def score_segmenter(
    model: DINOCell,
    images: Sequence[LabelledImage],
    find_thresholds: bool,
    *,
    crop_size: int | None = None,
    stride: int | None = None,
) -> Scored:
    """Return SEG, DET, OP_CSB and F1 over all images pooled.

    With ``find_thresholds`` the best point of a grid (distance maps: 20 x 20 thresholds, four merge distances, with and
    without boundary refinement; flows: 9 x 9 thresholds) is scored and returned as settings, unless the model's own
    settings score at least as well. The model is not changed, and predicts every image once.

    ``crop_size`` and ``stride`` are those of the tiles, see `DINOCellPipeline`.
    """
    pipeline = DINOCellPipeline(model, next(model.parameters()).device, crop_size, stride=stride)
    maps = [pipeline.maps(np.asarray(image.pixels), pixel_size_um=image.pixel_size_um) for image in images]
    references = [np.ascontiguousarray(image.labels, dtype=np.int32) for image in images]
    labels = [pipeline.cells(image_maps) for image_maps in maps]
    settings: dict[str, float | bool | None] = {}
    if find_thresholds and any(reference.any() for reference in references):
        parameters = model.settings.postprocessing
        search = search_parameters(maps, references, parameters, DECODERS[model.target].training_axes)
        if not ctc_score(references, labels).op_csb >= search.best_score:
            settings = search.best_point
            labels = [decode(image_maps, search.best) for image_maps in maps]
    ctc, matching = ctc_score(references, labels), matching_score(references, labels)
    metrics = {"score/seg": ctc.seg, "score/det": ctc.det, "score/op_csb": ctc.op_csb}
    metrics["score/f1_at_0.5"] = matching.at[0].f1
    return Scored({name: float(value) for name, value in metrics.items()}, settings)
