"""Where a file lies: on this disk, behind a web address, or in a bucket. One function brings its bytes.

Buckets need an extra package (``s3fs`` for ``s3://``), imported by fsspec when such an address is opened.
"""

import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from dinocell.errors import ImageError

_TIMEOUT_S = 60.0


def open_bytes(path: str | Path) -> bytes:
    """Read a whole file: a local path, ``https://``, ``s3://`` or any other protocol that fsspec knows.

    A bucket is read without signing in, as public archives allow, unless the environment names an AWS key or profile.

    Raises
    ------
    ImageError
        If it cannot be read, in one line that names the file.
    """
    local = local_path(path)
    if local is not None:
        return _read_local(local)
    url = str(path)
    if url.startswith(("http://", "https://")):
        return _read_web(url)
    return _read_bucket(url)


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


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: a folder, where one image file was expected") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ImageError(f"{path}: cannot be read ({_line(error)})") from error


def _read_web(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            content = response.read()  # raises IncompleteRead where the server promised more
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error
    return bytes(content)


def _read_bucket(url: str) -> bytes:
    import fsspec  # type: ignore[import-untyped]

    options = {}
    if url.startswith("s3://") and not {"AWS_ACCESS_KEY_ID", "AWS_PROFILE"} & os.environ.keys():
        options = {"anon": True}
    try:
        with fsspec.open(url, "rb", **options) as file:
            return bytes(file.read())
    except ImportError as error:
        raise ImageError(f"{url}: {_line(error)}") from error
    except FileNotFoundError:
        raise ImageError(f"{url}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{url}: cannot be fetched ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
