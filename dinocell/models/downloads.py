"""Weights by URL: downloaded once into the weights folder, and kept only with the hash that was promised."""

import contextlib
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
from collections.abc import Generator
from pathlib import Path

from dinocell.errors import WeightsError

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
