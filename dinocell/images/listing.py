"""Names of files: listings of folders and buckets, the parts of paths and addresses, and patterns of names."""

import itertools
import os
import posixpath
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dinocell.errors import ImageError
from dinocell.images.storage import WEB, errors_named, local_path, open_store

_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a name that is not UTF-8


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

    Raise ImageError if the folder cannot be listed, two names differ only in their Unicode form, or a name is not
    Unicode.
    """
    root, local, is_web = str(address), local_path(address), str(address).startswith(WEB)
    if local is not None:
        is_one = local.is_file() or (local.is_dir() and _has_suffix(local.name, folders_as_files))
        files = [(base_name(local), str(local))] if is_one else list(_walk(str(local), "", folders_as_files, ()))
    elif is_web:
        with errors_named(root, "no web address"):
            is_file = not root.endswith("/") and PurePosixPath(urllib.parse.urlsplit(root).path).suffix
        files = [(base_name(root), root)] if is_file else []
    else:
        with errors_named(root, "cannot be listed", missing="no such folder or bucket"):
            files = _list_bucket(root, folders_as_files)
    listed = sorted(Listed(nfc(name), path) for name, path in files)
    problems = [
        f"{file.path} and {following.path}: one name in two Unicode forms; rename one of them"
        for file, following in itertools.pairwise(listed)
        if file.name == following.name
    ]
    for name in filter(_SURROGATE.search, (file.name for file in listed)):
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        problems.append(f"{root}: the name {shown} is not Unicode (UTF-8); rename it")
    if is_web and not listed:
        problems.append(f"{root}: web folders cannot be listed; name one file, or a table of files")
    elif local is None and not listed:
        problems.append(f"{root}: no such folder, or nothing in it")
    if problems:
        raise ImageError(problems[0])
    return listed


def _walk(
    folder: str, prefix: str, folders_as_files: tuple[str, ...], ancestors: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, str]]:
    with errors_named(folder, "cannot be listed", missing="no such folder"):
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


def _list_bucket(root: str, folders_as_files: tuple[str, ...]) -> list[tuple[str, str]]:
    protocol = root.split("://")[0]
    store, top = open_store(root)
    top = top.rstrip("/")
    if _has_suffix(top, folders_as_files):
        return [(base_name(root), root)]
    paths = _walk_bucket(store, top, folders_as_files) if folders_as_files else store.find(top)
    files = [
        (path[len(top) :].lstrip("/") or base_name(path), f"{protocol}://{path.lstrip('/')}")
        for path in paths
        if not path.endswith("/")  # empty objects that stand for folders in web consoles
    ]
    return [(name, path) for name, path in files if not any(part.startswith(".") for part in name.split("/"))]


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


def join(address: str, *parts: str) -> str:
    """Append folders or a file name to a path or an address; web addresses are percent-encoded."""
    if address.startswith(WEB):
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
    is_web = str(address).startswith(WEB)
    path = urllib.parse.urlsplit(str(address)).path if is_web else str(address).split("://")[1]
    name = posixpath.basename(path.rstrip("/"))
    return nfc(urllib.parse.unquote(name) if is_web else name)


def nfc(text: str) -> str:
    """Return a name in one Unicode form: macOS stores ö as o and a combining mark, Linux as one letter."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern for relative paths.

    ``{name}`` matches a part of one folder or file name, at least one character and as few as possible; if it occurs
    again, it matches the same text. ``*`` matches any part of a name that does not matter, also an empty one. ``**/``
    at the start matches any folders, also none; they are returned under the name ``""``. All other characters are
    literal and case-sensitive.

    Attributes
    ----------
    num_literal
        Number of literal characters: if two patterns match a path, the one with more of them is the more specific.
    """

    text: str
    names: tuple[str, ...]
    num_literal: int
    regex: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> "NamePattern":
        """Compile a pattern.

        Raise ImageError if it is not a relative path, has no field, an invalid field name, an unpaired brace, or ``**``
        elsewhere.
        """
        rest = unicodedata.normalize("NFC", text).removeprefix("./")  # the form of listed names
        regex, num_literal = "", 0
        names: list[str] = []
        if rest.startswith("**/"):
            regex, rest = "(?P<folders>(?:[^/]+/)*)", rest.removeprefix("**/")
        for part in re.split(r"(\{[^\W\d]\w*\}|\*)", rest):
            if part == "*":
                regex += "[^/]*"
            elif part.startswith("{") and part.endswith("}"):
                if (name := part[1:-1]) in names:
                    regex += f"(?P=f{names.index(name)})"
                else:
                    regex += f"(?P<f{len(names)}>[^/]+?)"
                    names.append(name)
            else:
                regex += re.escape(part)
                num_literal += len(part)
        literal = re.sub(r"\{[^\W\d]\w*\}", "", rest)
        for is_wrong, problem in (
            ("**" in rest, "'**/' is only allowed at the start"),
            (rest.startswith("/") or "://" in rest, "expected a path relative to the input, as {well}_{channel}.tif"),
            (set("{}") & set(literal), "expected fields such as {well}: letters, digits and _ in a pair of braces"),
            (not names, "no field; expected at least one, such as {well} or {name}"),
        ):
            if is_wrong:
                raise ImageError(f"pattern {text!r}: {problem}")
        return cls(text=text, names=tuple(names), num_literal=num_literal, regex=re.compile(regex))

    def match(self, name: str) -> dict[str, str] | None:
        """Return the fields of a relative path, folders first; None if it does not match."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        folders = match.groupdict().get("folders")
        values = {"": folders.rstrip("/")} if folders else {}
        return values | {name: match[f"f{index}"] for index, name in enumerate(self.names)}
