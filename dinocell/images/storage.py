"""Files on this disk, behind web addresses and in buckets: their bytes, listings and downloads.

Buckets and other stores are read through fsspec, which imports an extra package for most (``s3fs`` for ``s3://``).
Web addresses are read with urllib: fsspec's HTTP needs aiohttp and its six compiled packages, reads a body that ends
early as if it were complete, and its errors do not distinguish a missing file (403, 404) from a busy server.
Network failures and busy servers are retried with growing pauses; missing and forbidden files are not.
"""

import hashlib
import http.client
import itertools
import os
import posixpath
import re
import ssl
import sys
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import tenacity

from dinocell.errors import ImageError, one_line
from dinocell.runtime.files import replacing

_WEB = ("http://", "https://")
_TIMEOUT_S = 60.0

# Request timeout, too many requests, and the answers of servers that are overloaded or restarting.
_TRANSIENT_HTTP_ERRORS = (408, 429, 500, 502, 503, 504)
_NO_SUCH_FILE = (403, 404, 410)  # 403: the answer of stores for a missing file where listing is not allowed


# --- one file -------------------------------------------------------------------------------------------------------


def open_bytes(path: str | Path, *, first: int | None = None) -> bytes:
    """Read a file, or its ``first`` bytes: a local path, ``https://``, ``s3://`` or another protocol of fsspec.

    Buckets are read without signing in, as public archives allow, unless the environment names an AWS key or profile.
    A server that does not answer, or closes the connection early, is tried four times in about ten seconds.

    Raises
    ------
    ImageError
        If it cannot be read; one line that names the file.
    """
    local = local_path(path)
    if local is None:
        return _retrying(4)(_fetch, str(path), first)
    try:
        with local.open("rb") as file:
            return file.read(first)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = f"cannot be read ({one_line(error)})"
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(error, IsADirectoryError):
            reason = "a folder, where one image file was expected"
        raise ImageError(f"{local}: {reason}") from error


def file_exists(address: str) -> bool:
    """Return whether a file exists on this disk, in a bucket or behind a web address; ImageError if that fails."""
    local = local_path(address)
    if local is not None:
        return local.is_file()
    if address.startswith(_WEB):
        return _retrying(4)(_web_file_exists, address)
    with _errors_named(address, "cannot be fetched"):
        store, path = _store(address)
        return bool(store.isfile(path))


def folder_exists(address: str) -> bool:
    """Return whether a folder exists on this disk or in a bucket (not on the web); ImageError if that fails."""
    local = local_path(address)
    if local is not None or address.startswith(_WEB):
        return local is not None and local.is_dir()
    with _errors_named(address, "cannot be fetched"):
        store, path = _store(address)
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

    def attempt(part: Path) -> str:
        with part.open("wb") as file:
            return copy_remote(url, file, num_bytes=max_bytes, shown=shown, progress=progress)

    with replacing(target) as part:
        return _retrying(attempts)(attempt, part)


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


def _chunks(url: str, shown: str, size: int = 4 << 20) -> Generator[tuple[bytes, int | None], None, None]:
    """Yield the content in chunks, each with the total size if the server announced it."""
    with _errors_named(shown, "cannot be opened"):
        if url.startswith(_WEB):
            source = _open_web(url)
        else:
            store, path = _store(url)
            source = store.open(path, "rb", block_size=16 << 20)
    total = getattr(source, "length", None)
    with source:
        while True:
            with _errors_named(shown, "the download broke off"):
                chunk = bytes(source.read(size))
                if not chunk and (missing := getattr(source, "length", None)):  # urllib's read(n) does not raise
                    raise ConnectionError(f"{missing} bytes are missing")
            if not chunk:
                return
            yield chunk, total


# --- how servers are queried ----------------------------------------------------------------------------------------


def bucket_options(url: str) -> dict[str, Any]:
    """Return fsspec's options for an address: anonymous unless the environment names an AWS key or profile."""
    if not url.startswith("s3://"):
        return {}
    # One request at a time: with more, s3fs first requests a file's size, to read it in parts.
    return {"anon": not {"AWS_ACCESS_KEY_ID", "AWS_PROFILE"} & os.environ.keys(), "max_concurrency": 1}


def _open_web(url: str, method: str = "GET") -> Any:
    # Spaces and letters beyond ASCII become percent signs; what is quoted already stays.
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        return urllib.request.urlopen(urllib.request.Request(quoted, method=method), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # its code and reason stay readable
        raise


def _fetch(url: str, first: int | None) -> bytes:
    if not url.startswith(_WEB):  # in one request, which `_chunks` does not promise
        with _errors_named(url, "cannot be fetched"):
            store, path = _store(url)
            return bytes(store.cat_file(path) if first is None else store.cat_file(path, start=0, end=first))
    with closing(_chunks(url, url) if first is None else _chunks(url, url, first)) as chunks:
        if first is None:
            return b"".join(chunk for chunk, _ in chunks)
        content = next(chunks, (b"", None))[0]
        # A shorter answer is the whole file, or was interrupted, which the next chunk would show.
        return content if len(content) == first else content + next(chunks, (b"", None))[0]


def _web_file_exists(url: str) -> bool:
    with _errors_named(url, "cannot be fetched"):
        try:
            _open_web(url, "HEAD").close()
        except urllib.error.HTTPError as error:
            if error.code not in _NO_SUCH_FILE:
                raise
            return False
    return True


def _store(address: str) -> tuple[Any, str]:
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
    from_bucket = _botocore_errors("ConnectionError", "HTTPClientError")
    outages: tuple[type[Exception], ...] = (OSError, http.client.HTTPException, *from_bucket)
    return isinstance(cause, outages) and not isinstance(cause, permanent)


def _remote_errors() -> tuple[type[Exception], ...]:
    return (OSError, ValueError, ImportError, http.client.HTTPException, *_botocore_errors("BotoCoreError"))


def _botocore_errors(*names: str) -> tuple[type[Exception], ...]:
    exceptions = sys.modules.get("botocore.exceptions")  # loaded by s3fs, which lets some of its errors through
    return tuple(getattr(exceptions, name) for name in names) if exceptions else ()


@contextmanager
def _errors_named(address: str, failure: str, missing: str = "no such file") -> Iterator[None]:
    """Turn the errors of urllib and fsspec into an ImageError of one line that names the address."""
    try:
        yield
    except _remote_errors() as error:
        if isinstance(error, ImageError):
            raise
        reason = missing if isinstance(error, FileNotFoundError) else f"{failure} ({one_line(error)})"
        raise ImageError(f"{address}: {reason}") from error


# --- paths and addresses --------------------------------------------------------------------------------------------


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


def join(address: str, *parts: str) -> str:
    """Append folders or a file name to a path or an address; web addresses are percent-encoded."""
    if address.startswith(_WEB):
        parts = tuple(urllib.parse.quote(part) for part in parts)
    elif "://" not in address:
        return str(Path(address, *parts))
    return "/".join((address.rstrip("/"), *(part.strip("/") for part in parts)))


def parent(address: str) -> str:
    """Return the folder that contains a file or folder."""
    if "://" in address:
        return posixpath.dirname(address.rstrip("/"))
    return str(Path(os.path.abspath(address)).parent)  # noqa: PTH100 - links keep their names


def base_name(address: str | Path) -> str:
    """Return the last part of a path or an address; of a relative path such as ``.``, the folder's name."""
    local = local_path(address)
    if local is not None:
        return nfc(Path(os.path.abspath(local)).name)  # noqa: PTH100 - links keep their names
    is_web = str(address).startswith(_WEB)
    path = urllib.parse.urlsplit(str(address)).path if is_web else str(address).split("://")[1]
    name = posixpath.basename(path.rstrip("/"))
    return nfc(urllib.parse.unquote(name) if is_web else name)


def nfc(text: str) -> str:
    """Return a name in one Unicode form: macOS stores ö as o and a combining mark, Linux as one letter."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


# --- listings -------------------------------------------------------------------------------------------------------


class Listed(NamedTuple):
    """A file: its name relative to the folder, with ``/`` and in Unicode's NFC form; and the path to open."""

    name: str
    path: str


def list_files(address: str | Path, *, folders_as_files: tuple[str, ...] = ()) -> list[Listed]:
    """List a folder and all folders below it, sorted by name.

    Hidden files and folders (``._a.tif``, ``.snapshot``) are skipped, linked folders followed. All names are held in
    memory, about 200 bytes per file.

    ``address`` may also be one file, for example behind ``https://``. ``folders_as_files`` are suffixes of folders that
    are one input each, such as ``.zarr``: listed, but not searched.

    Raises
    ------
    ImageError
        If the folder cannot be listed, two names differ only in their Unicode form, or a name is not Unicode.
    """
    local = local_path(address)
    if local is not None:
        files = _list_local(local, folders_as_files)
    elif str(address).startswith(_WEB):
        with _errors_named(str(address), "no web address"):
            path = PurePosixPath(urllib.parse.urlsplit(str(address)).path)
        if str(address).endswith("/") or not path.suffix:
            raise ImageError(f"{address}: web folders cannot be listed; name one file, or a table of files")
        files = [Listed(base_name(address), str(address))]
    else:
        with _errors_named(str(address), "cannot be listed", missing="no such folder or bucket"):
            files = _list_bucket(str(address), folders_as_files)
    files.sort()
    for file, following in itertools.pairwise(files):
        if file.name == following.name:
            raise ImageError(f"{file.path} and {following.path}: one name in two Unicode forms; rename one of them")
    return files


def _list_local(root: Path, folders_as_files: tuple[str, ...]) -> list[Listed]:
    if root.is_file() or (root.is_dir() and _has_suffix(root.name, folders_as_files)):
        return [Listed(base_name(root), str(root))]
    try:
        return [Listed(_checked_name(name, root), path) for name, path in _walk(str(root), "", folders_as_files, ())]
    except OSError as error:
        reason = f"cannot be listed ({error.strerror or error})" if root.is_dir() else "no such folder"
        raise ImageError(f"{error.filename or root}: {reason}") from error


def _walk(
    folder: str, prefix: str, folders_as_files: tuple[str, ...], ancestors: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, str]]:
    status = os.stat(folder)  # noqa: PTH116 - follows links
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder above it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir() and not _has_suffix(entry.name, folders_as_files):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", folders_as_files, (*ancestors, identity))
            elif entry.is_dir() or entry.is_file() or entry.is_symlink():  # broken links fail when they are read
                yield prefix + entry.name, entry.path


def _list_bucket(root: str, folders_as_files: tuple[str, ...]) -> list[Listed]:
    protocol = root.split("://")[0]
    store, top = _store(root)
    top = top.rstrip("/")
    if _has_suffix(top, folders_as_files):
        return [Listed(base_name(root), root)]
    paths = _walk_bucket(store, top, folders_as_files) if folders_as_files else store.find(top)
    files = [
        Listed(_checked_name(path[len(top) :].lstrip("/") or base_name(path), root), f"{protocol}://{path.lstrip('/')}")
        for path in paths
        if not path.endswith("/")  # empty objects that stand for folders in web consoles
    ]
    if not files:
        raise ImageError(f"{root}: no such folder, or nothing in it")
    return [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]


def _walk_bucket(store: Any, folder: str, folders_as_files: tuple[str, ...]) -> Iterator[str]:
    """Yield files folder by folder: more requests than one ``find``, but the chunks of Zarr folders are not listed.

    Not fsspec's ``walk``: below the top it omits folders that cannot be listed.
    """
    for entry in store.ls(folder, detail=True):
        path, is_file = str(entry["name"]), entry["type"] != "directory"
        if is_file or _has_suffix(path.rstrip("/"), folders_as_files):
            yield path if is_file else path.rstrip("/")
        elif path.rstrip("/") != folder:  # some stores list a folder in itself
            yield from _walk_bucket(store, path.rstrip("/"), folders_as_files)


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)  # False without suffixes


def _checked_name(name: str, root: str | Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        readable = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise ImageError(f"{root}: the name {readable} is not Unicode (UTF-8); rename it") from None
    return nfc(name)
