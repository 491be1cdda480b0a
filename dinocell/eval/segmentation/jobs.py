"""Which images `dinocell segment` works on, and the names of the files that it writes for each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import DinocellError, ImageError

SUMMARY, COCO = "summary.csv", "coco.json"
# The files of each image, by option: the end of the file name. Maps are named after the model's target.
ENDINGS: dict[str, str] = {
    "csv": "_cells.csv",
    "save_dist_map": "_{maps}.tif",
    "save_viz": "_overlay.png",
    "save_outlines": "_outlines.png",
    "save_geojson": "_cells.geojson",
    "save_rois": "_rois.zip",
}
LABELS = "_labels.tif"
_MAX_NAME_BYTES = 255  # of most file systems


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """What to write, and how to read the images."""

    output: Path  # the results folder
    products: frozenset[str] = frozenset()  # files per image in addition to its labels
    maps: str = "distance"  # name of the model's maps: distance or flows
    save_ctc: bool = False  # masks in the layout of the Cell Tracking Challenge
    save_coco: bool = False  # one COCO file of all images
    frames: bool = False  # segment every frame of a stack
    channel: int | None = None  # from 0; None: the mean of all channels
    pixel_size_um: float | None = None  # overrides the file metadata
    overwrite: bool = False
    settings: str = ""  # what the labels depend on besides the image, as text; recorded and compared


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """One image, or one frame of a stack, and its result files.

    ``name`` begins the names of the results; ``paths`` are by product, with the labels last (key ``labels``).
    """

    file: Path
    frame: int | None
    name: str
    paths: dict[str, Path]

    @property
    def title(self) -> str:
        """The file, and the frame of a stack, for messages."""
        return str(self.file) if self.frame is None else f"{self.file}, frame {self.frame}"


def find_images(inputs: Sequence[str], *, without: Path) -> list[Path]:
    """Return the image files of paths, folders, patterns and lists of those (``@list.txt``), each once.

    Folders are searched recursively, through links; hidden files and the results folder ``without`` are skipped,
    unless the input itself is inside that folder.

    Raises
    ------
    DinocellError
        If an input has no image, or a folder cannot be searched.
    """
    from dinocell.images.read import IMAGE_SUFFIXES

    images: dict[str, Path] = {}
    for text in inputs:
        for entry in _read_list(Path(text[1:])) if text.startswith("@") else [text]:
            path = Path(entry)
            matches = [path] if path.exists() else _matching(path, without)
            files = [file for match in matches for file in _images_in(match, without)]
            if not files:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise DinocellError(f"{entry}: no image found ({suffixes}; not in the results folder {without})")
            for file in files:
                images.setdefault(_absolute(file), file)
    return list(images.values())


def _images_in(path: Path, without: Path) -> list[Path]:
    """Return a file itself, or the images in a folder and its subfolders."""
    from dinocell.images.listing import list_files
    from dinocell.images.read import has_image_name

    if not path.is_dir() or path.suffix.lower() == ".zarr":
        return [path]
    files = [Path(file.path) for file in list_files(path, folders_as_files=(".zarr",))]
    is_inside = without.resolve() in path.resolve().parents
    return [file for file in files if has_image_name(file.name) and (is_inside or not _is_in(file, without))]


def _matching(pattern: Path, without: Path) -> list[Path]:
    """Return the matches of a pattern such as ``plate*/**/*.tif`` that the shell has passed on; no hidden files."""
    parts = pattern.parts
    num_fixed = next((index for index, part in enumerate(parts) if set("*?[") & set(part)), len(parts))
    try:
        matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (NotImplementedError, ValueError, IndexError):
        return []
    if not any(part.startswith(".") for part in parts[num_fixed:]):
        matches = [match for match in matches if not any(part.startswith(".") for part in match.parts[num_fixed:])]
    is_inside = _is_in(Path(*parts[:num_fixed]) / "file", without)
    return [match for match in matches if is_inside or not _is_in(match, without)]


def _is_in(path: Path, folder: Path) -> bool:
    """Return whether a file is in a folder or below it; a linked file is where the link is."""
    parent = path.parent.resolve()
    return folder.resolve() in (parent, *parent.parents)


def _absolute(path: Path) -> str:
    """Return the absolute path; links keep their names, as with git-annex and DVC."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow them


def _read_list(path: Path) -> list[str]:
    """Return the lines of a list of inputs; ``#`` begins a comment line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text; is it an image?"
        raise DinocellError(f"{path}: the list cannot be read ({reason})") from error
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise DinocellError(f"{path}: the list is empty; expected images, folders or patterns, one per line")
    return entries


def plan_tasks(files: Sequence[Path], options: SegmentOptions) -> list[ImageTask]:
    """Return every image and frame to segment, with the names of its results.

    Raises
    ------
    DinocellError
        If two files would write the same results, results would replace an input image, a name is too long or not
        Unicode, or it has no frame number where the challenge's layout needs one.
    """
    inputs = {_absolute(file) for file in files}
    sources: dict[Path, Path] = {}
    tasks = [task for file in files for task in _tasks_of(file, options)]
    for task in tasks:
        for path in task.paths.values():
            source = sources.setdefault(path, task.file)
            if source != task.file:
                raise DinocellError(f"{source} and {task.file} would both write {path}; segment them to two folders")
            if _absolute(path) in inputs:
                raise DinocellError(
                    f"{path}: is given as an image, and results of {task.file} have this name; choose another --output"
                )
            encoded = os.fsencode(path.name)
            if len(encoded) > _MAX_NAME_BYTES or encoded != path.name.encode(errors="replace"):
                name = encoded.decode("utf-8", "backslashreplace")
                raise DinocellError(f"{name}: too long a file name, or not Unicode (UTF-8); rename the image")
    return tasks


def _tasks_of(file: Path, options: SegmentOptions) -> list[ImageTask]:
    from dinocell.images.read import IMAGE_SUFFIXES, count_frames, image_stem

    stem = image_stem(file.name) if file.name.lower().endswith(IMAGE_SUFFIXES) else file.stem
    frames: list[tuple[int | None, str, str]]  # index, name and mask in the challenge's layout
    if options.frames:
        try:
            num_frames = count_frames(file)
        except ImageError:  # reported when the file is read
            num_frames = 1
        digits = max(3, len(str(num_frames - 1)))
        frames = [(k, f"{stem}_f{k:04d}", f"{stem}_RES/mask{k:0{digits}d}.tif") for k in range(num_frames)]
    else:
        number = stem[len(stem.rstrip("0123456789")) :]
        if options.save_ctc and not number:
            raise DinocellError(
                f"{file}: --save-ctc needs the frame number at the end of the name, such as t007.tif; for a stack, add "
                "--frames"
            )
        frames = [(None, stem, f"{Path(_absolute(file)).parent.name}_RES/mask{number}.tif")]
    tasks = []
    for frame, name, mask in frames:
        endings = {product: ending for product, ending in ENDINGS.items() if product in options.products}
        results = {product: f"{name}{ending.format(maps=options.maps)}" for product, ending in endings.items()}
        results |= ({"save_ctc": mask} if options.save_ctc else {}) | {"labels": f"{name}{LABELS}"}
        paths = {product: options.output / result for product, result in results.items()}
        tasks.append(ImageTask(file=file, frame=frame, name=name, paths=paths))
    return tasks
