"""Features on the disk: extracted once, by several ranks and starts, and shared by all probes."""

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
    """Extract the features of a set to a folder, or read those that are there; what was begun is finished.

    ::

        features.npy       (n d) or (n c d), float32 or float16, mapped into memory when read
        rows.csv           a line an image: its id, and what is known about it
        extraction.json    weights (content and place), set and settings: a folder of others is refused

    Parameters
    ----------
    weights
        Where the backbone comes from, for the record; a file's content counts, not its name.
    half
        Keep float16.
    world
        Ranks that share the images; each calls this, and all return the same.
    progress
        Called with the number of images that this rank has done.

    Raises
    ------
    DinocellError
        If the folder holds the features of something else, another process is extracting them or it cannot be made,
        or as ``extract``.
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
    """Make the folder, and keep other runs from what is begun in it: two would write each other's rows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinocellError(f"{folder}: cannot be written ({error.strerror or error})") from error
    with folder_lock(folder, wait=False) as is_ours:
        if not is_ours and not (folder / "rows.csv").exists():
            raise DinocellError(f"{folder}: another process extracts these features now; start again when it is done")
        yield


def _claim(folder: Path, facts: Mapping[str, object], weights: str, world: World) -> None:
    said = folder / "extraction.json"
    if world.is_main:
        if said.exists():
            before = json.loads(said.read_text(encoding="utf-8"))
            differing = [key for key, value in facts.items() if before.get(key) != json.loads(json.dumps(value))]
            if differing:
                raise DinocellError(
                    f"{folder} holds features with other {', '.join(differing)}; remove it, or choose another folder"
                )
        place = str(Path(weights).absolute()) if Path(weights).exists() else weights
        write_atomically(said, json.dumps({**facts, _PLACE: place}, indent=1) + "\n")
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
    """Append a line and a row for each image to this rank's part, after what an earlier start left whole."""
    rows_path = part.with_suffix(".rows")
    whole, size = _whole_lines(part, rows_path.stat().st_size if rows_path.exists() else 0)
    done = len(whole)
    dtype = np.float16 if half else np.float32
    with part.open("w", encoding="utf-8") as said, rows_path.open("ab") as rows:
        said.writelines(whole)
        rows.truncate(size)
        start = span.start + done
        for number, (image, row) in enumerate(
            feature_rows(backbone, images.images(start, span.stop), settings), start=done + 1
        ):
            content = b"" if row is None else np.ascontiguousarray(row, dtype).tobytes()
            rows.write(content)
            rows.flush()
            line = {"id": image.id, "labels": dict(image.labels), "problem": image.problem, "bytes": len(content)}
            line |= {"shape": [] if row is None else list(row.shape), "channels": list(image.channel_names)}
            said.write(json.dumps(line) + "\n")
            said.flush()
            progress(number)


def _whole_lines(part: Path, num_bytes: int) -> tuple[list[str], int]:
    """Return the lines that are whole and whose rows are, too, of ``num_bytes`` there are, and the bytes of these.

    A machine that dies may keep the end of either file and lose that of the other.
    """
    whole: list[str] = []
    size = 0
    for line in part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []:
        if not line.endswith("\n") or (after := size + int(json.loads(line)["bytes"])) > num_bytes:
            break
        whole.append(line)
        size = after
    return whole, size


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
            _log.warning("%s: left out: %s", line["id"], line["problem"])
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
    for part in folder.glob(".features-*"):  # those that a start with another number of ranks left, too
        part.unlink()


def read_features(folder: Path) -> Features:
    """Read what `extract_to` wrote, values mapped into memory.

    Raises
    ------
    DinocellError
        If the folder holds no features, or they were not finished.
    """
    if not (folder / "rows.csv").exists():
        raise DinocellError(f"{folder}: holds no features (rows.csv is missing); extract them with 'dinocell features'")
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        (_, *columns), *rows = csv.reader(file)  # by place: there may be a label called id, too
    return Features(
        # c: writable, but never to the file; torch warns of memory that is not writable.
        values=np.load(folder / "features.npy", mmap_mode="c", allow_pickle=False),
        ids=tuple(row[0] for row in rows),
        labels=tuple(dict(zip(columns, row[1:], strict=True)) for row in rows),
        channel_names=tuple(json.loads((folder / "channels.json").read_text(encoding="utf-8"))),
        problems=tuple((folder / "problems.txt").read_text(encoding="utf-8").splitlines()),
    )


def weights_of(folder: Path) -> str:
    """Return where the weights of the features lay when they were extracted; "" in folders that do not say."""
    said: dict[str, str] = json.loads((folder / "extraction.json").read_text(encoding="utf-8"))
    return said.get(_PLACE, "")


def fingerprint(weights: str) -> str:
    """Return what tells weights from others: the hash of a file's content, else the name."""
    path = Path(weights)
    if not path.is_file():
        return weights
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
