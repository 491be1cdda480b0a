"""``dinocell evaluate``: a page of scores of a segmenter, and of other tools' label images beside it."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinocell.errors import DinocellError


def register(subparsers: Any) -> None:
    """Add ``evaluate`` to the commands."""
    summary = "score a segmenter, or other tools' label images, on labelled sets"
    parser = subparsers.add_parser(
        "evaluate",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}: SEG, DET, OP_CSB, AP, F1 and PQ, each image and pooled. "
        "Writes scores.csv, scores_per_image.csv, scores.json, scores.md and report.html with the worst images.",
        epilog="examples:\n  dinocell evaluate --model best.pt --dataset sets/test --output evaluation\n"
        "  dinocell evaluate --dataset sets/test --predictions Cellpose=cellpose/ --predictions SAMCell=samcell/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="M", help="a segmenter: a path, a folder or hf://owner/name")
    parser.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        metavar="D",
        help="folders: labelled sets (imgs.npy), Cell Tracking Challenge (01 with 01_GT/SEG), images/ with masks/, "
        "Cellpose or Data Science Bowl pairs",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="label images of another tool: NAME.tif, NAME_labels.tif, NAME_cp_masks.png... of each image, in FOLDER "
        "or in FOLDER/SET; for the challenge's frames 01_RES/mask000.tif too",
    )
    parser.add_argument(
        "--encoding",
        choices=("labels", "regions"),
        default="labels",
        help="of the masks of images/ with masks/: one number a cell (default), or regions of one colour",
    )
    parser.add_argument(
        "--binary-path",
        type=Path,
        metavar="P",
        help="folder of the Cell Tracking Challenge's SEGMeasure and DETMeasure: shows their scores beside ours",
    )
    parser.add_argument("--cells-max", type=float, metavar="T", help="threshold of peaks (default: the model's)")
    parser.add_argument("--cell-fill", type=float, metavar="T", help="threshold of cells (default: the model's)")
    parser.add_argument("--probability", type=float, metavar="T", help="of a model of target flows: chance of a cell")
    parser.add_argument("--flow-error", type=float, metavar="T", help="of a model of target flows: largest flow error")
    parser.add_argument(
        "--threshold-search",
        action="store_true",
        help="find the best pair of thresholds on a grid of 20 x 20 (target flows: 9 x 9)",
    )
    parser.add_argument("--cells-max-range", nargs=2, type=float, metavar=("A", "B"), help="to search (0.1 0.9)")
    parser.add_argument("--cell-fill-range", nargs=2, type=float, metavar=("A", "B"), help="to search (0.05 0.5)")
    parser.add_argument("--save-to-model", action="store_true", help="write the thresholds found into the model's file")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: the best there is)")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="(evaluation)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    predictions = _named_folders(options.predictions)
    from dinocell.eval.evaluate import SearchGrid, evaluate_sets
    from dinocell.eval.evaluation_sets import PairSet, open_evaluation_set
    from dinocell.eval.metrics.ctc_files import check_programs
    from dinocell.eval.report import write_report
    from dinocell.eval.threshold_search import CELL_FILL_RANGE, CELLS_MAX_RANGE

    if options.binary_path is not None:
        check_programs(options.binary_path)
    folders = _set_names(options.dataset)
    sets = {name: open_evaluation_set(folder, encoding=options.encoding) for name, folder in folders.items()}
    pipeline = _pipeline(options) if options.model is not None else None
    grid = None
    if options.threshold_search:
        grid = SearchGrid(
            cells_max_range=tuple(options.cells_max_range or CELLS_MAX_RANGE),
            cell_fill_range=tuple(options.cell_fill_range or CELL_FILL_RANGE),
        )
    about = {"model": str(options.model)} if options.model is not None else {}
    about["sets"] = ", ".join(map(str, options.dataset))
    notes = {f"note on {name}": each.note for name, each in sets.items() if isinstance(each, PairSet) and each.note}
    about |= notes
    if options.binary_path is not None:
        about["official programs"] = str(options.binary_path)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.output, prefix=".maps-") as scratch, _progress() as progress:
            evaluation = evaluate_sets(
                sets,
                pipeline=pipeline,
                predictions=predictions,
                grid=grid,
                scratch=Path(scratch),
                binary_path=options.binary_path,
                progress=progress,
            )
        written = write_report(options.output, evaluation, about=about)
    except OSError as error:
        raise DinocellError(f"{options.output}: cannot be written ({error.strerror or error})") from error
    _print_table(evaluation)
    for name, note in notes.items():
        print(f"{name}: {note}")
    if evaluation.threshold_search is not None:
        best = list(evaluation.threshold_search.best._asdict().items())[:2]
        print("best thresholds: " + " ".join(f"--{name.replace('_', '-')} {value:.4g}" for name, value in best))
        if options.save_to_model:
            print(_save_thresholds(Path(options.model), evaluation))
    print(f"wrote {', '.join(path.name for path in written)} to {options.output}")


def _check(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored."""
    if options.model is None and not options.predictions:
        raise DinocellError("nothing to score: give --model, or --predictions NAME=FOLDER")
    given = {
        "--cells-max": options.cells_max is not None,
        "--cell-fill": options.cell_fill is not None,
        "--probability": options.probability is not None,
        "--flow-error": options.flow_error is not None,
        "--threshold-search": options.threshold_search,
        "--device": options.device is not None,
    }
    of_search = {
        "--cells-max-range": options.cells_max_range is not None,
        "--cell-fill-range": options.cell_fill_range is not None,
        "--save-to-model": options.save_to_model,
    }
    for option, is_given in given.items():
        if is_given and options.model is None:
            raise DinocellError(f"{option}: only a model has use for it; add --model, or leave it out")
    for option, is_given in of_search.items():
        if is_given and not options.threshold_search:
            raise DinocellError(f"{option}: add --threshold-search, or leave it out")
    for option in ("--cells-max", "--cell-fill", "--probability", "--flow-error"):
        if options.save_to_model and given[option]:
            raise DinocellError(f"--save-to-model: compares with the model's thresholds; leave out {option}")
    if options.save_to_model and not Path(options.model).exists():
        raise DinocellError(f"--save-to-model: expected a model on this disk, got {options.model}")


def _named_folders(texts: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise DinocellError(f"--predictions: expected NAME=FOLDER, such as Cellpose=results/, got {text!r}")
        if name in folders:
            raise DinocellError(f"--predictions: two folders are called {name!r}; name them differently")
        folders[name] = Path(folder)
    return folders


def _set_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the sets by the names of their folders, with as many above as tell them apart: ``plate/test``."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(folders):
        raise DinocellError(f"--dataset: expected each set once, got {', '.join(map(str, folders))}")
    length, names = 1, [folder.name for folder in resolved]
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(folder.parts[1:][-length:]) for folder in resolved]
    return dict(zip(names, folders, strict=True))


def _pipeline(options: argparse.Namespace) -> Any:
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline
    from dinocell.finetune.model import DINOCell

    return DINOCellPipeline(
        DINOCell.from_pretrained(options.model),
        device=options.device,
        cells_max=options.cells_max,
        cell_fill=options.cell_fill,
        probability=options.probability,
        flow_error=options.flow_error,
    )


def _save_thresholds(source: Path, evaluation: Any) -> str:
    """Change the thresholds in a segmenter's file and nothing else, if they score better; say what was done."""
    from dataclasses import replace

    from dinocell.eval.scoring import FOUND, OURS
    from dinocell.finetune.segmenter_file import read_segmenter, write_segmenter

    # The last row of a method is that of all sets.
    score = {each.method: each.scores.op_csb for each in evaluation.pooled}
    if not score[FOUND] > score[OURS]:
        return f"{source} keeps its thresholds: none scores better"
    best, file = evaluation.threshold_search.best, read_segmenter(source)
    path = source / "model.safetensors" if source.is_dir() else source
    settings = replace(file.settings, **best._asdict())
    write_segmenter(path, replace(file, settings=settings))
    return f"stored in {path}"


@contextmanager
def _progress() -> Iterator[Any]:
    """Show one bar a phase on a terminal, and nothing but the phases' ends elsewhere."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    is_live = console.is_terminal and sys.stderr.isatty()
    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console)
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if not is_live:
            if done == total:
                print(f"{what} {done} of {total}", file=sys.stderr)
            return
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)

    if not is_live:
        yield report
        return
    with bars:
        yield report


def _print_table(evaluation: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    is_official = any(each.official is not None for each in evaluation.pooled)
    columns = ["set", "method", "SEG", "DET", "OP_CSB", "AP@0.5", "F1@0.5", "PQ"]
    table = Table(*columns, *(("SEG official", "DET official") if is_official else ()), box=None, pad_edge=False)
    for each in evaluation.pooled:
        scores = each.scores
        shown = [scores.seg, scores.det, scores.op_csb, scores.ap_50, scores.f1, scores.panoptic_quality]
        shown += [each.official.seg, each.official.det] if each.official is not None else []
        table.add_row(each.dataset, each.method, *(f"{value:.3f}" for value in shown))
    Console().print(table, highlight=False, markup=False)
