"""Which files lie below a folder, on this disk or in a bucket; and one file behind a web address.

The order never depends on the file system. Hidden files and folders (``._a.tif``, ``.snapshot``) are left out. Linked
folders are followed. All names are held in memory, about 200 bytes a file.
"""

import itertools
import os
import posixpath
import unicodedata
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dinocell.data_shards.locations import bucket_errors, bucket_options, local_path, web_file_exists
from dinocell.errors import ImageError

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
    import fsspec  # type: ignore[import-untyped]

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
