"""Files, listings and downloads from this disk, web servers and buckets; all servers run on this machine."""

import hashlib
import http.server
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dinocell.errors import ImageError
from dinocell.images.storage import bucket_options, copy_remote, download, file_exists, open_bytes


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
