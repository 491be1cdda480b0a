"""Where a checkpoint that the user names lies on this disk, fetched from the network if need be.

This module, with `dinocell.models.locate` and `dinocell.models.locate`, moves files and checks their hashes; it never
opens one. Reading is `dinocell.models.weights`.
"""

import contextlib
import difflib
import hashlib
import http.client
import os
import re
import secrets
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import WeightsError

# --- downloads -----------------------------------------------------------------------------------------------------
#
# Weights by URL: downloaded once into the weights folder, and kept only with the hash that was promised.

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_BACKOFF_S = (0.5, 1.0, 2.0)  # waits before the second, third and fourth attempt at a download
_TIMEOUT_S = 30.0  # silence of a server that counts as a broken connection
_CHUNK_BYTES = 1 << 20
_PROGRESS_FROM_BYTES = 8 << 20


def from_url(url: str, sha256: str | None) -> Path:
    """Return the file that `url` names, downloaded unless the weights folder has it (see `sources.locate`)."""
    address, _, fragment = url.partition("#")
    shown = address.split("?")[0]  # a query may hold a signature: not for a log
    if fragment:
        stated = checked_sha256(shown, fragment.removeprefix("sha256="))
        if sha256 not in (None, stated):
            raise WeightsError(
                f"{shown!r}: the sha256 given is {sha256}, its #sha256= says {stated}; drop the wrong one"
            )
        sha256 = stated
    name = Path(urllib.parse.unquote(shown.split("://", 1)[1])).name
    if not name.endswith(WEIGHT_SUFFIXES) or not name.isprintable():
        raise WeightsError(
            f"{shown!r}: expected a file ending in {', '.join(WEIGHT_SUFFIXES)}; else download it and give the path"
        )
    in_name = re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)
    expected = sha256 or (in_name[1] if in_name else None)
    if expected is None:
        raise WeightsError(
            f"{shown!r}: a download needs its hash, which the publisher states or `sha256sum FILE` prints; give it as"
            f" {shown}#sha256=<64 hex digits>"
        )
    if not (in_name and expected.startswith(in_name[1])):
        name = f"{Path(name).stem}-{expected[:8]}{Path(name).suffix}"
    target = weights_folder() / name
    if not target.is_file() or (sha256 is not None and sha256_of(target) != sha256):
        _download(address, shown, target, expected)
    return target


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_folder() -> Path:
    """Return the folder for bare names and downloads (see `sources.locate`); it need not exist yet."""
    if folder := os.environ.get("DINOCELL_WEIGHTS"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinocell"


def checked_sha256(source: str, sha256: str) -> str:
    """Return the hash in lower case; refuse what is not 64 hex digits."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise WeightsError(f"{source!r}: expected a sha256 of 64 hex digits, found {sha256!r}")
    return sha256.lower()


class _BrokenDownloadError(Exception):
    """A download that may well succeed when tried again."""


def _download(address: str, shown: str, target: Path, expected: str) -> None:
    """Fetch `address` under a temporary name; `target` appears whole and with the right hash, or not at all."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(len(_BACKOFF_S) + 1):
            try:
                found = _stream(address, shown, part)
                break
            except _BrokenDownloadError as error:
                if attempt == len(_BACKOFF_S):
                    tries = f"failed {attempt + 1} times, last with: {error}"
                    raise WeightsError(f"{shown!r}: the download {tries}; check the network") from error
                time.sleep(_BACKOFF_S[attempt])
        if not found.startswith(expected):
            whose = "" if len(expected) == 64 else ", as its name promises (else give the whole hash as #sha256=...)"
            raise WeightsError(f"{shown!r}: expected sha256 {expected}{whose}, got {found}; the file was not kept")
        part.replace(target)
    except OSError as error:
        where = f"cannot write into {target.parent}: {reason(error)}"
        raise WeightsError(f"{shown!r}: {where}; set DINOCELL_WEIGHTS to another folder") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _stream(address: str, shown: str, part: Path) -> str:
    """Write what `address` holds to `part` and return its hash."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    columns = (*Progress.get_default_columns(), DownloadColumn())
    digest = hashlib.sha256()
    with (
        contextlib.closing(_chunks(address, shown)) as chunks,
        part.open("wb") as file,
        Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task(Path(shown).name, visible=False)
        for chunk, total in chunks:
            file.write(chunk)
            digest.update(chunk)
            progress.update(task, advance=len(chunk), total=total, visible=(total or 0) >= _PROGRESS_FROM_BYTES)
    return digest.hexdigest()


def _chunks(address: str, shown: str) -> Generator[tuple[bytes, int | None], None, None]:
    """Yield the body in pieces, each with the announced size; a body shorter than announced is an error."""
    received, total = 0, None
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "dinocell"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            while chunk := response.read(_CHUNK_BYTES):
                received += len(chunk)
                yield chunk, total
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise _BrokenDownloadError(f"HTTP {error.code} {error.reason}") from error
        advice = "the link may have expired or need a log-in" if error.code in (401, 403) else "check the address"
        raise WeightsError(f"{shown!r}: the server answered HTTP {error.code} {error.reason}; {advice}") from error
    except (http.client.InvalidURL, ValueError) as error:  # may quote the query: the reason stays out of the message
        raise WeightsError(f"{shown!r}: expected http(s)://host/file, found an address that is malformed") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenDownloadError(reason(error)) from error
    if total is not None and received != total:
        raise _BrokenDownloadError(f"got {received} of {total} bytes")


def reason(error: BaseException) -> str:
    """Put what an exception says on one line."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


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


# --- hub -----------------------------------------------------------------------------------------------------------
#
# Weights on the Hugging Face hub, in its cache, and in folders laid out like its repositories.
#
# ``huggingface_hub`` is imported on first use, not with this module.

_SUFFIXES = ", ".join(WEIGHT_SUFFIXES)


def from_hub_address(text: str) -> Path:
    """Return the local file or folder of ``hf://owner/name[@revision][/file]``."""
    revision_pattern = r"@(refs/(?:pr|convert)/[^/]+|[^/]+)"
    address = re.fullmatch(rf"(?i:hf)://([\w.-]+/[\w.-]+)(?:{revision_pattern})?(?:/(.+?))?/?", text)
    if address is None:
        raise WeightsError(f"{text!r}: expected hf://owner/name, hf://owner/name@revision or hf://owner/name/file")
    repo, revision, file = address.groups()
    if file is not None and not file.endswith(WEIGHT_SUFFIXES):
        raise WeightsError(f"{text!r}: expected a file ending in {_SUFFIXES}, found {file!r}")
    return from_hub(text, repo, urllib.parse.unquote(revision) if revision else None, file)


def from_hub(source: str, repo: str, revision: str | None, file: str | None, *, hint: str = "") -> Path:
    """Fetch one file, or configuration and weights, of a repository; from the cache where the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    problems = (
        errors.HTTPError,  # type: ignore[attr-defined]  # of the HTTP library, which is not the same in every version
        errors.EntryNotFoundError,
        errors.HFValidationError,
        OSError,
        RuntimeError,  # what its Rust downloader raises
    )
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        # The listing first: one small request that tells which of several weights to leave where they are.
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        wanted = [n for n in names if re.fullmatch(r"config\.json|[^/]*model\.(safetensors|bin)\.index\.json", n)]
        wanted += _choose(source, names)
        return whole_weights(
            source, Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
        )
    except problems as error:
        is_missing_revision = isinstance(error, errors.RevisionNotFoundError)
        if file is None and not is_missing_revision and (cached := from_hub_cache(source, repo, revision)) is not None:
            return cached
        raise WeightsError(f"{source!r}: {_hub_problem(error, repo, revision, file)}{hint}") from error


def from_hub_cache(source: str, repo: str, revision: str | None) -> Path | None:
    """Look into the Hugging Face cache alone; a snapshot without whole weights is as good as none."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    demanded = ["config.json"]  # not the weights: another program may have fetched others than we would choose
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=demanded, local_files_only=True
        )
        return whole_weights(source, Path(folder))
    except (LocalEntryNotFoundError, HFValidationError, WeightsError):
        return None


def whole_weights(source: str, path: Path) -> Path:
    """Reduce a folder to its one weights file unless it is a complete Hugging Face folder."""
    if not path.is_dir():
        return path
    names = names_in(path)
    if ".metadata" in names:  # written by torch.distributed.checkpoint
        raise WeightsError(
            f"{source!r}: a training state, good only to resume its run; give exported weights, such as"
            " eval/training_<step>/teacher_checkpoint.pth"
        )
    chosen = _choose(source, names)
    if shard := re.search(r"-of-(\d+)\.", chosen[0]):
        if "config.json" not in names or len(chosen) < int(shard[1]):
            raise WeightsError(
                f"{source!r}: expected config.json and {int(shard[1])} shards, found {len(chosen)} shards"
            )
        return path
    is_hugging_face = "config.json" in names and chosen[0] in ("model.safetensors", "pytorch_model.bin")
    return path if is_hugging_face else path / chosen[0]


def _choose(source: str, names: Iterable[str]) -> list[str]:
    """Choose a folder's weights: one whole file or all shards, safetensors before anything else."""
    root = sorted(name for name in names if "/" not in name)
    found = [name for name in root if name.endswith(".safetensors")]
    found = found or [name for name in root if re.fullmatch(r"pytorch_model.*\.bin|.+\.pth?", name)]
    if whole := [name for name in found if name in ("model.safetensors", "pytorch_model.bin")]:
        return whole
    if shards := [name for name in found if re.fullmatch(r"(pytorch_)?model-\d+-of-\d+\.\w+", name)]:
        return shards
    if not found:
        raise WeightsError(f"{source!r}: expected a file ending in {_SUFFIXES}, found none in that folder")
    if len(found) > 1:
        raise WeightsError(f"{source!r}: expected one weights file, found {', '.join(found)}; name one of them")
    return found


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder; none if it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:  # not there, or not ours to read: nothing to find in it
        return []


def _hub_problem(error: Exception, repo: str, revision: str | None, file: str | None) -> str:
    """Say in one line why the hub did not give what was asked, and what to do about it."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{repo}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    if constants.HF_HUB_OFFLINE:
        command = f"hf download {repo}" + (f" {file}" if file else "") + (f" --revision {revision}" if revision else "")
        return (
            f"offline mode is on (HF_HUB_OFFLINE) and it is not in the cache {constants.HF_HUB_CACHE}; fetch it"
            f" beforehand, where there is a network, with `{command}` (page: {page})"
        )
    # The hub's "not in the cache either" hides what went wrong on the network.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if isinstance(cause, errors.RepositoryNotFoundError) and not isinstance(cause, errors.GatedRepoError):
        return f"no such repository, or a private one; check {page}, and {log_in} if it is private or gated"
    if isinstance(cause, errors.GatedRepoError) or status in (401, 403):
        return f"access refused (HTTP {status}); accept the licence at {page} and {log_in}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; see {page}"
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        return f"the repository has no file {file!r}; see {page}/tree/{revision or 'main'}"
    if isinstance(cause, errors.HFValidationError):
        return f"{repo!r} is not a repository name; expected hf://owner/name as on https://huggingface.co"
    if status is not None:
        return f"Hugging Face answered HTTP {status} for {page}; try again later"
    return f"cannot fetch {page} and it is not in the cache: {reason(cause)}; check the network and the disk"
