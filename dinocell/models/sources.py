"""Where a checkpoint that the user names lies on this disk, fetched from the network if need be.

This module, with `dinocell.models.hub` and `dinocell.models.downloads`, moves files and checks their hashes; it never
opens one. Reading is `dinocell.models.weights`.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import WeightsError
from dinocell.models.downloads import WEIGHT_SUFFIXES, checked_sha256, from_url, reason, sha256_of, weights_folder
from dinocell.models.hub import from_hub, from_hub_address, from_hub_cache, names_in, whole_weights

__all__ = ["RELEASES", "WEIGHT_SUFFIXES", "Release", "locate", "sha256_of", "weights_folder"]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A published backbone: what its files are called (less hash and suffix), its page, its Hugging Face repository."""

    family: str
    files: tuple[str, ...]
    page: str = "https://github.com/facebookresearch/dinov2"
    hub: str | None = None


RELEASES: dict[str, Release] = {
    name: Release(family="cell_dino", files=files)
    for name, files in {
        "cell_dino_cp_vits8": ("cell_dino_vits8_pretrain_cp",),
        "cell_dino_hpa_vitl16": ("cell_dino_vitl16_pretrain_hpa_sc",),
        "cell_dino_hpa_vitl14": ("cell_dino_vitl14_pretrain_hpa_fov_highres",),
        "channel_adaptive_dino_vitl16": ("channel_adaptive_dino_vitl16_pretrain_cells",),
    }.items()
}
for _arch, _size in {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}.items():
    for _name, _file, _hub in (("", "", ""), ("_reg", "_reg4", "with-registers-")):
        RELEASES[f"dinov2_{_arch}{_name}"] = Release(
            family="dinov2", files=(f"dinov2_{_arch}{_file}_pretrain",), hub=f"facebook/dinov2-{_hub}{_size}"
        )
for _name in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16", "vitl16_sat", "vit7b16_sat"):
    _arch, _data = _name.removesuffix("_sat"), "sat493m" if _name.endswith("_sat") else "lvd1689m"
    RELEASES[f"dinov3_{_name}"] = Release(
        family="dinov3",
        files=(f"dinov3_{_arch}_pretrain_{_data}",),
        page="https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
        hub=f"facebook/dinov3-{_arch}-pretrain-{_data}",
    )


def locate(source: str | Path, *, sha256: str | None = None) -> Path:
    """Return the local weights file, or local Hugging Face folder, that `source` names.

    The first of these rules that applies decides:

    1. ``hf://owner/name[@revision][/file]``: the Hugging Face hub, kept in its own cache. In offline mode
       (``HF_HUB_OFFLINE=1``) or without a network, what is in the cache.
    2. ``http(s)://.../file.pth``: downloaded once into the weights folder and checked against `sha256`, the
       fragment ``#sha256=<64 hex digits>``, or the start of the hash in the name (``file-0123abcd.pth``, the
       convention of torch.hub). A URL with none of the three is refused.
    3. An existing path, file or folder.
    4. A bare name in the weights folder: the very file or folder, then the name with a weights suffix, then a
       released file of that name (``dinov3_vits16`` finds ``dinov3_vits16_pretrain_lvd1689m-08c60483.pth``).
    5. A bare name in `RELEASES`: the Hugging Face cache, then the hub.

    The weights folder is ``$DINOCELL_WEIGHTS``, else ``$XDG_CACHE_HOME/dinocell``, else ``~/.cache/dinocell``.

    Parameters
    ----------
    source : str or Path
        What the user wrote. An address must be a string: a Path loses one slash of ``://``.
    sha256 : str, optional
        The hash that the file must have; not for folders. A file that is already here is then hashed as well;
        without it, a file downloaded before is known by its name and not hashed again.

    Returns
    -------
    Path
        A file, or a folder with ``config.json`` beside ``model.safetensors`` or ``pytorch_model.bin`` (whole, or
        all of its shards). A folder with one weights file of another name gives that file.

    Raises
    ------
    WeightsError
        One line: the source, what is wrong with it, what to do.
    """
    text = str(source)
    wanted = checked_sha256(text, sha256) if sha256 is not None else None
    scheme, slash = (m[1].lower(), m[2]) if (m := re.match(r"([A-Za-z][\w+.-]+):/(/?)", text)) else ("", "/")
    if scheme not in ("", "hf", "http", "https") or not slash:
        raise WeightsError(
            f"{text!r}: expected a path, hf://, http:// or https://, found {scheme}:/{slash}; give a file by its path,"
            " and an address as text (a Path loses one slash)"
        )
    if scheme.startswith("http"):
        return from_url(text, wanted)
    path = from_hub_address(text) if scheme == "hf" else whole_weights(text, _find_named(text))
    if wanted is None:
        return path
    if path.is_dir():
        raise WeightsError(f"{text!r}: a sha256 belongs to one file and this is a folder; name the file in it")
    if (found := sha256_of(path)) != wanted:
        raise WeightsError(f"{text!r}: expected sha256 {wanted}, got {found} for {path}; fetch the file again")
    return path


def _find_named(text: str) -> Path:
    """Find a path or a bare name: as it stands, in the weights folder, among the known releases."""
    try:
        path = Path(text).expanduser()
        if text and path.exists():
            return path
    except (OSError, RuntimeError) as error:  # no permission, name too long, no such user
        raise WeightsError(f"{text!r}: the path cannot be read: {reason(error)}") from error
    is_bare = bool(text) and "/" not in text and os.sep not in text
    if is_bare and (found := _in_weights_folder(text)) is not None:
        return found
    if is_bare and text in RELEASES:
        return _from_release(text, RELEASES[text])

    nearest = [str(path.parent / n) for n in difflib.get_close_matches(path.name, names_in(path.parent), n=1)]
    where, advice = "", ""
    if is_bare:
        nearest = nearest or difflib.get_close_matches(text, [*RELEASES, *names_in(weights_folder())], n=1)
        where = f" here, in the weights folder {weights_folder()} (DINOCELL_WEIGHTS) or among the known releases"
        advice = "; give a path, a known name, or hf://owner/name"
    elif not path.parent.is_dir():
        where = f", nor the folder {str(path.parent)!r}"
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        advice = f"; a repository on Hugging Face is written hf://{text}"
    did_you_mean = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise WeightsError(f"{text!r}: no such file or folder{where}{did_you_mean}{advice}")


def _in_weights_folder(name: str) -> Path | None:
    folder = weights_folder()
    here = names_in(folder)
    suffix = f"(?:{'|'.join(map(re.escape, WEIGHT_SUFFIXES))})"
    stems, repository = rf"{re.escape(name)}(?:_pretrain(?:_\w+)?)?", name
    if release := RELEASES.get(name):
        # Exact: dinov3_vitl16 is not the satellite model, dinov2_vits14 not the one with registers.
        stems = "|".join(map(re.escape, (name, f"{name}_pretrain", *release.files)))
        repository = release.hub.split("/")[1] if release.hub else name
    released = rf"(?:{stems})(?:-[0-9a-f]{{8,64}})?{suffix}|{re.escape(repository)}"
    for pattern in (re.escape(name), re.escape(name) + suffix, released):
        matches = [entry for entry in here if re.fullmatch(pattern, entry)]
        if len(matches) > 1:
            raise WeightsError(f"{name!r}: {folder} holds {', '.join(matches)}; name one of them in full")
        if matches:
            return folder / matches[0]
    return None


def _from_release(name: str, release: Release) -> Path:
    by_hand = f"download it from {release.page} into the weights folder {weights_folder()} (DINOCELL_WEIGHTS)"
    if release.hub is None:
        raise WeightsError(f"{name!r}: the publisher asks for a form to be filled in first; {by_hand}")
    cached = from_hub_cache(name, release.hub, None)
    return cached or from_hub(name, release.hub, None, None, hint=f"; or {by_hand}")
