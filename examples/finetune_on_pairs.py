"""Fine-tune a segmenter on images and masks of your own from Python, and score it on an image that it has not seen.

    python examples/finetune_on_pairs.py mine/ teacher_checkpoint.pth runs/mine    # mine/images, mine/masks
    python examples/finetune_on_pairs.py --quick    # generated pairs, random weights: the score means nothing

The command line does the same: ``dinocell finetune own_folder data.images=mine/images data.masks=mine/masks ...``.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from dinocell import DINOCell, DINOCellPipeline
from dinocell.configs.load import find_recipe, load_config
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.threshold_search import score_segmenter
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.train import finetune
from dinocell.images.write import write_labels, write_tiff


def finetune_on_pairs(folder: Path, output: Path, overrides: list[str]) -> DINOCell:
    """Train on ``folder/images`` and ``folder/masks`` and return the best epoch's segmenter, with its thresholds."""
    settings = [f"data.images={folder / 'images'}", f"data.masks={folder / 'masks'}", f"output={output}", *overrides]
    config = load_config(FinetuneConfig, find_recipe("finetune", "own_folder"), settings)
    return DINOCell.from_pretrained(finetune(config, score=score_segmenter))


def quick() -> None:
    """Go through it on generated pairs."""
    look = SyntheticConfig(size=(128, 128), channels=("AGP",), num_cells=(6, 10))
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "mine"
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        for seed in range(5):
            field = make_field(seed, look)
            write_tiff(folder / "images" / f"{seed}.tif", field.pixels[0])
            write_labels(folder / "masks" / f"{seed}.tif", field.labels)
        small = ["model.size=nano", "model.pretrained=false", "augment.crop=64", "epochs=1", "batch_size=2"]
        small += ["data.crops_per_image=1", "compute.workers=0", "optim.warmup_steps=1"]
        model = finetune_on_pairs(folder, Path(scratch) / "run", small)
        unseen = make_field(99, look)
        score = ctc_score(unseen.labels, DINOCellPipeline(model).run(unseen.pixels[0]))
        print(f"SEG {score.seg:.3f}, DET {score.det:.3f}, OP_CSB {score.op_csb:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("mine"))
    parser.add_argument("weights", nargs="?", default="teacher_checkpoint.pth")
    parser.add_argument("output", nargs="?", type=Path, default=Path("runs/mine"))
    parser.add_argument("--quick", action="store_true", help="generated pairs, random weights, one epoch")
    options = parser.parse_args()
    if options.quick:
        quick()
    else:
        finetune_on_pairs(options.folder, options.output, [f"model.weights={options.weights}"])
