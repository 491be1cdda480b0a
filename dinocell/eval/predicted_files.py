"""Which file of a folder is a tool's label image of which image."""

from collections.abc import Sequence
from pathlib import Path

from dinocell.data_shards.images import IMAGE_SUFFIXES, has_image_name, image_stem
from dinocell.errors import DinocellError

# What tools append to the image's name: nothing, `dinocell segment`, Cellpose, and habits of others.
ENDINGS = ("", "_labels", "_cp_masks", "_masks", "_mask", "_label", "_pred", "_seg")
_NAMED = 3


def find_predictions(folder: Path, dataset: str, names: Sequence[str]) -> list[Path]:
    """Return the label image of each name: ``NAME.tif``, ``NAME_labels.tif``, ``NAME_cp_masks.png`` and the like.

    A name may itself have the ending of an image, which the label image's need not repeat. They lie in
    ``folder/dataset`` if there is such a folder, else in ``folder``. Of ``01/007``, a frame of the Cell Tracking
    Challenge, it may be ``01_RES/mask007.tif`` as well.

    Raises
    ------
    DinocellError
        If the folder or files are missing, or a name has several files.
    """
    if not folder.is_dir():
        raise DinocellError(f"{folder}: expected a folder of label images, there is none")
    inside = folder / dataset if (folder / dataset).is_dir() else folder
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        stems = dict.fromkeys((name, image_stem(name)))  # LIVECell's names are whole: a.tif
        possible = [f"{stem}{end}{suffix}" for stem in stems for end in ENDINGS for suffix in IMAGE_SUFFIXES]
        candidates = [inside / each for each in possible if has_image_name(Path(each).name)]
        sequence, _, number = name.rpartition("/")
        candidates += [inside / f"{sequence}_RES" / f"mask{number}.tif"] if sequence and number.isdecimal() else []
        there = [path for path in candidates if path.exists()]
        if len(there) > 1:
            raise DinocellError(f"{inside}: expected one label image of {name}, got {there[0].name}, {there[1].name}")
        missing += [] if there else [name]
        files += there
    if missing:
        of_set = f" of {dataset}" if dataset else ""
        example = image_stem(missing[0])
        listed = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise DinocellError(
            f"{inside}: no label image of {len(missing)} of the {len(names)} images{of_set} ({listed}); "
            f"expected files such as {example}.tif or {example}_labels.tif"
        )
    return files
