"""What `dinocell segment` is asked for: which files, and under which names their results are written."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinocell.errors import DinocellError

SUMMARY, COCO = "summary.csv", "coco.json"
Product = Literal["csv", "save_dist_map", "save_viz", "save_outlines", "save_geojson", "save_rois"]
# What can be written of each image, by option: the end of the file's name. Maps are called as the model's target is.
ENDINGS: dict[Product, str] = {
    "csv": "_cells.csv",
    "save_dist_map": "_{maps}.tif",
    "save_viz": "_overlay.png",
    "save_outlines": "_outlines.png",
    "save_geojson": "_cells.geojson",
    "save_rois": "_rois.zip",
}
LABELS = "_labels.tif"
_MOST_BYTES = 255  # of a file's name


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of all images.

    Attributes
    ----------
    output
        The folder of the results.
    products
        What is written of each image besides its labels.
    maps
        What the model's maps are called, if they are among the products.
    save_ctc, save_coco
        Also masks in the Cell Tracking Challenge's layout; also one file of all images in COCO's format.
    frames
        Files are stacks, each frame is a picture.
    channel
        The one to look at, from 0; None: their mean.
    pixel_size_um
        Of the images, whatever their files say; None: what they say.
    overwrite
        Compute again what is there.
    settings
        How cells are found, in words: what is there of other settings is not taken for what is asked for. Empty: that
        is not looked at.
    """

    output: Path
    products: frozenset[Product] = frozenset()
    maps: str = "distance"
    save_ctc: bool = False
    save_coco: bool = False
    frames: bool = False
    channel: int | None = None
    pixel_size_um: float | None = None
    overwrite: bool = False
    settings: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A file, the stem of its results' names, and where its mask goes in the Cell Tracking Challenge's layout.

    ``ctc_mask`` is None where that layout is not asked for; of a stack it is the folder of its frames' masks.
    """

    file: Path
    stem: str
    ctc_mask: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the results of one picture go, by what they are: the names of `ENDINGS`, ``save_ctc``, ``labels``."""

    name: str
    paths: dict[str, Path]

    @property
    def is_done(self) -> bool:
        """Whether every file is there."""
        return all(path.exists() for path in self.paths.values())


def find_images(inputs: Sequence[str], *, without: Path) -> list[Path]:
    """Return the image files that paths, folders, patterns and lists of those (``@list.txt``) mean, each once.

    Folders are searched all through, linked ones too; what is hidden there is left out, and what lies below
    ``without``, where results go. A folder inside of that is taken as it is.

    Raises
    ------
    DinocellError
        If an input means nothing, or a folder cannot be searched.
    """
    from dinocell.images.read import IMAGE_SUFFIXES

    found: dict[str, Path] = {}
    texts = [each for text in inputs for each in (_read_list(Path(text[1:])) if text.startswith("@") else [text])]
    for text in texts:
        path = Path(text)
        meant = [path] if path.exists() else _matching(path, without)
        images = [image for each in meant for image in (_images_in(each, without) if _is_folder(each) else [each])]
        if not images and any(each.is_dir() and each.resolve() == without.resolve() for each in meant):
            raise DinocellError(
                f"{text}: is where the results go, too, and these would be taken for images; choose another --output, "
                "or name the images themselves"
            )
        if not images:
            raise DinocellError(f"{text}: no image there ({', '.join(IMAGE_SUFFIXES)})")
        for image in images:
            found.setdefault(_absolute(image), image)
    return list(found.values())


def _is_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix.lower() != ".zarr"


def _images_in(folder: Path, without: Path) -> list[Path]:
    """Return the images of a folder and of those below it."""
    from dinocell.images.read import has_image_name
    from dinocell.images.storage import list_files

    listed = [Path(file.path) for file in list_files(folder, folders_as_files=(".zarr",))]
    images = [path for path in listed if has_image_name(path.name)]
    return images if _is_inside(folder.resolve(), without) else [each for each in images if not _is_in(each, without)]


def _is_in(path: Path, folder: Path) -> bool:
    """Say whether a file lies in a folder or below it; a link to a file lies where the link does."""
    place = path.parent.resolve()
    return place == folder.resolve() or _is_inside(place, folder)


def _is_inside(place: Path, folder: Path) -> bool:
    return folder.resolve() in place.parents


def _absolute(path: Path) -> str:
    """Return where a file lies; links keep their names, as those of git-annex and DVC mean it."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow them


def _read_list(path: Path) -> list[str]:
    """Return the lines of a list, which mean what they would on the command line; # begins a remark."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DinocellError(f"{path}: the list cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DinocellError(f"{path}: expected a list of images, one a line, in UTF-8; is it an image?") from error
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise DinocellError(f"{path}: the list is empty; expected images, folders or patterns, one a line")
    return entries


def _matching(pattern: Path, without: Path) -> list[Path]:
    """Return what a pattern such as ``plate*/**/*.tif`` means: a shell that does not expand it hands it on as it is.

    Hidden files are not meant, as in a shell, and neither is what lies below ``without``, unless the pattern says so.
    """
    parts = pattern.parts
    number = next((k for k, part in enumerate(parts) if set("*?[") & set(part)), len(parts))
    fixed, is_hidden_meant = Path(*parts[:number]), any(part.startswith(".") for part in parts[number:])
    try:
        found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (NotImplementedError, ValueError, IndexError):
        return []
    if not is_hidden_meant:
        found = [each for each in found if not any(part.startswith(".") for part in each.parts[number:])]
    return found if _is_in(fixed / "x", without) else [each for each in found if not _is_in(each, without)]


def plan_jobs(files: Sequence[Path], request: Request) -> list[Job]:
    """Return what is to be done; two files that would write the same are an error.

    Raises
    ------
    DinocellError
        If names collide, results would replace an image, a name is too long or not Unicode, or it has no frame number
        where the challenge's layout needs one.
    """
    from dinocell.images.read import IMAGE_SUFFIXES, image_stem

    given = {_absolute(file) for file in files}
    stems: dict[str, Path] = {}
    masks: dict[Path, Path] = {}
    jobs = []
    for file in files:
        stem = image_stem(file.name) if file.name.lower().endswith(IMAGE_SUFFIXES) else file.stem
        mask = _ctc_mask(file, stem, request) if request.save_ctc else None
        for wanted, taken in ((f"{stem}{LABELS}", stems.get(stem)), (mask, masks.get(mask) if mask else None)):
            if taken is not None:
                raise DinocellError(
                    f"{taken} and {file} would both write {request.output / str(wanted)}; segment them to two folders"
                )
        stems[stem] = file
        if mask is not None:
            masks[mask] = file
        jobs.append(Job(file=file, stem=stem, ctc_mask=mask))
        target = first_target(jobs[-1], request)
        _check_names(file, target)
        replaced = next((path for path in target.paths.values() if _absolute(path) in given), None)
        if replaced is not None:
            raise DinocellError(
                f"{replaced}: is given as an image, and results of {file} have this name; choose another --output, or "
                "leave it out"
            )
    return jobs


def _check_names(file: Path, target: Target) -> None:
    for path in target.paths.values():
        name = os.fsencode(path.name)
        if len(name) > _MOST_BYTES:
            raise DinocellError(
                f"{file}: its name is too long for those of its results ({len(name)} bytes, most disks take "
                f"{_MOST_BYTES}); rename it"
            )
        try:
            name.decode()
        except UnicodeDecodeError:
            shown = name.decode("utf-8", "backslashreplace")
            raise DinocellError(f"{file.parent}: the name {shown} is not Unicode (UTF-8); rename the image") from None


def _ctc_mask(file: Path, stem: str, request: Request) -> Path:
    """Return ``01_RES/mask007.tif`` for ``01/t007.tif``, and for a stack the folder ``NAME_RES``."""
    if request.frames:
        return Path(f"{stem}_RES")
    number = re.search(r"\d+$", stem)
    if number is None:
        raise DinocellError(
            f"{file}: --save-ctc needs the frame's number at the end of the name, such as t007.tif; of a stack, "
            "add --frames"
        )
    return Path(f"{Path(_absolute(file)).parent.name}_RES") / f"mask{number[0]}.tif"


def names_of_results(job: Job, request: Request) -> list[str]:
    """Return the files of one image for people to read, the labels first; of a stack those of its first frame."""
    target = first_target(job, request)
    *others, labels = target.paths.values()
    more = ["..."] if request.frames else []
    return [*map(str, (labels, *others)), *more, *(["(there already)"] if target.is_done else [])]


def first_target(job: Job, request: Request) -> Target:
    """Return where the results of a file go; of a stack those of its first frame."""
    return next(targets_of_frames(job, 1, request)) if request.frames else target_of(job, request)


def target_of(job: Job, request: Request) -> Target:
    """Return where the results of a file of one picture go."""
    return _target(job.stem, job.ctc_mask, request)


def targets_of_frames(job: Job, num_frames: int, request: Request) -> Iterator[Target]:
    """Yield where the results of each frame of a stack go."""
    digits = max(3, len(str(num_frames - 1)))
    for number in range(num_frames):
        mask = job.ctc_mask / f"mask{number:0{digits}d}.tif" if job.ctc_mask is not None else None
        yield _target(f"{job.stem}_f{number:04d}", mask, request)


def _target(name: str, mask: Path | None, request: Request) -> Target:
    paths: dict[str, Path] = {
        product: request.output / f"{name}{ending.format(maps=request.maps)}"
        for product, ending in ENDINGS.items()
        if product in request.products
    }
    if mask is not None:
        paths["save_ctc"] = request.output / mask
    paths["labels"] = request.output / f"{name}{LABELS}"  # the last one written: where it is, all is
    return Target(name=name, paths=paths)
