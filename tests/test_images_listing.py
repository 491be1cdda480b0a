"""Listings of folders and buckets, paths and addresses, and patterns of names."""

import os
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinocell.errors import ImageError
from dinocell.images import listing
from dinocell.images.listing import Listed, NamePattern, base_name, join, list_files, parent
from dinocell.images.storage import file_exists, folder_exists, open_bytes


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names(address: str | Path, **options: tuple[str, ...]) -> list[str]:
    return [file.name for file in list_files(address, **options)]


def test_files_are_listed_sorted_with_paths_that_open(tmp_path: Path) -> None:
    touch(tmp_path, "b.tif", "a/2.tif", "a/10.tif", "a b/größe µ.tif", "a-b.tif")
    listed = list_files(tmp_path)
    assert [file.name for file in listed] == ["a b/größe µ.tif", "a-b.tif", "a/10.tif", "a/2.tif", "b.tif"]
    for file in listed:
        assert open_bytes(file.path).decode() == file.name
    assert list_files(str(tmp_path) + "/") == [Listed(file.name, file.path.replace("//", "/")) for file in listed]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{folder}/{number}.tif" for folder in "abc" for number in range(20)))
    before = list_files(tmp_path)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert list_files(tmp_path) == before


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a.tif", "._a.tif", ".snapshot/a.tif", "b/.DS_Store")
    assert names(tmp_path) == ["a.tif"]


def test_a_folder_may_itself_be_hidden(tmp_path: Path) -> None:
    touch(tmp_path, ".data/a.tif")
    assert names(tmp_path / ".data") == ["a.tif"]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.tif", "elsewhere/b.tif")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.tif").symlink_to(tmp_path / "nowhere.tif")
    assert names(tmp_path / "in") == ["a.tif", "broken.tif", "link/b.tif"]


def test_folders_that_are_one_input_are_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "a.zarr/0/0/0", "b/c.ZARR/x", "d.tif")
    assert names(tmp_path, folders_as_files=(".zarr",)) == ["a.zarr", "b/c.ZARR", "d.tif"]
    assert names(tmp_path / "a.zarr", folders_as_files=(".zarr",)) == ["a.zarr"]
    assert names(tmp_path) == ["a.zarr/0/0/0", "b/c.ZARR/x", "d.tif"]


def test_one_file_is_a_listing_of_one(tmp_path: Path) -> None:
    touch(tmp_path, "a b.tif")
    assert list_files(tmp_path / "a b.tif") == [Listed("a b.tif", str(tmp_path / "a b.tif"))]
    assert list_files("https://example.org/x/a%20b.tif?raw=1") == [
        Listed("a b.tif", "https://example.org/x/a%20b.tif?raw=1")
    ]


def test_names_are_in_nfc_and_two_forms_of_one_name_are_an_error(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "größe.tif")
    touch(tmp_path, decomposed)
    (listed,) = list_files(tmp_path)
    assert listed.name == "größe.tif" != decomposed
    assert open_bytes(listed.path)
    touch(tmp_path, "größe.tif")
    with pytest.raises(ImageError, match=r"gr.+e\.tif and .*gr.+e\.tif") as caught:
        list_files(tmp_path)
    assert str(caught.value).count(str(tmp_path)) == 2


def test_what_cannot_be_listed_is_named(tmp_path: Path) -> None:
    for address, message in (
        (tmp_path / "none", "no such folder"),
        ("https://example.org/folder/", "cannot be listed"),
        ("https://example.org/folder", "cannot be listed"),
        ("nothing://bucket/x", "nothing"),
        ("memory://no/such", "no such folder"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            list_files(address)
        assert str(address) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_names_that_are_not_unicode_are_an_error(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tif"))).write_bytes(b"")
    with pytest.raises(ImageError, match=r"caf\\xe9.tif is not Unicode"):
        list_files(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_folders_without_permission_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "closed/a.tif")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(ImageError, match="closed: cannot be listed"):
            list_files(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_folder_that_fails_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.tif")

    def fail(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ImageError, match="cannot be listed \\(Permission denied\\)"):
        list_files(tmp_path)


def test_other_stores_are_listed_through_fsspec() -> None:
    fsspec = pytest.importorskip("fsspec")
    for name in ("a/1.tif", "b 2.tif", ".hidden", "z.zarr/0/0"):
        with fsspec.open(f"memory://listing/plates/{name}", "wb") as file:
            file.write(b"x")
    assert names("memory://listing/plates") == ["a/1.tif", "b 2.tif", "z.zarr/0/0"]
    assert names("memory://listing/plates/", folders_as_files=(".zarr",)) == ["a/1.tif", "b 2.tif", "z.zarr"]
    assert open_bytes(list_files("memory://listing/plates")[0].path) == b"x"
    assert folder_exists("memory://listing/plates/a")
    assert not folder_exists("memory://listing/plates/c")
    assert file_exists("memory://listing/plates/a/1.tif")
    assert not file_exists("memory://listing/plates/a")


def test_stores_that_list_a_folder_in_itself_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def ls(self, path: str, detail: bool) -> list[dict[str, str]]:
            inner = {"top": [("top/a", "directory"), ("top/b.tif", "file")], "top/a": [("top/a/c.tif", "file")]}[path]
            return [{"name": name, "type": kind} for name, kind in [(f"{path}/", "directory"), *inner]]

    monkeypatch.setattr(listing, "open_store", lambda address: (Store(), address.removeprefix("own://")))
    assert names("own://top", folders_as_files=(".zarr",)) == ["a/c.tif", "b.tif"]


def test_paths_and_addresses_are_joined_and_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert join("/data", "a", "b.tif") == "/data/a/b.tif"
    assert join("s3://bucket/x/", "a b", "ö.tif") == "s3://bucket/x/a b/ö.tif"
    assert join("https://example.org/x", "a b", "#1.tif") == "https://example.org/x/a%20b/%231.tif"
    assert base_name("/data/plate 1/") == "plate 1"
    assert base_name("s3://bucket/plate") == "plate"
    assert base_name("s3://bucket") == "bucket"
    assert base_name("https://example.org/a%20b.csv?x=/y") == "a b.csv"
    assert parent("s3://bucket/x/t.csv") == "s3://bucket/x"
    assert parent("https://example.org/x/t.csv") == "https://example.org/x"
    monkeypatch.chdir(tmp_path)
    assert base_name(".") == tmp_path.name
    assert parent("t.csv") == str(tmp_path)


def test_web_files_are_found_and_web_folders_are_not_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002

    touch(tmp_path, "a b.tif")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        root = f"http://127.0.0.1:{server.server_port}"
        found = [file_exists(join(root, name)) for name in ("a b.tif", "b.tif")]
        server.shutdown()
        thread.join()
    assert found == [True, False]
    with pytest.raises(ImageError, match="cannot be fetched"):
        file_exists(f"{root}/a.tif")
    assert not folder_exists(root)


def test_an_invalid_web_address_is_named() -> None:
    with pytest.raises(ImageError, match=r"https://\[bad: no web address"):
        list_files("https://[bad")


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "image*.tif",
        "{well.tif",
        "well}.tif",
        "{{well}}.tif",
        "{}.tif",
        "{1st}.tif",
        "{a-b}.tif",
        "{a b}.tif",
        "{well}/**/{site}.tif",
        "/data/{well}.tif",
        "s3://bucket/{well}.tif",
    ],
)
def test_invalid_patterns_are_rejected(pattern: str) -> None:
    with pytest.raises(ImageError) as caught:
        NamePattern.parse(pattern)
    assert repr(pattern) in str(caught.value)


NAME_PARTS = st.text(
    st.characters(blacklist_characters="/{}*", blacklist_categories=("Cs", "Cc")), min_size=1, max_size=6
)


@given(values=st.lists(NAME_PARTS, min_size=1, max_size=4), literals=st.lists(NAME_PARTS, min_size=5, max_size=5))
def test_patterns_match_names_made_from_them_and_return_their_fields(
    values: Sequence[str], literals: Sequence[str]
) -> None:
    values = [unicodedata.normalize("NFC", value) for value in values]
    pattern = "/".join(f"{literal}{{f{index}}}" for index, literal in zip(range(len(values)), literals, strict=False))
    name = "/".join(literal + value for literal, value in zip(literals, values, strict=False))
    fields = NamePattern.parse(pattern).match(unicodedata.normalize("NFC", name))
    if (
        unicodedata.is_normalized("NFC", name)
        and unicodedata.is_normalized("NFC", pattern)
        and not pattern.startswith("./")
    ):
        assert fields == {f"f{index}": value for index, value in enumerate(values)}
    assert NamePattern.parse(pattern).match(name + "/x") is None


def test_a_repeated_field_must_match_the_same_text() -> None:
    pattern = NamePattern.parse("{plate}/{plate}_{well}.tif")
    assert pattern.match("P1/P1_A01.tif") == {"plate": "P1", "well": "A01"}
    assert pattern.match("P1/P2_A01.tif") is None


def test_a_star_matches_the_empty_string_but_no_folder() -> None:
    pattern = NamePattern.parse("{well}_*.tif")
    assert pattern.match("A01_.tif") == {"well": "A01"}
    assert pattern.match("A01_x_y.tif") == {"well": "A01"}
    assert pattern.match("A01_x/y.tif") is None


def test_the_more_specific_of_two_patterns_has_more_literal_characters() -> None:
    assert NamePattern.parse("{name}_mask.tif").num_literal == 9 > NamePattern.parse("{name}.tif").num_literal == 4
