"""The small segmenter that the package carries, for `dinocell segment` without ``--model``."""

from pathlib import Path

# Beside it lies its model card, README.md.
SEGMENTER = Path(__file__).resolve().parents[1] / "box" / "segmenter.safetensors"

NOTICE = (
    "no --model: taking the small one in the box, which learnt from 751 public images of nuclei and of one kind of "
    "cell in phase contrast. Look at its overlays (--save-viz) before you count on it, and fine-tune on images of your "
    "own"
)
