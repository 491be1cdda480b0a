"""Where a file lies: on this disk, behind a web address, or in a bucket. One function brings its bytes.

Buckets need an extra package (``s3fs`` for ``s3://``), imported by fsspec when such an address is opened. What a
network or a busy server breaks is tried again, after a growing pause; what is missing or forbidden is not.
"""

import hashlib
import http.client
import itertools
import os
import posixpath
import re
import ssl
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

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


# --- listing -------------------------------------------------------------------------------------------------------
#
# Which files lie below a folder, on this disk or in a bucket; and one file behind a web address.
#
# The order never depends on the file system. Hidden files and folders (``._a.tif``, ``.snapshot``) are left out. Linked
# folders are followed. All names are held in memory, about 200 bytes a file.

_WEB = ("http://", "https://")


class Listed(NamedTuple):
    """A file: its name relative to the folder, with ``/`` and in one Unicode spelling; and where to open it."""

    name: str
    path: str


def list_files(address: str | Path, *, folders_as_files: tuple[str, ...] = ()) -> list[Listed]:
    """List a folder and all folders below it, sorted by name.

    Parameters
    ----------
    address
        A folder on this disk or in a bucket (``s3://bucket/folder``); or one file, also behind ``https://``.
    folders_as_files
        Suffixes of folders that are one input each, such as ``.zarr``: listed, and not looked into.

    Raises
    ------
    ImageError
        If there is no such folder, it cannot be listed, two names differ only in their Unicode spelling, or a name is
        not Unicode.
    """
    local = local_path(address)
    if local is not None:
        found = _list_local(local, folders_as_files)
    elif str(address).startswith(_WEB):
        _check_web(str(address))
        if str(address).endswith("/") or not PurePosixPath(urllib.parse.urlsplit(str(address)).path).suffix:
            raise ImageError(f"{address}: web folders cannot be listed; name one file, or a table of files")
        found = [Listed(base_name(address), str(address))]
    else:
        found = _list_bucket(str(address), folders_as_files)
    found.sort()
    for one, other in itertools.pairwise(found):
        if one.name == other.name:
            raise ImageError(f"{one.path} and {other.path}: one name in two Unicode spellings; rename one of them")
    return found


def _check_web(address: str) -> None:
    try:
        urllib.parse.urlsplit(address)
    except ValueError as error:
        raise ImageError(f"{address}: no web address ({error})") from None


def join(address: str, *parts: str) -> str:
    """Append folders or a file name to a path or an address; web addresses get their percent signs."""
    if address.startswith(_WEB):
        parts = tuple(urllib.parse.quote(part) for part in parts)
    elif "://" not in address:
        return str(Path(address, *parts))
    return "/".join((address.rstrip("/"), *(part.strip("/") for part in parts)))


def parent(address: str) -> str:
    """Return the folder that a file or folder lies in."""
    if "://" in address:
        return posixpath.dirname(address.rstrip("/"))
    return str(Path(os.path.abspath(address)).parent)  # noqa: PTH100 - links keep their names


def base_name(address: str | Path) -> str:
    """Return the last part of a path or an address; of a relative path such as ``.``, what it stands for."""
    local = local_path(address)
    if local is not None:
        return _nfc(Path(os.path.abspath(local)).name)  # noqa: PTH100 - links keep their names
    path = urllib.parse.urlsplit(str(address)).path if str(address).startswith(_WEB) else str(address).split("://")[1]
    name = posixpath.basename(path.rstrip("/"))
    return _nfc(urllib.parse.unquote(name) if str(address).startswith(_WEB) else name)


def folder_exists(address: str) -> bool:
    """Return whether there is such a folder, on this disk or in a bucket.

    Raises
    ------
    ImageError
        If a bucket does not answer.
    ValueError
        If it is a web address: what lies there cannot be asked.
    """
    local = local_path(address)
    if local is not None:
        return local.is_dir()
    if address.startswith(_WEB):
        raise ValueError(f"{address}: web folders cannot be looked into")
    try:
        return bool(_file_system(address).isdir(address))
    except bucket_errors() as error:
        raise ImageError(f"{address}: cannot be looked into ({' '.join(str(error).split()) or error!r})") from error


def file_exists(address: str) -> bool:
    """Return whether there is such a file, on this disk, in a bucket or behind a web address.

    Raises
    ------
    ImageError
        If a bucket does not answer.
    """
    local = local_path(address)
    if local is not None:
        return local.is_file()
    if address.startswith(_WEB):
        return web_file_exists(address)
    try:
        return bool(_file_system(address).isfile(address))
    except bucket_errors() as error:
        raise ImageError(f"{address}: cannot be looked into ({' '.join(str(error).split()) or error!r})") from error


def _list_local(root: Path, folders_as_files: tuple[str, ...]) -> list[Listed]:
    if root.is_file():
        return [Listed(base_name(root), str(root))]
    if not root.is_dir():
        raise ImageError(f"{root}: no such folder")
    if root.name.lower().endswith(folders_as_files or "\0"):
        return [Listed(base_name(root), str(root))]
    try:
        return [Listed(_checked(name, root), path) for name, path in _walk(str(root), "", folders_as_files, ())]
    except OSError as error:
        raise ImageError(f"{error.filename or root}: cannot be listed ({error.strerror or error})") from error


def _walk(
    folder: str, prefix: str, folders_as_files: tuple[str, ...], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, str]]:
    status = os.stat(folder)  # noqa: PTH116 - of the folder that a link leads to
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder above it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name.lower().endswith(folders_as_files or "\0"):
                    yield prefix + entry.name, entry.path
                else:
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", folders_as_files, (*above, here))
            elif entry.is_file() or entry.is_symlink():  # a broken link is reported when it is read
                yield prefix + entry.name, entry.path


def _list_bucket(root: str, folders_as_files: tuple[str, ...]) -> list[Listed]:
    protocol = root.split("://")[0]
    files = _file_system(root)
    top = str(files._strip_protocol(root)).rstrip("/")
    try:
        if top.lower().endswith(folders_as_files or "\0"):
            return [Listed(base_name(root), root)]
        paths = _walk_bucket(files, top, folders_as_files) if folders_as_files else files.find(top)
        found = [
            Listed(_checked(path[len(top) :].lstrip("/") or base_name(path), root), f"{protocol}://{path.lstrip('/')}")
            for path in paths
            if not path.endswith("/")  # empty objects by which web consoles show a folder
        ]
    except FileNotFoundError:
        raise ImageError(f"{root}: no such folder or bucket") from None
    except bucket_errors() as error:
        raise ImageError(f"{root}: cannot be listed ({' '.join(str(error).split()) or error!r})") from error
    if not found:
        raise ImageError(f"{root}: no such folder, or nothing in it")
    return [file for file in found if not any(part.startswith(".") for part in file.name.split("/"))]


def _walk_bucket(files: Any, folder: str, folders_as_files: tuple[str, ...]) -> Iterator[str]:
    """Yield files folder by folder: more requests than one ``find``, but the chunks of Zarr folders are not listed."""
    for entry in files.ls(folder, detail=True):
        path, is_file = str(entry["name"]), entry["type"] != "directory"
        if is_file or path.rstrip("/").lower().endswith(folders_as_files):
            yield path if is_file else path.rstrip("/")
        elif path.rstrip("/") != folder:  # some stores list a folder in itself
            yield from _walk_bucket(files, path.rstrip("/"), folders_as_files)


def _file_system(address: str) -> Any:
    import fsspec

    try:
        files = fsspec.filesystem(address.split("://")[0], **bucket_options(address))
    except (ImportError, ValueError) as error:
        raise ImageError(f"{address}: {' '.join(str(error).split())}") from error
    files.invalidate_cache()
    return files


def _checked(name: str, root: str | Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise ImageError(f"{root}: the name {shown} is not Unicode (UTF-8); rename it") from None
    return _nfc(name)


def _nfc(text: str) -> str:
    """Return a name in one spelling: macOS writes ö as o and a dot pair, Linux as one letter."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


# --- downloads -----------------------------------------------------------------------------------------------------
#
# One large remote file to a local one, in pieces, with its sha256.

_CHUNK = 4 << 20


def download(address: str, target: IO[bytes], *, num_bytes: int) -> str:
    """Copy a remote file (``https://``, ``s3://`` or any other protocol that fsspec knows) and return its sha256.

    Raises
    ------
    ImageError
        If it cannot be read to its end, which is worth trying again, or has more than ``num_bytes`` bytes.
    OSError
        If the target cannot be written.
    """
    source = _open(address)
    digest = hashlib.sha256()
    received = 0
    with source:
        while chunk := _read(source, address):
            received += len(chunk)
            if received > num_bytes:  # whatever else it is, it must not fill the disk
                raise ImageError(f"{address}: more than the {num_bytes} bytes that the manifest says")
            digest.update(chunk)
            target.write(chunk)
        if isinstance(source, http.client.HTTPResponse) and source.length:  # read(n) does not mind the end
            raise ImageError(f"{address}: reading stopped (the server broke off after {received} bytes)")
    return digest.hexdigest()


def _open(address: str) -> Any:  # something with read() and close()
    try:
        if address.startswith(("http://", "https://")):
            return urllib.request.urlopen(quoted(address), timeout=_TIMEOUT_S)
        import fsspec

        filesystem, path = fsspec.url_to_fs(address, **bucket_options(address))
        return filesystem.open(path, "rb", block_size=16 << 20)
    except _failures() as error:
        raise ImageError(f"{address}: cannot be opened ({_line(error)})") from error


def _read(source: Any, address: str) -> bytes:
    try:
        return bytes(source.read(_CHUNK))
    except _failures() as error:
        raise ImageError(f"{address}: reading stopped ({_line(error)})") from error


def _failures() -> tuple[type[Exception], ...]:
    return (*bucket_errors(), http.client.HTTPException, ImportError)
