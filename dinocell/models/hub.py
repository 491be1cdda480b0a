"""Weights on the Hugging Face hub, in its cache, and in folders laid out like its repositories.

``huggingface_hub`` is imported on first use, not with this module.
"""

import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from dinocell.errors import WeightsError
from dinocell.models.downloads import WEIGHT_SUFFIXES, reason

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
