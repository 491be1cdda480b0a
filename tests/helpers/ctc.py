"""Score a sequence in the folders of the Cell Tracking Challenge with `dinocell.eval.metrics.ctc`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinocell.errors import ImageError
from dinocell.eval.metrics.ctc import CTCScore, ctc_score_from, frame_files
from dinocell.eval.metrics.overlaps import ContingencyTable, contingency_table
from dinocell.labelled.masks import read_labels


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """A sequence's scores: SEG from the masks in SEG, DET from the markers in TRA."""

    segmentation: CTCScore
    """Against SEG; in many gold sets that holds only some frames, or some cells of them."""
    detection: CTCScore
    """Against TRA, or against SEG where there is no TRA."""

    @property
    def seg(self) -> float:
        """SEG, NaN without a reference cell."""
        return self.segmentation.seg

    @property
    def det(self) -> float:
        """DET, NaN without a reference marker."""
        return self.detection.det

    @property
    def op_csb(self) -> float:
        """The mean of the two."""
        return (self.seg + self.det) / 2


def score_sequence(folder: Path, sequence: str, *, truth: Literal["gold", "silver"] = "gold") -> SequenceScore:
    """Score ``01_RES`` against ``01_GT`` (or the masks of ``01_ST``), one frame at a time.

    Every reference frame needs its ``mask`` file; predicted frames without a reference are not looked at.

    Raises
    ------
    ImageError
        If files are missing, or cannot be read.
    """
    if truth not in ("gold", "silver"):
        raise ValueError(f"truth: expected gold or silver, got {truth!r}")
    seg_folder = folder / f"{sequence}_{'GT' if truth == 'gold' else 'ST'}" / "SEG"
    masks = frame_files(seg_folder, "man_seg")
    if not masks:
        raise ImageError(f"{seg_folder}: no man_seg*.tif; expected reference masks such as man_seg000.tif")
    markers = frame_files(folder / f"{sequence}_GT" / "TRA", "man_track")
    results = folder / f"{sequence}_RES"
    predicted = frame_files(results, "mask")
    segmentation = ctc_score_from(_tables(masks, predicted, results))
    detection = ctc_score_from(_tables(markers, predicted, results)) if markers else segmentation
    return SequenceScore(segmentation=segmentation, detection=detection)


def _tables(references: dict[int, Path], predicted: dict[int, Path], results: Path) -> Iterator[ContingencyTable]:
    for number, path in references.items():
        if number not in predicted:
            raise ImageError(f"{results}: no mask of frame {number}, which {path} is the reference of")
        reference, prediction = read_labels(path), read_labels(predicted[number])
        if reference.shape != prediction.shape:
            raise ImageError(f"{predicted[number]} is {prediction.shape}, {path} {reference.shape}; expected one size")
        yield contingency_table(reference, prediction)
