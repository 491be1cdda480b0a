"""README and docs against the program: every line is parsed, what is cheap runs on small inputs of the same names.

The blocks of the README and then of the user guide run in their order in a folder with the files that they name, with a
backbone of four narrow blocks.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dinocell.cli import build_parser, main
from dinocell.configs.load import find_recipe, load_config
from dinocell.demo.data import DemoConfig
from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import ConfigError
from dinocell.eval.metrics.ctc import write_reference
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.model import DINOCell
from dinocell.images.write import write_labels, write_png, write_tiff
from dinocell.labelled.build import build_labelled
from dinocell.labelled.distance import labels_to_distance
from dinocell.labelled.layouts import folder_pairs
from dinocell.launch.slurm import fill_in
from dinocell.models.config import VARIANTS, variant_config
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.models.weights import Weights, save_weights
from dinocell.ssl.config import PretrainConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
SCHEMAS = {"demo": DemoConfig, "pretrain": PretrainConfig, "finetune": FinetuneConfig}
# Lines of the README and the guide that are parsed but not run, by how they begin, and why.
NOT_RUN = {
    "make": "the tests of the demo, and this suite, are what they run",
    "pip": "installs",
    "tensorboard": "serves until it is stopped",
    "torchrun": "the tests of pretraining start ranks",
    "dinocell demo": "test_demo.py runs it",
    "dinocell info hf://": "needs the network",
    "dinocell shards build --source load-data": "needs a bucket",
    "dinocell evaluate --model best.pt --dataset CTC/ --binary-path": "needs the challenge's own programs",
}
# What makes a Python block of the README short, or end.
SHORTER = {
    "batch_size=64, rank=rank, world_size=8, position=position": "batch_size=2, stop=4",
    "workers=8": "workers=0",
}


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its text."""

    path: Path
    line: int
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(path, text[: found.start()].count("\n") + 1, found[1], found[2])


def lines_of(paths: list[Path]) -> list[tuple[str, list[str]]]:
    found = [
        (f"{block.path.name}:{block.line}", words)
        for path in paths
        for block in blocks(path)
        if block.language in ("", "bash")
        for words in block.commands()
    ]
    # The tables of another tool's words beside ours hold whole commands, too.
    for number, line in enumerate((ROOT / "docs/coming-from.md").read_text(encoding="utf-8").splitlines(), start=1):
        whole = re.findall(r"`(dinocell [^`]*--[^`]*)`", line)
        found.extend((f"coming-from.md:{number}", shlex.split(text)) for text in whole)
    return found


def check(words: list[str]) -> None:
    """Fail unless a command line is one that can be typed."""
    program, *arguments = words
    if program == "make":
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert phony is not None
        assert set(arguments) <= set(phony[1].split())
    elif program in ("torchrun", "python"):
        where = arguments.index("-m")
        assert arguments[where + 1] in ("dinocell", "dinocell.cli")
        check(["dinocell", *arguments[where + 2 :]])
    elif program in ("pip", "tensorboard"):
        assert arguments[0] in ("install", "--logdir")
    else:
        assert program == "dinocell", f"unknown program {program}"
        check_command(arguments)


def check_command(arguments: list[str]) -> None:
    options = build_parser().parse_args(arguments)
    command = arguments[0]
    if command in SCHEMAS:
        required = {"demo": [], "pretrain": ["output=o"], "finetune": ["output=o"]}[command]
        load_config(
            SCHEMAS[command], find_recipe(command, options.recipe or "standard"), [*required, *options.overrides]
        )
    if command == "shards" and getattr(options, "views", None):
        recipe, *overrides = options.views
        load_config(PretrainConfig, find_recipe("pretrain", recipe), ["output=o", "data.shards=[s]", *overrides])
    if command == "launch" and "--" in arguments:
        nested = arguments[arguments.index("--") + 1 :]
        check_command(fill_in(nested, 1, options.array))


LINES = lines_of([README, *DOCS])


@pytest.mark.parametrize(("where", "words"), LINES, ids=[f"{where} {' '.join(words[:3])}" for where, words in LINES])
def test_every_documented_line_can_be_typed(where: str, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("dinocell segmnt a.tif", SystemExit),
        ("dinocell segment a.tif --modell m.pt", SystemExit),
        ("dinocell pretrain debug data.shard='[s]'", ConfigError),
        ("dinocell launch -- finetune debug", ConfigError),
        ("make cake", AssertionError),
        ("conda install x", AssertionError),
    ],
)
def test_a_line_that_cannot_be_typed_is_found(line: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        check(shlex.split(line))


def test_the_architecture_page_lists_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = set()
    for folder, modules in re.findall(r"^\| `([\w/]+)` \| (.*?) \|", text, flags=re.MULTILINE):
        base = ROOT / "dinocell" if folder == "dinocell" else ROOT / "dinocell" / folder
        listed |= {base / f"{module}.py" for module in re.findall(r"`(\w+)`", modules)}
    modules = {path for path in (ROOT / "dinocell").rglob("*.py") if path.name != "__init__.py"}
    assert {str(path) for path in modules ^ listed} == set()


def test_every_link_of_the_documentation_exists() -> None:
    for path in (README, *DOCS, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_key_that_the_training_guide_names_exists() -> None:
    known = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/configuration.md").read_text(), flags=re.MULTILINE))
    sections = {key.split(".")[0] for key in known if "." in key}
    words = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", (ROOT / "docs/training.md").read_text())
    named = {word for word in words if word.split(".")[0] in sections}
    assert len(named) > 20
    # A section stands for all its keys.
    assert not {word for word in named if word not in known and not any(key.startswith(f"{word}.") for key in known)}


SMALL = SyntheticConfig(size=(96, 112), channels=("DNA", "RNA", "ER", "AGP", "Mito"), num_cells=(6, 9))


def labelled(folder: Path, image: str, mask: str, count: int = 4) -> list[str]:
    names = [f"n{number}" for number in range(count)]
    for number, name in enumerate(names):
        made = make_field(number, SMALL)
        for pattern in (image, mask):
            (folder / pattern.format(name)).parent.mkdir(parents=True, exist_ok=True)
        grey = (made.pixels[0] >> 8).astype(np.uint8)
        (write_png if image.endswith("png") else write_tiff)(folder / image.format(name), grey)
        labels = made.labels
        write_png(folder / mask.format(name), labels.astype(np.uint16)) if mask.endswith("png") else write_labels(
            folder / mask.format(name), labels
        )
    return names


def livecell(folder: Path) -> None:
    """Images and an annotation file with run lengths, columns first, as COCO has them."""
    images, annotations = [], []
    for number in range(4):
        made = make_field(number, SMALL)
        name = f"A172_Phase_{number}.tif"
        path = folder / "images" / "livecell_train_val_images" / "A172" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tiff(path, (made.pixels[0] >> 8).astype(np.uint8))
        images.append({"id": number, "file_name": name, "height": 96, "width": 112})
        for label in range(1, int(made.labels.max()) + 1):
            flat = np.concatenate([[0], (made.labels == label).T.ravel(), [0]]).astype(int)
            edges = np.flatnonzero(np.diff(flat)).tolist()
            counts = np.diff([0, *edges, 96 * 112]).tolist()
            segmentation = {"size": [96, 112], "counts": counts}
            annotations.append({"id": len(annotations), "image_id": number, "iscrowd": 0, "segmentation": segmentation})
    path = folder / "annotations" / "LIVECell" / "livecell_coco_train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def write_inputs(root: Path) -> None:
    """Everything that the README's lines read."""
    labelled(root, "images/{}.tif", "ignored/{}.tif", 2)
    (root / "list.txt").write_text("images/n0.tif\nimages/n1.tif\n")
    labelled(root, "mine/images/{}.tif", "mine/masks/{}.png")
    labelled(root, "cellpose/train/{}_img.png", "cellpose/train/{}_masks.png")
    labelled(root, "bbbc039/images/{}.tif", "bbbc039/masks/{}.png")
    labelled(root, "plain/images/{}.tif", "plain/masks/{}.tif", 2)
    labelled(root, "plain/images/{}.tif", "cellpose/{}_cp_masks.png", 2)
    build_labelled(
        folder_pairs(root / "plain", images="images/{name}.tif", masks="masks/{name}.tif"), root / "datasets/test"
    )
    livecell(root / "LIVECell_dataset_2021")
    fields = [make_field(number, SMALL) for number in range(8)]
    write_reference(root / "CTC", "01", [field.labels for field in fields[:2]])
    (root / "CTC/01").mkdir(exist_ok=True)
    for number, field in enumerate(fields[:2]):
        write_tiff(root / f"CTC/01/t{number:03d}.tif", field.pixels[0])
    for number, field in enumerate(fields):
        plate, well = f"P{number // 4}", f"{'ABCD'[number % 4]}01"
        for channel, plane in enumerate([*field.pixels, field.pixels[0]], start=1):
            path = root / f"plates/{plate}/Images/r{number % 4 + 1:02d}c01f01p01-ch{channel}sk1fk1fl1.tiff"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tiff(path, plane)
        for name, plane in zip(SMALL.channels, field.pixels, strict=True):
            (root / "screen" / plate).mkdir(parents=True, exist_ok=True)
            write_tiff(root / f"screen/{plate}/{well}_s1_w{name}.tif", plane)
    with (root / "plate_map.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("well", "compound"), ("A01", "DMSO"), ("B01", "DMSO"), ("C01", "x"), ("D01", "y")])
    for part, seeds in (("train", range(10)), ("test", range(10, 14))):
        for kind, channel in (("nuclei", 0), ("er", 2)):
            (root / "classes" / part / kind).mkdir(parents=True)
            for seed in seeds:
                write_png(root / f"classes/{part}/{kind}/{seed}.png", make_field(seed, SMALL).pixels[channel])


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the README names, as the working folder; every size of backbone is four narrow blocks."""
    for size in ("tiny", "small", "base"):
        nano = variant_config(size, width=32, depth=4, heads=2, mlp_hidden=64)
        monkeypatch.setitem(VARIANTS, size, nano)
    torch.manual_seed(1)
    write_inputs(tmp_path)
    save_weights(tmp_path / "teacher_checkpoint.pth", Weights.of(VisionTransformer(VARIANTS["small"])))
    built = DINOCell("vitt8", pretrained=False)
    torch.nn.init.normal_(built.decoder.head.weight, std=1.0)
    built.save_pretrained(tmp_path / "best.pt")
    meta = ViTConfig(width=64, depth=12, heads=1, mlp_hidden=256, patch_size=16, in_channels=3)
    path = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    save_weights(path, Weights.of(VisionTransformer(meta)), layout="meta-flat")
    monkeypatch.setenv("DINOCELL_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str]) -> int:
    """Run a line; trainings and jobs only as far as ``--dry-run`` goes."""
    if arguments[0] == "launch" and arguments[1] in ("status", "logs"):
        assert main(arguments) == 2  # parsed; there is no such launch
        return 0
    if arguments[0] == "launch":
        return main(["launch", "--dry-run", *arguments[1:]])
    if arguments[0] == "info":  # it traces the model, which the checks of shapes in this process would not let through
        line = [sys.executable, "-m", "dinocell", *arguments]
        return subprocess.run(line, check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    if arguments[0] in ("pretrain", "finetune") and "--dry-run" not in arguments:
        arguments = [*arguments, "--dry-run"]
    return main(arguments)


def names_of_the_python_blocks() -> dict[str, Any]:
    fields = [make_field(number, SMALL) for number in range(2)]
    distances = [labels_to_distance(field.labels) for field in fields]
    return {
        "image": fields[0].pixels,
        "images": torch.randn(2, 1, 32, 32),
        "global_crops": torch.randn(2, 1, 32, 32),
        "local_crops": torch.randn(4, 1, 16, 16),
        "rank": 0,
        "position": 0,
        "distance": distances[0],
        "reference": fields[0].labels,
        "distances": distances,
        "references": [field.labels for field in fields],
    }


@pytest.mark.slow
def test_the_readme_and_the_guide_run_from_top_to_bottom(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, ran, shortened = names_of_the_python_blocks(), 0, set()
    for block in (*blocks(README), *blocks(GUIDE)):
        if block.language == "python":
            text = block.text
            for long, short in SHORTER.items():
                shortened |= {long} if long in text else set()
                text = text.replace(long, short)
            exec(compile(text, f"{block.path.name}:{block.line}", "exec"), names)  # noqa: S102
        elif block.language == "":
            for words in block.commands():
                if not any(" ".join(words).startswith(start) for start in NOT_RUN):
                    assert run(words[1:]) == 0, (
                        f"{block.path.name}:{block.line}: {shlex.join(words)}\n{capsys.readouterr().err}"
                    )
                    ran += 1
    assert ran > 25
    assert shortened == set(SHORTER)
    written = """results/n0_cells.csv results/n1_overlay.png nuclei/n0_cells.geojson lists/coco.json jump.png
        views.png CTC/01_RES/mask000.tif evaluation/report.html compared/report.html
        datasets/BBBC039/dataset.json probes/knn probes/linear
        probes/profiles probes/consistency vits8_grey_hf/config.json thresholds.png"""
    for path in written.split():
        assert (inputs / path).exists(), path
