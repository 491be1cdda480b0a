"""Can training and post-processing give back what they were shown? Four generated images, learnt by heart.

    python benchmarks/overfit.py            # both targets; writes results/overfit_TARGET.md
    python benchmarks/overfit.py --quick    # distance maps, two images, 30 steps; writes nothing

The decoder of a tiny vision transformer of random, frozen weights learns four images without augmentation, and is
scored on the same four: pooled OP_CSB, with the thresholds that score best on them. This says nothing
about other images. It says that crops, targets, loss, optimizer, file, windows and post-processing fit together: a
target that lies a pixel beside its image, or a rule that cannot cut what the network learnt, ends below 0.95. So does a
window that shows other surroundings than the crops did: here both are the same.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from _harness import write_result

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.eval.threshold_search import score_segmenter
from dinocell.finetune.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    StoppingConfig,
)
from dinocell.finetune.model import DINOCell
from dinocell.finetune.targets import TargetName
from dinocell.finetune.train import finetune
from dinocell.images.write import write_labels, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.dataset import open_labelled
from dinocell.labelled.layouts import folder_pairs

TARGET_OP_CSB = 0.95
SIDE_PX, STEPS, LEARNING_RATE = 48, 400, 5e-3
# An image lies in the middle of one window and is mirrored around: what is learnt by heart are these pictures.
WINDOW_PX = 80
score = partial(score_segmenter, crop_size=WINDOW_PX, stride=SIDE_PX)
FIELD = SyntheticConfig(size=(SIDE_PX, SIDE_PX), channels=("AGP",), num_cells=(4, 6), cell_radius_px=10.0)
STILL = AugmentConfig(
    crop=WINDOW_PX,
    flip=0.0,
    rotation_deg=0.0,
    scale=(1.0, 1.0),
    brightness=(1.0, 1.0),
    invert_contrast=0.0,
    with_cells=0.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="distance maps, two images, 30 steps, no result file")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--targets", nargs="+", default=["distance", "flows"], choices=["distance", "flows"])
    options = parser.parse_args()
    targets, images, steps = (["distance"], 2, 30) if options.quick else (options.targets, 4, options.steps)
    for target in targets:
        lines = [
            f"# Over-fitting four images, target {target}",
            "",
            f"{images} generated images of {SIDE_PX} x {SIDE_PX} px (`make_field`, stain AGP), each in the middle of a",
            f"crop and of a window of {WINDOW_PX} px and mirrored around; a tiny ViT with patch 8 and random, frozen",
            f"weights; no augmentation; {steps} steps of all images, learning rate {LEARNING_RATE}, no weight decay.",
            "The last weights are scored on the same images, with the thresholds that score best on them.",
            "",
            "| minutes | loss, first step | loss, last step | SEG | DET | OP_CSB | thresholds |",
            "|---|---|---|---|---|---|---|",
            row(target, images, steps),
            "",
            f"Required: OP_CSB of at least {TARGET_OP_CSB} within minutes; other work may have shared the machine.",
        ]
        print("\n".join(lines))
        if not options.quick and steps == STEPS:
            print(write_result(f"overfit_{target}", "\n".join(lines), ["torch", "numpy", "numba"]))


def row(target: TargetName, images: int, steps: int) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        labelled = make_set(Path(scratch), images)
        began = time.perf_counter()
        run = Path(scratch) / "run"
        finetune(config_of(labelled, run, target, steps, images))
        opened = open_labelled(labelled)
        model = DINOCell.from_pretrained(run / "last.pt")
        metrics = score(model, [opened[number] for number in range(len(opened))], True).metrics
        minutes = (time.perf_counter() - began) / 60
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [each["loss/train"] for each in logged if "loss/train" in each]
    settings = model.settings
    scores = [metrics[f"score/{name}"] for name in ("seg", "det", "op_csb")]
    found = f"cells_max {settings.cells_max:.3g}, cell_fill {settings.cell_fill:.3g}"
    if target == "flows":
        found = f"probability {settings.probability:.3g}, flow_error {settings.flow_error}"
    return f"| {minutes:.1f} | {losses[0]:.4f} | {losses[-1]:.4f} | " + " | ".join(
        [*(f"{score:.3f}" for score in scores), f"{found} |"]
    )


def make_set(root: Path, images: int) -> Path:
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number in range(images):
        field = make_field(np.random.SeedSequence((11, number)), FIELD)
        write_tiff(root / "images" / f"f{number}.tif", field.pixels)
        write_labels(root / "masks" / f"f{number}.tif", field.labels)
    build_labelled(folder_pairs(root, images="images/{name}.tif", masks="masks/{name}.tif"), root / "set")
    return root / "set"


def config_of(labelled: Path, output: Path, target: TargetName, steps: int, images: int) -> FinetuneConfig:
    return FinetuneConfig(
        output=output,
        data=DataConfig(sets=(str(labelled),), validation_sets=(str(labelled),), crops_per_image=steps // 10),
        epochs=10,
        batch_size=images,
        target=target,
        model=ModelConfig(size="tiny", pretrained=False, freeze_backbone=True),
        augment=STILL,
        optim=OptimConfig(learning_rate=LEARNING_RATE, weight_decay=0.0, warmup_steps=20),
        stopping=StoppingConfig(patience=0),
        score_every=10,
        image_every=10,
        checkpoint_every=10,
        compute=ComputeConfig(device="cpu", workers=0),
    )


if __name__ == "__main__":
    main()
