"""Bytes of files on this disk, behind web addresses and in buckets: whole, the first ones, or as downloads.

Buckets and other stores are read through fsspec, which imports an extra package for most (``s3fs`` for ``s3://``).
Web addresses are read with urllib: fsspec's HTTP needs aiohttp and its six compiled packages, reads a body that ends
early as if it were complete, and its errors do not distinguish a missing file (403, 404) from a busy server.
Network failures and busy servers are retried with growing pauses; missing and forbidden files are not.
"""

import hashlib
import http.client
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import tenacity

from dinocell.errors import ImageError, one_line
from dinocell.runtime.files import replacing

WEB = ("http://", "https://")
_TIMEOUT_S = 60.0
_CHUNK_BYTES = 4 << 20

# Request timeout, too many requests, and the answers of servers that are overloaded or restarting.
_TRANSIENT_HTTP_ERRORS = (408, 429, 500, 502, 503, 504)
_NO_SUCH_FILE = (403, 404, 410)  # 403: the answer of stores for a missing file where listing is not allowed


def open_bytes(path: str | Path, *, first: int | None = None) -> bytes:
    """Read a file, or its ``first`` bytes: a local path, ``https://``, ``s3://`` or another protocol of fsspec.

    Buckets are read without signing in, as public archives allow, unless the environment names an AWS key or profile.
    A server that does not answer, or closes the connection early, is tried four times in about ten seconds.

    Raise ImageError if it cannot be read; one line that names the file.
    """
    local = local_path(path)
    if local is None:
        return _retrying(4)(_fetch, str(path), first)
    with errors_named(local, "cannot be read"), local.open("rb") as file:
        return file.read(first)


def file_exists(address: str) -> bool:
    """Return whether a file exists on this disk, in a bucket or behind a web address; ImageError if that fails."""
    local = local_path(address)
    if local is not None:
        return local.is_file()
    if address.startswith(WEB):
        return _retrying(4)(_web_file_exists, address)
    with errors_named(address, "cannot be fetched"):
        store, path = open_store(address)
        return bool(store.isfile(path))


def folder_exists(address: str) -> bool:
    """Return whether a folder exists on this disk or in a bucket (not on the web); ImageError if that fails."""
    local = local_path(address)
    if local is not None or address.startswith(WEB):
        return local is not None and local.is_dir()
    with errors_named(address, "cannot be fetched"):
        store, path = open_store(address)
        return bool(store.isdir(path))


def download(
    url: str,
    target: Path,
    *,
    max_bytes: int | None = None,
    attempts: int = 4,
    shown: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> str:
    """Download a remote file to ``target`` and return its sha256; ``target`` is complete or absent.

    The bytes go to a temporary file in the same folder, which is renamed when all have arrived.

    Parameters
    ----------
    max_bytes
        Larger files are an error.
    attempts
        For network failures and busy servers, with pauses of 0.5, 2, 8, 32... s.
    shown
        The name for error messages, such as the address without a signed query.
    progress
        Called after each chunk with the bytes received in this attempt, and the announced size if there is one.

    Raises
    ------
    ImageError
        If it cannot be fetched; its ``__cause__`` is what urllib or fsspec raised.
    OSError
        If ``target`` cannot be written.
    """
    digest = ""
    with replacing(target) as part:
        for attempt in _retrying(attempts):
            with attempt, part.open("wb") as file:
                digest = copy_remote(url, file, num_bytes=max_bytes, shown=shown, progress=progress)
    return digest


def copy_remote(
    url: str,
    file: IO[bytes],
    *,
    num_bytes: int | None = None,
    shown: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> str:
    """Copy a remote file of at most ``num_bytes`` into an open one, in one attempt; otherwise as `download`."""
    digest, received, shown = hashlib.sha256(), 0, shown or url
    with closing(_chunks(url, shown)) as chunks:
        for chunk, total in chunks:
            received += len(chunk)
            if num_bytes is not None and received > num_bytes:  # a wrong file must not fill the disk
                raise ImageError(f"{shown}: larger than the expected {num_bytes} bytes")
            digest.update(chunk)
            file.write(chunk)
            if progress is not None:
                progress(received, total)
    return digest.hexdigest()


def _chunks(url: str, shown: str, size: int = _CHUNK_BYTES) -> Generator[tuple[bytes, int | None], None, None]:
    """Yield the content in chunks, each with the total size if the server announced it."""
    with errors_named(shown, "cannot be opened"):
        if url.startswith(WEB):
            source = _open_web(url)
        else:
            store, path = open_store(url)
            source = store.open(path, "rb", block_size=16 << 20)
    total = getattr(source, "length", None)
    with source:
        while True:
            with errors_named(shown, "the download broke off"):
                chunk = bytes(source.read(size))
                if not chunk and (missing := getattr(source, "length", None)):  # urllib's read(n) does not raise
                    raise ConnectionError(f"{missing} bytes are missing")
            if not chunk:
                return
            yield chunk, total


def local_path(path: str | Path) -> Path | None:
    """Return the path on this disk; None for a remote address."""
    text = str(path)
    if text.startswith("file://"):
        return Path(urllib.request.url2pathname(text.removeprefix("file://")))
    if "://" in text:
        return None
    if re.match(r"(s3|https?|gs|memory):/", text):  # an address that went through pathlib
        raise ImageError(f"{text}: one slash is missing; give addresses as text ('{text.replace(':/', '://', 1)}')")
    return Path(text)


def bucket_options(url: str) -> dict[str, Any]:
    """Return fsspec's options for an address: anonymous unless the environment names an AWS key or profile."""
    if not url.startswith("s3://"):
        return {}
    # One request at a time: with more, s3fs first requests a file's size, to read it in parts.
    return {"anon": not {"AWS_ACCESS_KEY_ID", "AWS_PROFILE"} & os.environ.keys(), "max_concurrency": 1}


def _open_web(url: str, method: str = "GET") -> Any:
    # Percent-encode spaces and letters beyond ASCII, but nothing twice.
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        return urllib.request.urlopen(urllib.request.Request(quoted, method=method), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # its code and reason stay readable
        raise


def _fetch(url: str, first: int | None) -> bytes:
    if not url.startswith(WEB):  # in one request, which `_chunks` does not promise
        with errors_named(url, "cannot be fetched"):
            store, path = open_store(url)
            return bytes(store.cat_file(path) if first is None else store.cat_file(path, start=0, end=first))
    parts: list[bytes] = []
    with closing(_chunks(url, url, first or _CHUNK_BYTES)) as chunks:
        for chunk, _ in chunks:
            parts.append(chunk)
            if len(chunk) == first:  # a shorter one is the whole file, or was interrupted: the next chunk would show it
                break
    return b"".join(parts)


def _web_file_exists(url: str) -> bool:
    with errors_named(url, "cannot be fetched"):
        try:
            _open_web(url, "HEAD").close()
        except urllib.error.HTTPError as error:
            if error.code not in _NO_SUCH_FILE:
                raise
            return False
    return True


def open_store(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it."""
    import fsspec  # type: ignore[import-untyped]

    store, path = fsspec.url_to_fs(address, **bucket_options(address))
    store.invalidate_cache()  # a listing must show what another process has just written
    return store, str(path)


def _retrying(attempts: int) -> tenacity.Retrying:
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_exponential(multiplier=0.5, exp_base=4, max=120),
        stop=tenacity.stop_after_attempt(attempts),
        reraise=True,
    )


def _is_transient(error: BaseException) -> bool:
    cause: object = error.__cause__ if isinstance(error, ImageError) else None  # not: a local disk that is full
    if isinstance(cause, urllib.error.HTTPError):
        return cause.code in _TRANSIENT_HTTP_ERRORS
    if isinstance(cause, urllib.error.URLError):  # an unknown host name, or no connection
        cause = cause.reason
    permanent = (FileNotFoundError, PermissionError, IsADirectoryError, ssl.SSLCertVerificationError)
    outages: list[type[Exception]] = [OSError, http.client.HTTPException]
    outages += _botocore_errors("ConnectionError", "HTTPClientError")
    return isinstance(cause, tuple(outages)) and not isinstance(cause, permanent)


def _botocore_errors(*names: str) -> tuple[type[Exception], ...]:
    exceptions = sys.modules.get("botocore.exceptions")  # loaded by s3fs, which lets some of its errors through
    return tuple(getattr(exceptions, name) for name in names) if exceptions else ()


@contextmanager
def errors_named(address: str | Path, failure: str, missing: str = "no such file") -> Iterator[None]:
    """Turn the errors of the disk, urllib and fsspec into an ImageError of one line that names the address."""
    expected: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, http.client.HTTPException)
    try:
        yield
    except (*expected, *_botocore_errors("BotoCoreError")) as error:
        if isinstance(error, ImageError):
            raise
        reason = f"{failure} ({one_line(error)})"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = missing
        elif isinstance(error, IsADirectoryError):
            reason = "a folder, where one image file was expected"
        raise ImageError(f"{address}: {reason}") from error
