"""``dinocell evaluate``: a report of scores of a segmenter, next to other tools' label images."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.commands._parser import add_command
from dinocell.errors import DinocellError, require

if TYPE_CHECKING:
    from dinocell.eval.evaluate import Evaluation

# Options that only a model uses, and options of the threshold search.
_OF_MODEL = ("cells_max", "cell_fill", "probability", "flow_error", "threshold_search", "device")
_OF_SEARCH = ("cells_max_range", "cell_fill_range", "save_to_model")


def register(subparsers: Any) -> None:
    """Add ``evaluate`` to the commands."""
    parser = add_command(
        subparsers,
        "evaluate",
        "score a segmenter, or other tools' label images, on labelled sets: SEG, DET, OP_CSB, AP, F1 and PQ",
        "dinocell evaluate --model best.pt --dataset sets/test --output evaluation\n"
        "  dinocell evaluate --dataset sets/test --predictions Cellpose=cellpose/ --predictions SAMCell=samcell/",
    )
    add = parser.add_argument
    add("--model", metavar="M", help="a segmenter: a path, a folder or hf://owner/name")
    add(
        "--dataset",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        metavar="D",
        help="folders: labelled sets (imgs.npy), Cell Tracking Challenge (01 with 01_GT/SEG), images/ with masks/, "
        "Cellpose or Data Science Bowl pairs",
    )
    add(
        "--predictions",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="label images of another tool: NAME.tif, NAME_labels.tif, NAME_cp_masks.png... for each image, in FOLDER "
        "or in FOLDER/SET; for frames of the challenge also 01_RES/mask000.tif",
    )
    add(
        "--encoding",
        choices=("labels", "regions"),
        default="labels",
        help="of the masks in masks/: one integer per cell (default), or regions of one colour",
    )
    add(
        "--binary-path",
        type=Path,
        metavar="P",
        help="folder of the Cell Tracking Challenge's SEGMeasure and DETMeasure; adds their scores to the tables",
    )
    add("--cells-max", type=float, metavar="T", help="peak threshold (default: the model's)")
    add("--cell-fill", type=float, metavar="T", help="mask threshold (default: the model's)")
    add("--probability", type=float, metavar="T", help="flow models only: cell probability (default: the model's)")
    add("--flow-error", type=float, metavar="T", help="flow models only: maximum flow error (default: the model's)")
    add(
        "--threshold-search",
        action="store_true",
        help="find the best pair of thresholds on a grid of 20 x 20 (flow models: 9 x 9)",
    )
    add("--cells-max-range", nargs=2, type=float, metavar=("A", "B"), help="range of the search (0.1 0.9)")
    add("--cell-fill-range", nargs=2, type=float, metavar=("A", "B"), help="range of the search (0.05 0.5)")
    add("--save-to-model", action="store_true", help="write the best thresholds to the model's file if they are better")
    add("--device", default=None, help="cpu or cuda (default: CUDA if available)")
    add("--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="(evaluation)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    predictions = _named_folders(options.predictions)
    from dinocell.eval.evaluation_sets import PairSet, open_evaluation_set
    from dinocell.eval.metrics.ctc import check_programs
    from dinocell.eval.report import write_report

    about = {"model": str(options.model)} if options.model is not None else {}
    about["sets"] = ", ".join(map(str, options.dataset))
    if options.binary_path is not None:
        check_programs(options.binary_path)
        about["official programs"] = str(options.binary_path)
    folders = _set_names(options.dataset)
    sets = {name: open_evaluation_set(folder, encoding=options.encoding) for name, folder in folders.items()}
    notes = {name: data_set.note for name, data_set in sets.items() if isinstance(data_set, PairSet) and data_set.note}
    about |= {f"note on {name}": note for name, note in notes.items()}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.output, prefix=".maps-") as scratch, _progress() as progress:
            evaluation = _evaluate(options, sets, predictions, Path(scratch), progress)
        written = write_report(options.output, evaluation, about=about)
    except OSError as error:
        raise DinocellError(f"{options.output}: cannot be written ({error.strerror or error})") from error
    _print_table(evaluation)
    for name, note in notes.items():
        print(f"{name}: {note}")
    if evaluation.threshold_search is not None:
        best = list(evaluation.threshold_search.best_point.items())[:2]
        print("best thresholds: " + " ".join(f"--{name.replace('_', '-')} {value:.4g}" for name, value in best))
        if options.save_to_model:
            print(_save_thresholds(Path(options.model), evaluation))
    print(f"wrote {', '.join(path.name for path in written)} to {options.output}")


def _evaluate(
    options: argparse.Namespace, sets: dict[str, Any], predictions: dict[str, Path], scratch: Path, progress: Any
) -> "Evaluation":
    from dataclasses import replace

    from dinocell.eval import evaluate as scoring
    from dinocell.eval.segmentation.pipeline import STEPS, DINOCellPipeline, threshold_values
    from dinocell.finetune.model import DINOCell

    tools = [scoring.tool_method(name, folder, sets) for name, folder in predictions.items()]
    methods: list[Any] = []
    search = None
    if options.model is not None:
        for tool in tools:
            if tool.name in (scoring.OURS, scoring.PLAIN, scoring.FOUND):
                raise DinocellError(f"--predictions: {tool.name!r} is the name of the model's scores; use another one")
            tool.check(sets)
        settings = {name: getattr(options, name) for name in (*_OF_MODEL[:4], "device")}
        pipeline = DINOCellPipeline(DINOCell.from_pretrained(options.model), **settings)
        if options.threshold_search:
            given = ((name, getattr(options, f"{name}_range")) for name in ("cells_max", "cell_fill"))
            axes = {name: threshold_values(name, ends[0], ends[1], STEPS) for name, ends in given if ends is not None}
            methods, search = scoring.search_methods(sets, pipeline, scratch / "maps", axes=axes, progress=progress)
        else:
            methods = scoring.segmenter_methods(sets, pipeline)
    methods += tools
    if options.binary_path is None:
        evaluation = scoring.score(sets, methods, progress=progress)
    else:
        evaluation = scoring.score_with_programs(
            sets, methods, scratch / "labels", binary_path=options.binary_path, progress=progress
        )
    return replace(evaluation, threshold_search=search)


def _check(options: argparse.Namespace) -> None:
    """Raise if there is nothing to score, a set is repeated, or an option would be ignored."""
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    is_local = options.model is not None and Path(options.model).exists()
    conflicts = (
        (options.model is None, _OF_MODEL, "needs --model"),
        (not options.threshold_search, _OF_SEARCH, "needs --threshold-search"),
        (options.save_to_model, _OF_MODEL[:4], "cannot be used with --save-to-model, which compares with the model's"),
        (not is_local, ("save_to_model",), f"expected a local model, got {options.model}"),
    )
    problems = [
        f"--{name.replace('_', '-')}: {reason}"
        for is_wrong, names, reason in conflicts
        for name in names
        if is_wrong and name in given
    ]
    if len({folder.resolve() for folder in options.dataset}) < len(options.dataset):
        problems.append(f"--dataset: expected each set once, got {', '.join(map(str, options.dataset))}")
    if options.model is None and not options.predictions:
        problems.insert(0, "nothing to score: set --model, or --predictions NAME=FOLDER")
    if problems:
        raise DinocellError(problems[0])


def _named_folders(texts: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        expected = "expected NAME=FOLDER with different names, such as Cellpose=results/"
        is_new = name and equals and folder and name not in folders
        require(is_new, f"--predictions: {expected}, got {text!r}")
        folders[name] = Path(folder)
    return folders


def _set_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the sets by folder name, with as many parent folders as make them unique: ``plate/test``."""
    resolved = [folder.resolve() for folder in folders]
    length, names = 1, [folder.name for folder in resolved]
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(folder.parts[1:][-length:]) for folder in resolved]
    return dict(zip(names, folders, strict=True))


def _save_thresholds(source: Path, evaluation: Any) -> str:
    """Replace the thresholds in a segmenter's file if they score better; return what was done."""
    from dataclasses import replace

    from dinocell.eval.evaluate import FOUND, OURS
    from dinocell.finetune.segmenter_file import read_segmenter, write_segmenter

    # The last row of a method has the scores of all sets.
    score = {row.method: row.scores.op_csb for row in evaluation.pooled}
    if not score[FOUND] > score[OURS]:
        return f"{source} keeps its thresholds: none scores better"
    file = read_segmenter(source)
    path = source / "model.safetensors" if source.is_dir() else source
    settings = replace(file.settings, **evaluation.threshold_search.best_point)
    write_segmenter(path, replace(file, settings=settings))
    return f"stored in {path}"


@contextmanager
def _progress() -> Iterator[Any]:
    """Show one bar per phase on a terminal, and one line at the end of each phase elsewhere."""
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

    with bars if is_live else nullcontext():
        yield report


def _print_table(evaluation: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    is_official = any(row.official is not None for row in evaluation.pooled)
    columns = ["set", "method", "SEG", "DET", "OP_CSB", "AP@0.5", "F1@0.5", "PQ"]
    table = Table(*columns, *(("SEG official", "DET official") if is_official else ()), box=None, pad_edge=False)
    for row in evaluation.pooled:
        scores = row.scores
        shown = [scores.seg, scores.det, scores.op_csb, scores.ap_50, scores.f1, scores.panoptic_quality]
        shown += [row.official.seg, row.official.det] if row.official is not None else []
        table.add_row(row.dataset, row.method, *(f"{value:.3f}" for value in shown))
    Console().print(table, highlight=False, markup=False)
