"""Find the local path of a checkpoint, and download it if necessary.

This module moves files and checks their hashes; `dinocell.models.checkpoint_files` opens them and
`dinocell.models.weights` interprets them. torch and huggingface_hub, which do the downloads, are imported on first use.
"""

import difflib
import hashlib
import http.client
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dinocell import errors
from dinocell.errors import WeightsError, one_line

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_BACKOFF_S = (0.5, 1.0, 2.0)  # before the second, third and fourth attempt of a download
_TIMEOUT_S = 30.0  # without an answer of the server

require = partial(errors.require, kind=WeightsError)


@dataclass(frozen=True, kw_only=True)
class Release:
    """A published backbone: name of its file without hash and suffix, its page, its Hugging Face repository."""

    file: str
    page: str = "https://github.com/facebookresearch/dinov2"
    hub: str = ""


RELEASES: dict[str, Release] = {
    "cell_dino_cp_vits8": Release(file="cell_dino_vits8_pretrain_cp"),
    "cell_dino_hpa_vitl16": Release(file="cell_dino_vitl16_pretrain_hpa_sc"),
    "cell_dino_hpa_vitl14": Release(file="cell_dino_vitl14_pretrain_hpa_fov_highres"),
    "channel_adaptive_dino_vitl16": Release(file="channel_adaptive_dino_vitl16_pretrain_cells"),
}
for _arch, _size in {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}.items():
    RELEASES[f"dinov2_{_arch}"] = Release(file=f"dinov2_{_arch}_pretrain", hub=f"facebook/dinov2-{_size}")
    _hub = f"facebook/dinov2-with-registers-{_size}"
    RELEASES[f"dinov2_{_arch}_reg"] = Release(file=f"dinov2_{_arch}_reg4_pretrain", hub=_hub)
for _name in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16", "vitl16_sat", "vit7b16_sat"):
    _arch, _data = _name.removesuffix("_sat"), "sat493m" if _name.endswith("_sat") else "lvd1689m"
    RELEASES[f"dinov3_{_name}"] = Release(
        file=f"dinov3_{_arch}_pretrain_{_data}",
        page="https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
        hub=f"facebook/dinov3-{_arch}-pretrain-{_data}",
    )


def locate(source: str | Path, *, sha256: str | None = None) -> Path:
    """Return the local weights file, or local Hugging Face folder, of `source`.

    The first rule that applies decides:

    1. ``hf://owner/name[@revision][/file]``: the Hugging Face hub and its cache. In offline mode
       (``HF_HUB_OFFLINE=1``) or without a network, only the cache.
    2. ``http(s)://.../file.pth``: downloaded once into the weights folder and checked against `sha256`, the fragment
       ``#sha256=<64 hex digits>``, or the start of the hash in the name (``file-0123abcd.pth``, the convention of
       torch.hub). One of the three is required.
    3. An existing path, file or folder.
    4. A bare name in the weights folder: that file or folder, then the name with a weights suffix, then a released
       file of that name (``dinov3_vits16`` finds ``dinov3_vits16_pretrain_lvd1689m-08c60483.pth``).
    5. A bare name in `RELEASES`: the Hugging Face cache, then the hub.

    The weights folder is ``$DINOCELL_WEIGHTS``, else ``$XDG_CACHE_HOME/dinocell``, else ``~/.cache/dinocell``.

    The result is a file, or a folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (one file
    or all shards). A folder with one weights file of another name gives that file. Errors are a `WeightsError` of one
    line: the source, the problem, and what to do.

    Parameters
    ----------
    source
        A URL must be a string: a Path loses one slash of ``://``.
    sha256
        Expected hash of the file; not for folders. Without it, a file that was downloaded before is not hashed again.
    """
    text = str(source)
    # The query of a URL may hold a signature.
    shown = re.split(r"[?#]", text)[0] if text.lower().startswith("http") else text
    with naming(repr(shown)):
        return _locate(text, None if sha256 is None else _checked_sha256(sha256))


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Begin the errors of the block with the file that they are about, unless an inner block has done so."""
    try:
        yield
    except WeightsError as error:
        is_named = str(error).startswith((f"{source}: ", f"{source}{os.sep}"))
        raise WeightsError(str(error) if is_named else f"{source}: {error}") from error
    except OSError as error:
        raise WeightsError(f"{source}: cannot be read ({one_line(error)})") from error


def _locate(text: str, sha256: str | None) -> Path:
    scheme, slash = (m[1].lower(), m[2]) if (m := re.match(r"([A-Za-z][\w+.-]+):/(/?)", text)) else ("", "/")
    expected = f"expected a path, hf://, http:// or https://, got {scheme}:/{slash}"
    is_known = scheme in ("", "hf", "http", "https") and bool(slash)
    require(is_known, f"{expected}; give a file by its path, a URL as text (a Path loses one slash)")
    if scheme.startswith("http"):
        return _from_url(text, sha256)
    path = _from_hub_address(text) if scheme == "hf" else _weights_in(_find_named(text))
    if sha256 is not None:
        require(path.is_file(), "a sha256 belongs to one file and this is a folder; name the file in it")
        actual = sha256_of(path)
        require(actual == sha256, f"expected sha256 {sha256}, got {actual} for {path}; download it again")
    return path


def weights_folder() -> Path:
    """Return the folder for bare names and downloads (see `locate`); it may not exist yet."""
    if folder := os.environ.get("DINOCELL_WEIGHTS"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinocell"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_sha256(sha256: str) -> str:
    require(bool(re.fullmatch(r"[0-9a-fA-F]{64}", sha256)), f"expected a sha256 of 64 hex digits, got {sha256!r}")
    return sha256.lower()


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:  # missing, or not readable
        return []


def _find_named(text: str) -> Path:
    """Find a path or a bare name."""
    try:
        path = Path(text).expanduser()
        if text and path.exists():
            return path
    except (OSError, RuntimeError) as error:  # no permission, name too long, no such user
        raise WeightsError(f"the path cannot be read: {one_line(error)}") from error
    is_bare = bool(text) and "/" not in text and os.sep not in text
    if is_bare and (match := _in_weights_folder(text)) is not None:
        return match
    if is_bare and text in RELEASES:
        return _from_release(RELEASES[text])
    nearest = [str(path.parent / n) for n in difflib.get_close_matches(path.name, _names_in(path.parent), n=1)]
    where, advice = "", ""
    if is_bare:
        nearest = nearest or difflib.get_close_matches(text, [*RELEASES, *_names_in(weights_folder())], n=1)
        where = f" here, in the weights folder {weights_folder()} (DINOCELL_WEIGHTS) or among the known releases"
        advice = "; give a path, a known name, or hf://owner/name"
    elif not path.parent.is_dir():
        where = f", nor the folder {str(path.parent)!r}"
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        advice = f"; for a repository on Hugging Face write hf://{text}"
    did_you_mean = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise WeightsError(f"no such file or folder{where}{did_you_mean}{advice}")


def _in_weights_folder(name: str) -> Path | None:
    folder = weights_folder()
    suffix = f"(?:{'|'.join(map(re.escape, _SUFFIXES))})"
    stems, repository = rf"{re.escape(name)}(?:_pretrain(?:_\w+)?)?", name
    if release := RELEASES.get(name):
        # Exactly: dinov3_vitl16 is not the satellite model, dinov2_vits14 not the one with registers.
        stems = "|".join(map(re.escape, (name, f"{name}_pretrain", release.file)))
        repository = release.hub.rpartition("/")[2] or name
    released = rf"(?:{stems})(?:-[0-9a-f]{{8,64}})?{suffix}|{re.escape(repository)}"
    for pattern in (re.escape(name), re.escape(name) + suffix, released):
        matches = [entry for entry in _names_in(folder) if re.fullmatch(pattern, entry)]
        require(len(matches) < 2, f"{folder} holds {', '.join(matches)}; give the full name of one of them")
        if matches:
            return folder / matches[0]
    return None


def _from_release(release: Release) -> Path:
    by_hand = f"download it from {release.page} into the weights folder {weights_folder()} (DINOCELL_WEIGHTS)"
    require(bool(release.hub), f"the publisher requires a form to be filled in first; {by_hand}")
    return _from_hub_cache(release.hub, None) or _from_hub(release.hub, None, None, hint=f"; or {by_hand}")


def _weights_in(path: Path) -> Path:
    """Return the single weights file of a folder, or the folder if it is a complete Hugging Face folder."""
    if not path.is_dir():
        return path
    names = _names_in(path)
    exported = "exported weights, such as eval/training_<step>/teacher_checkpoint.pth"
    require(".metadata" not in names, f"a checkpoint for resuming a run; give {exported}")  # torch.distributed's
    chosen = _choose(names)
    if shard := re.search(r"-of-(\d+)\.", chosen[0]):
        is_complete = "config.json" in names and len(chosen) >= int(shard[1])
        require(is_complete, f"expected config.json and {int(shard[1])} shards, got {len(chosen)} shards")
        return path
    is_hugging_face = "config.json" in names and chosen[0] in ("model.safetensors", "pytorch_model.bin")
    return path if is_hugging_face else path / chosen[0]


def _choose(names: Iterable[str]) -> list[str]:
    """Choose the weights among the names in a folder: one file or all shards, preferably safetensors."""
    root = sorted(name for name in names if "/" not in name)
    matches = [name for name in root if name.endswith(".safetensors")]
    matches = matches or [name for name in root if re.fullmatch(r"pytorch_model.*\.bin|.+\.pth?", name)]
    if single := [name for name in matches if name in ("model.safetensors", "pytorch_model.bin")]:
        return single
    if shards := [name for name in matches if re.fullmatch(r"(pytorch_)?model-\d+-of-\d+\.\w+", name)]:
        return shards
    advice = "; give the name of one of them" * bool(matches)
    got = ", ".join(matches) or "none"
    require(len(matches) == 1, f"expected one weights file ({', '.join(_SUFFIXES)}), got {got}{advice}")
    return matches


def _from_url(url: str, sha256: str | None) -> Path:
    """Return the file in the weights folder for a URL, downloaded unless it exists."""
    address, _, fragment = url.partition("#")
    path = address.split("?")[0]
    if fragment:
        stated = _checked_sha256(fragment.removeprefix("sha256="))
        require(sha256 in (None, stated), f"got two hashes, {sha256} and #sha256={stated}; drop the wrong one")
        sha256 = stated
    name = Path(urllib.parse.unquote(path.split("://", 1)[1])).name
    is_weights = name.endswith(_SUFFIXES) and name.isprintable()
    require(is_weights, f"expected a file ending in {', '.join(_SUFFIXES)}; else download it and give the path")
    in_name = match[1] if (match := re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)) else ""
    expected = sha256 or in_name
    advice = f"which the publisher states or `sha256sum FILE` prints; give it as {path}#sha256=<64 hex digits>"
    require(bool(expected), f"a download needs its hash, {advice}")
    if not (in_name and expected.startswith(in_name)):
        name = f"{Path(name).stem}-{expected[:8]}{Path(name).suffix}"
    target = weights_folder() / name
    if not target.is_file() or (sha256 is not None and sha256_of(target) != sha256):
        _download(address, target, expected)
    return target


def _download(address: str, target: Path, sha256: str) -> None:
    """Download to a temporary name, check the start of the hash, and rename; repeat after network errors."""
    from torch.hub import download_url_to_file

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        for wait_s in (*_BACKOFF_S, None):
            try:
                urllib.request.Request(address)  # if malformed, an error before a file is opened
                target.parent.mkdir(parents=True, exist_ok=True)
                return download_url_to_file(address, str(target), hash_prefix=sha256, progress=sys.stderr.isatty())
            except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if wait_s is None or not _may_pass(error):
                    raise WeightsError(_download_problem(error, target.parent, sha256)) from error
            time.sleep(wait_s)
    finally:
        socket.setdefaulttimeout(timeout)


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed: after errors of the network and of an overloaded server."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    return isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError | http.client.IncompleteRead)


def _download_problem(error: Exception, folder: Path, sha256: str) -> str:
    """Return in one line why a download failed and what to do."""
    status = f"HTTP {error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else ""
    if _may_pass(error):
        return f"the download failed {len(_BACKOFF_S) + 1} times ({status or one_line(error)}); check the network"
    if isinstance(error, urllib.error.HTTPError):
        advice = "the link may have expired or need a log-in" if error.code in (401, 403) else "check it"
        return f"the server answered {status}; {advice}"
    if isinstance(error, OSError):
        return f"cannot write into {folder}: {one_line(error)}; set DINOCELL_WEIGHTS to another folder"
    if isinstance(error, RuntimeError):  # of the hash, or a missing one
        return f"expected sha256 {sha256}; the file is another one or incomplete, and was not kept ({one_line(error)})"
    return "malformed, expected http(s)://host/file"  # the error may quote the query, so it is not shown


def _from_hub_address(text: str) -> Path:
    """Return the local file or folder of ``hf://owner/name[@revision][/file]``."""
    revision_pattern = r"@(refs/(?:pr|convert)/[^/]+|[^/]+)"
    address = re.fullmatch(rf"(?i:hf)://([\w.-]+/[\w.-]+)(?:{revision_pattern})?(?:/(.+?))?/?", text)
    repo, revision, file = address.groups() if address else ("", None, None)
    require(bool(repo), "expected hf://owner/name, hf://owner/name@revision or hf://owner/name/file")
    is_weights = file is None or file.endswith(_SUFFIXES)
    require(is_weights, f"expected a file ending in {', '.join(_SUFFIXES)}, got {file!r}")
    return _from_hub(repo, urllib.parse.unquote(revision) if revision else None, file)


def _from_hub(repo: str, revision: str | None, file: str | None, *, hint: str = "") -> Path:
    """Download one file, or configuration and weights, of a repository; use the cache if the hub is unreachable."""
    import huggingface_hub
    from huggingface_hub import errors

    problems = (
        errors.HTTPError,  # type: ignore[attr-defined]  # of the HTTP library, which depends on the version
        errors.EntryNotFoundError,
        errors.HFValidationError,
        OSError,
        RuntimeError,  # from its Rust downloader
    )
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        # List first, to download only one of several formats of the weights.
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        needed = [n for n in names if re.fullmatch(r"config\.json|[^/]*model\.(safetensors|bin)\.index\.json", n)]
        needed += _choose(names)
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=needed)
        return _weights_in(Path(folder))
    except problems as error:
        is_missing_revision = isinstance(error, errors.RevisionNotFoundError)
        if file is None and not is_missing_revision and (cached := _from_hub_cache(repo, revision)) is not None:
            return cached
        raise WeightsError(f"{_hub_problem(error, repo, revision, file)}{hint}") from error


def _from_hub_cache(repo: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the Hugging Face cache; None if its weights are not complete."""
    from huggingface_hub import errors, snapshot_download

    try:
        # Ask for the configuration, not for the weights: another program may have downloaded other formats.
        folder = snapshot_download(repo, revision=revision, allow_patterns=["config.json"], local_files_only=True)
        return _weights_in(Path(folder))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, WeightsError):
        return None


def _hub_problem(error: Exception, repo: str, revision: str | None, file: str | None) -> str:
    """Return in one line why a download failed and what to do."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{repo}"
    if constants.HF_HUB_OFFLINE:
        command = f"hf download {repo}" + (f" {file}" if file else "") + (f" --revision {revision}" if revision else "")
        return (
            f"offline mode is on (HF_HUB_OFFLINE) and it is not in the cache {constants.HF_HUB_CACHE}; download it"
            f" with a network by `{command}` (page: {page})"
        )
    # "Not in the cache either" hides the problem of the network.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    refused = f"access refused (HTTP {status}); accept the licence at {page} and {log_in}"
    answered = f"Hugging Face answered HTTP {status} for {page}; try again later"
    messages = {  # the first kind that fits; all but one are kinds of HfHubHTTPError
        errors.GatedRepoError: refused,
        errors.RepositoryNotFoundError: f"no such repository, or a private one; check {page}, and {log_in}",
        errors.RevisionNotFoundError: f"the repository has no revision {revision!r}; see {page}",
        errors.RemoteEntryNotFoundError: f"the repository has no file {file!r}; see {page}/tree/{revision or 'main'}",
        errors.HFValidationError: f"{repo!r} is not a repository name; expected hf://owner/name",
        errors.HfHubHTTPError: refused if status in (401, 403) else answered,
    }
    unreachable = (
        f"cannot download {page}, and it is not in the cache: {one_line(cause)}; check the network and the disk"
    )
    return next((message for kind, message in messages.items() if isinstance(cause, kind)), unreachable)
