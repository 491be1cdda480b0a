"""Feature files: extracted once, by several ranks and with resuming, and shared by all probes."""

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dinocell.errors import DinocellError
from dinocell.eval.probes.features import Features, FeatureSettings, feature_rows, other_channels
from dinocell.eval.probes.image_sets import ImageSet
from dinocell.models.vit import VisionTransformer
from dinocell.runtime.distributed import World, barrier
from dinocell.runtime.files import folder_lock, write_atomically

_log = logging.getLogger(__name__)
_PLACE = "weights_from"


def extract_to(
    folder: Path,
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    *,
    weights: str,
    half: bool = False,
    world: World | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Extract the features of a set to a folder, resume an interrupted extraction, or read existing features.

    ::

        features.npy       (n d) or (n c d), float32 or float16, memory-mapped when read
        rows.csv           one row per image: id and labels
        extraction.json    weights (content and path), set and settings; a folder of another is rejected

    Parameters
    ----------
    weights
        Source of the backbone; files are compared by content, not by name.
    half
        Store float16.
    world
        Ranks over which the images are distributed; each calls this, and all return the same.
    progress
        Called with the number of images that this rank has processed.

    Raises
    ------
    DinocellError
        If the folder contains other features, another process is extracting them, or the folder cannot be created;
        and as ``extract``.
    """
    world = world or World()
    facts = {
        "weights": fingerprint(weights),
        "images": images.name,
        "num_images": len(images),
        "settings": {key: value for key, value in asdict(settings).items() if key != "batch_size"},
        "dtype": "float16" if half else "float32",
    }
    part = folder / f".features-{world.rank}-of-{world.size}.jsonl"
    with _alone(folder) if world.is_main else nullcontext():
        _claim(folder, facts, weights, world)
        if not (folder / "rows.csv").exists():
            _extract_part(part, backbone, images, settings, world.part(len(images)), half=half, progress=progress)
            barrier()
            if world.is_main:
                _join(folder, images, world.size, half=half)
            barrier()
    return read_features(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Create the folder and lock it, so that two runs do not mix their rows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinocellError(f"{folder}: cannot be written ({error.strerror or error})") from error
    with folder_lock(folder, wait=False) as is_ours:
        if not is_ours and not (folder / "rows.csv").exists():
            raise DinocellError(
                f"{folder}: another process is extracting these features; start again when it has finished"
            )
        yield


def _claim(folder: Path, facts: Mapping[str, object], weights: str, world: World) -> None:
    record = folder / "extraction.json"
    if world.is_main:
        if record.exists():
            before = json.loads(record.read_text(encoding="utf-8"))
            differing = [key for key, value in facts.items() if before.get(key) != json.loads(json.dumps(value))]
            if differing:
                raise DinocellError(
                    f"{folder} contains features with other {', '.join(differing)}; remove it, or choose another folder"
                )
        place = str(Path(weights).absolute()) if Path(weights).exists() else weights
        write_atomically(record, json.dumps({**facts, _PLACE: place}, indent=1) + "\n")
    barrier()


def _extract_part(
    part: Path,
    backbone: VisionTransformer,
    images: ImageSet,
    settings: FeatureSettings,
    span: slice,
    *,
    half: bool,
    progress: Callable[[int], None],
) -> None:
    """Append a line and a row per image to this rank's part, after the complete lines of an earlier start."""
    rows_path = part.with_suffix(".rows")
    complete, size = _complete_lines(part, rows_path.stat().st_size if rows_path.exists() else 0)
    done = len(complete)
    dtype = np.float16 if half else np.float32
    with part.open("w", encoding="utf-8") as lines, rows_path.open("ab") as rows:
        lines.writelines(complete)
        rows.truncate(size)
        start = span.start + done
        for count, (image, row) in enumerate(
            feature_rows(backbone, images.images(start, span.stop), settings), start=done + 1
        ):
            content = b"" if row is None else np.ascontiguousarray(row, dtype).tobytes()
            rows.write(content)
            rows.flush()
            line = {"id": image.id, "labels": dict(image.labels), "problem": image.problem, "bytes": len(content)}
            line |= {"shape": [] if row is None else list(row.shape), "channels": list(image.channel_names)}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            progress(count)


def _complete_lines(part: Path, num_bytes: int) -> tuple[list[str], int]:
    """Return the complete lines whose rows are within the first ``num_bytes``, and the number of bytes of these rows.

    After a crash either file may be shorter than the other.
    """
    complete: list[str] = []
    size = 0
    for line in part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []:
        if not line.endswith("\n") or (after := size + int(json.loads(line)["bytes"])) > num_bytes:
            break
        complete.append(line)
        size = after
    return complete, size


def _join(folder: Path, images: ImageSet, size: int, *, half: bool) -> None:
    parts = [folder / f".features-{rank}-of-{size}.jsonl" for rank in range(size)]
    lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    good = [line for line in lines if line["bytes"]]
    if not good:
        raise DinocellError(f"{images.name}: no image could be read; the first: {lines[0]['problem']}")
    shape = good[0]["shape"]
    other = next((line for line in good if line["shape"] != shape), None)
    if other is not None:
        raise DinocellError(other_channels(images, other["id"], other["channels"], good[0]["channels"]))
    for line in lines:
        if not line["bytes"]:
            _log.warning("%s: skipped: %s", line["id"], line["problem"])
    values = np.concatenate(
        [
            np.fromfile(part.with_suffix(".rows"), np.float16 if half else np.float32).reshape(-1, *shape)
            for part in parts
        ]
    )
    temporary = folder / ".features.npy"
    np.save(temporary, values)
    temporary.rename(folder / "features.npy")
    columns = sorted({key for line in good for key in line["labels"]})
    table = folder / ".rows.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *columns])
        for line in good:
            writer.writerow([line["id"], *(line["labels"].get(column, "") for column in columns)])
    write_atomically(folder / "channels.json", json.dumps(good[0]["channels"]))
    problems = [f"{line['id']}: {line['problem']}" for line in lines if not line["bytes"]]
    write_atomically(folder / "problems.txt", "".join(f"{line}\n" for line in problems))
    table.rename(folder / "rows.csv")
    for part in folder.glob(".features-*"):  # also those of a start with another number of ranks
        part.unlink()


def read_features(folder: Path) -> Features:
    """Read features written by `extract_to`; values are memory-mapped.

    Raises
    ------
    DinocellError
        If the folder contains no complete features.
    """
    if not (folder / "rows.csv").exists():
        raise DinocellError(
            f"{folder}: contains no features (rows.csv is missing); extract them with 'dinocell features'"
        )
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        (_, *columns), *rows = csv.reader(file)  # by position: a label may also be called id
    return Features(
        # c: copy on write; torch warns about memory that is not writable.
        values=np.load(folder / "features.npy", mmap_mode="c", allow_pickle=False),
        ids=tuple(row[0] for row in rows),
        labels=tuple(dict(zip(columns, row[1:], strict=True)) for row in rows),
        channel_names=tuple(json.loads((folder / "channels.json").read_text(encoding="utf-8"))),
        problems=tuple((folder / "problems.txt").read_text(encoding="utf-8").splitlines()),
    )


def weights_of(folder: Path) -> str:
    """Return the path of the weights at the time of extraction; "" if it was not recorded."""
    record: dict[str, str] = json.loads((folder / "extraction.json").read_text(encoding="utf-8"))
    return record.get(_PLACE, "")


def fingerprint(weights: str) -> str:
    """Return an identifier of weights: the hash of the content of a file, else the name."""
    path = Path(weights)
    if not path.is_file():
        return weights
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
