"""Files, listings and downloads from this disk, web servers and buckets; all servers run on this machine."""

import hashlib
import http.server
import io
import os
import socket
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dinocell.errors import ImageError
from dinocell.images import storage
from dinocell.images.storage import (
    Listed,
    base_name,
    bucket_options,
    copy_remote,
    download,
    file_exists,
    folder_exists,
    join,
    list_files,
    open_bytes,
    parent,
)


@contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler, int], None]) -> Iterator[tuple[str, list[str]]]:
    """Serve with a function of the request and its index; yield the root address and the requested paths."""
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            answer(self, len(requested))

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", requested
        running.shutdown()
        thread.join()


def reply(request: http.server.BaseHTTPRequestHandler, status: int, content: bytes = b"", promised: int = -1) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(promised if promised >= 0 else len(content)))
    request.end_headers()
    request.wfile.write(content)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_busy_servers_are_retried_after_growing_pauses(status: int, pauses: list[float]) -> None:
    with server(lambda request, index: reply(request, status if index < 4 else 200, b"pixels")) as (root, requested):
        assert open_bytes(f"{root}/a.tif") == b"pixels"
    assert len(requested) == 4
    assert pauses == sorted(set(pauses))
    assert len(pauses) == 3


def test_retries_end_after_four_attempts(pauses: list[float]) -> None:
    with server(lambda request, _: reply(request, 503)) as (root, requested), pytest.raises(ImageError, match="503"):
        open_bytes(f"{root}/a.tif")
    assert len(requested) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_missing_and_forbidden_files_are_not_retried(status: int, pauses: list[float]) -> None:
    with (
        server(lambda request, _: reply(request, status)) as (root, requested),
        pytest.raises(ImageError, match=str(status)),
    ):
        open_bytes(f"{root}/a.tif")
    assert len(requested) == 1
    assert pauses == []


@pytest.mark.parametrize("first", [None, 99])
def test_incomplete_answers_are_retried(pauses: list[float], first: int | None) -> None:
    def answer(request: http.server.BaseHTTPRequestHandler, number: int) -> None:
        reply(request, 200, b"pix" if number == 1 else b"pixels", promised=6)

    with server(answer) as (root, requested):
        assert open_bytes(f"{root}/a.tif", first=first) == b"pixels"
    assert len(requested) == 2


def test_unreachable_servers_are_retried_and_named(pauses: list[float]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tif"
        with pytest.raises(ImageError, match="refused") as caught:
            open_bytes(address)
    assert address in str(caught.value)
    assert len(pauses) == 3


def test_addresses_are_quoted_once(pauses: list[float]) -> None:
    with server(lambda request, _: reply(request, 200, b"pixels")) as (root, requested):
        open_bytes(f"{root}/größe 1/a%20b.tif?raw=1&x=%C3%B6")
    assert requested == ["/gr%C3%B6%C3%9Fe%201/a%20b.tif?raw=1&x=%C3%B6"]


def test_web_files_exist_unless_the_server_answers_403_or_404(pauses: list[float]) -> None:
    statuses = {"/there": 200, "/gone": 404, "/hidden": 403, "/broken": 500, "/odd": 400}
    with server(lambda request, _: reply(request, statuses[request.path])) as (root, requested):
        assert file_exists(f"{root}/there")
        assert not file_exists(f"{root}/gone")
        assert not file_exists(f"{root}/hidden")
        for name in ("broken", "odd"):
            with pytest.raises(ImageError, match=str(statuses[f"/{name}"])):
                file_exists(f"{root}/{name}")
    assert requested.count("/broken") == 4
    assert requested.count("/odd") == 1


def test_a_download_is_complete_or_absent_and_reports_its_progress(pauses: list[float], tmp_path: Path) -> None:
    def answer(request: http.server.BaseHTTPRequestHandler, index: int) -> None:
        reply(request, 503 if index == 1 else 200, b"pix" if index == 2 else b"pixels", promised=6)

    progress: list[tuple[int, int | None]] = []
    with server(answer) as (root, requested):
        digest = download(f"{root}/a.pt?key=secret", tmp_path / "a.pt", progress=lambda *state: progress.append(state))
        assert len(requested) == 3
        assert digest == hashlib.sha256(b"pixels").hexdigest()
        assert progress == [(3, 6), (6, 6)]
        with pytest.raises(ImageError, match=r"a\.pt: larger than .* 5 bytes"):
            download(f"{root}/a.pt", tmp_path / "b.pt", max_bytes=5)
    with (
        server(lambda request, _: reply(request, 404)) as (root, requested),
        pytest.raises(ImageError, match=r"^weights: .*404"),
    ):
        download(f"{root}/a.pt", tmp_path / "b.pt", shown="weights")
    assert len(requested) == 1
    assert (tmp_path / "a.pt").read_bytes() == b"pixels"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_download_that_cannot_be_written_is_not_retried(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        server(lambda request, _: reply(request, 200, b"pixels")) as (root, requested),
        pytest.raises(OSError, match="No space"),
    ):
        download(f"{root}/a.pt", tmp_path / "a.pt", progress=full)
    assert len(requested) == 1
    assert list(tmp_path.iterdir()) == []


def outages() -> list[Exception]:
    """Return what buckets raise that do not answer; s3fs lets the second kind through, which is no OSError."""
    try:
        from botocore.exceptions import EndpointConnectionError
    except ImportError:
        return [TimeoutError("slow down")]
    return [TimeoutError("slow down"), EndpointConnectionError(endpoint_url="http://127.0.0.1:9")]


@pytest.mark.parametrize("outage", outages(), ids=lambda error: type(error).__name__)
def test_bucket_outages_are_retried(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outage: Exception
) -> None:
    import fsspec

    tries: list[str] = []

    class Shaky:
        def invalidate_cache(self) -> None: ...

        def cat_file(self, path: str) -> bytes:
            tries.append(path)
            if len(tries) < 3:
                raise outage
            return b"pixels"

        def open(self, path: str, *_: object, **__: object) -> io.BytesIO:
            return io.BytesIO(self.cat_file(path))

    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (Shaky(), url))
    assert open_bytes("memory://a/b") == b"pixels"
    assert len(tries) == 3
    tries.clear()
    with (tmp_path / "b").open("wb") as file:
        for _ in range(2):
            with pytest.raises(ImageError, match=r"memory://a/b"):
                copy_remote("memory://a/b", file, num_bytes=6)
        assert copy_remote("memory://a/b", file, num_bytes=6) == hashlib.sha256(b"pixels").hexdigest()
    tries.clear()
    assert download("memory://a/b", tmp_path / "c") == hashlib.sha256(b"pixels").hexdigest()
    assert len(tries) == 3


def test_missing_and_forbidden_objects_are_not_retried(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    for error in (FileNotFoundError("x"), PermissionError("Access Denied")):

        class Refusing:
            raised = error

            def invalidate_cache(self) -> None: ...

            def cat_file(self, path: str) -> bytes:
                raise self.raised

        monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (Refusing(), url))
        with pytest.raises(ImageError, match=r"no such file|Access Denied"):
            open_bytes("memory://a/b")
    assert pauses == []


def test_public_buckets_are_read_without_signing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert bucket_options("s3://cellpainting-gallery/x")["anon"] is True
    assert bucket_options("memory://x") == {}
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert bucket_options("s3://cellpainting-gallery/x")["anon"] is False


def test_local_files_are_read_by_address(tmp_path: Path) -> None:
    (tmp_path / "ä b.bin").write_bytes(b"pixels")
    assert open_bytes(f"file://{tmp_path}/%C3%A4%20b.bin") == b"pixels"


def test_first_reads_the_start_of_a_file(tmp_path: Path, pauses: list[float]) -> None:
    import fsspec

    content = bytes(range(250))
    (tmp_path / "a.bin").write_bytes(content)
    with fsspec.open("memory://locations/a.bin", "wb") as file:
        file.write(content)
    with server(lambda request, _: reply(request, 200, content)) as (root, _):
        for address in (str(tmp_path / "a.bin"), "memory://locations/a.bin", f"{root}/a.bin"):
            assert open_bytes(address, first=7) == content[:7]
            assert open_bytes(address, first=999) == content
            assert open_bytes(address) == content


# Listing.


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

    monkeypatch.setattr(storage, "_store", lambda address: (Store(), address.removeprefix("own://")))
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
