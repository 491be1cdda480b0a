"""Where a file lies: on this disk, behind a web address, or in a bucket. One function brings its bytes.

Buckets need an extra package (``s3fs`` for ``s3://``), imported by fsspec when such an address is opened. What a
network or a busy server breaks is tried again, after a growing pause; what is missing or forbidden is not.
"""

import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinocell.errors import ImageError

_TIMEOUT_S = 60.0
_PAUSES_S = (0.5, 2.0, 8.0)  # before the second, third and fourth try

# Request timeout, too many requests, and what servers answer that are overloaded or being restarted.
_PASSING_HTTP_ERRORS = (408, 429, 500, 502, 503, 504)
_NO_SUCH_FILE = (403, 404, 410)  # 403: what stores answer for a missing file where listing is not allowed


def open_bytes(path: str | Path, *, first: int | None = None) -> bytes:
    """Read a whole file: a local path, ``https://``, ``s3://`` or any other protocol that fsspec knows.

    A bucket is read without signing in, as public archives allow, unless the environment names an AWS key or profile.
    A server that does not answer, or breaks off, is asked four times in about ten seconds.

    Parameters
    ----------
    first
        Read only this many bytes, from the start.

    Raises
    ------
    ImageError
        If it cannot be read, in one line that names the file.
    """
    local = local_path(path)
    if local is not None:
        return _read_local(local, first)
    url = str(path)
    if url.startswith(("http://", "https://")):
        return _read_web(url, first)
    return _read_bucket(url, first)


def web_file_exists(url: str) -> bool:
    """Return whether a web server has a file, by asking for its headers alone.

    Raises
    ------
    ImageError
        If the server does not answer, or answers with an error of its own.
    """

    def fetch() -> bytes:
        with urllib.request.urlopen(urllib.request.Request(quoted(url), method="HEAD"), timeout=_TIMEOUT_S):
            return b""

    try:
        _with_patience(fetch)
        return True
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _NO_SUCH_FILE:
            return False
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error


def quoted(url: str) -> str:
    """Return an address with spaces and letters beyond ASCII as percent signs; what is quoted already stays."""
    return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def bucket_options(url: str) -> dict[str, Any]:
    """Return how fsspec is to open an address: anonymously, unless the environment names an AWS key or profile."""
    if not url.startswith("s3://"):
        return {}
    # One at a time: otherwise s3fs asks for a file's size before it asks for the file, to cut it into parts.
    return {"anon": not {"AWS_ACCESS_KEY_ID", "AWS_PROFILE"} & os.environ.keys(), "max_concurrency": 1}


def bucket_errors() -> tuple[type[Exception], ...]:
    """Return what fsspec raises when a bucket does not answer as it should."""
    try:
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]  # s3fs lets these through
    except ImportError:
        return (OSError, ValueError)
    return (OSError, ValueError, BotoCoreError)


def _bucket_outages() -> tuple[type[Exception], ...]:
    """Return what fsspec raises, besides OSError, when a bucket is out of reach."""
    try:
        from botocore import exceptions  # type: ignore[import-untyped]
    except ImportError:
        return ()
    return (exceptions.ConnectionError, exceptions.HTTPClientError)


def local_path(path: str | Path) -> Path | None:
    """Return the path on this disk; None for the address of something elsewhere.

    Raises
    ------
    ImageError
        If an address has been through ``pathlib``, which makes ``s3:/bucket`` of ``s3://bucket``.
    """
    text = str(path)
    if text.startswith("file://"):
        return Path(urllib.request.url2pathname(text.removeprefix("file://")))
    if "://" in text:
        return None
    if re.match(r"(s3|https?|gs|memory):/", text):
        raise ImageError(
            f"{text}: one slash is missing; hand addresses over as text ('{text.replace(':/', '://', 1)}')"
        )
    return Path(text)


def _read_local(path: Path, first: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(first)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: a folder, where one image file was expected") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ImageError(f"{path}: cannot be read ({_line(error)})") from error


def _read_web(url: str, first: int | None) -> bytes:
    def fetch() -> bytes:
        with urllib.request.urlopen(quoted(url), timeout=_TIMEOUT_S) as response:
            content = bytes(
                response.read(first)
            )  # raises IncompleteRead where the server promised more, if all is read
            if first is not None and len(content) < first and response.length:
                raise http.client.IncompleteRead(content, response.length)
            return content

    try:
        return _with_patience(fetch)
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error


def _read_bucket(url: str, first: int | None) -> bytes:
    import fsspec  # type: ignore[import-untyped]

    def fetch() -> bytes:
        files, path = fsspec.url_to_fs(url, **bucket_options(url))
        return bytes(files.cat_file(path) if first is None else files.cat_file(path, start=0, end=first))

    try:
        return _with_patience(fetch, outages=_bucket_outages())
    except ImportError as error:
        raise ImageError(f"{url}: {_line(error)}") from error
    except FileNotFoundError:
        raise ImageError(f"{url}: no such file") from None
    except bucket_errors() as error:
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error


def _with_patience(fetch: Callable[[], bytes], *, outages: tuple[type[Exception], ...] = ()) -> bytes:
    """Call ``fetch`` again, after a pause, where network or server failed it, or it raised one of ``outages``."""
    failures: tuple[type[Exception], ...] = (OSError, http.client.HTTPException, *outages)
    for pause_s in _PAUSES_S:
        try:
            return fetch()
        except failures as error:
            if not _is_passing(error):
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()
        time.sleep(pause_s)
    return fetch()


def _is_passing(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _PASSING_HTTP_ERRORS
    if isinstance(error, urllib.error.URLError):  # a name that does not exist, or no connection
        return isinstance(error.reason, OSError) and not isinstance(error.reason, ssl.SSLCertVerificationError)
    return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
