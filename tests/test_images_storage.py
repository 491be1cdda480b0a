"""Bytes from web servers and buckets that fail now and then; real addresses in tests are on this machine."""

import hashlib
import http.server
import io
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dinocell.errors import ImageError
from dinocell.images import storage as locations
from dinocell.images.storage import bucket_options, download, open_bytes, web_file_exists
from helpers.servers import serving


@contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler, int], None]) -> Iterator[tuple[str, list[str]]]:
    """Serve with a function of the request and its number; yield the root address and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self, len(asked))

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as root:
        yield root, asked


def reply(request: http.server.BaseHTTPRequestHandler, status: int, content: bytes = b"", promised: int = -1) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(promised if promised >= 0 else len(content)))
    request.end_headers()
    request.wfile.write(content)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(locations.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again_after_growing_pauses(status: int, pauses: list[float]) -> None:
    with server(lambda request, number: reply(request, status if number < 4 else 200, b"pixels")) as (root, asked):
        assert open_bytes(f"{root}/a.tif") == b"pixels"
    assert len(asked) == 4
    assert pauses == sorted(set(pauses))
    assert len(pauses) == 3


def test_servers_that_stay_busy_are_given_up(pauses: list[float]) -> None:
    with server(lambda request, _: reply(request, 503)) as (root, asked), pytest.raises(ImageError, match="503"):
        open_bytes(f"{root}/a.tif")
    assert len(asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_is_missing_or_forbidden_is_not_asked_again(status: int, pauses: list[float]) -> None:
    with (
        server(lambda request, _: reply(request, status)) as (root, asked),
        pytest.raises(ImageError, match=str(status)),
    ):
        open_bytes(f"{root}/a.tif")
    assert len(asked) == 1
    assert pauses == []


@pytest.mark.parametrize("first", [None, 99])
def test_answers_that_break_off_are_asked_for_again(pauses: list[float], first: int | None) -> None:
    def answer(request: http.server.BaseHTTPRequestHandler, number: int) -> None:
        reply(request, 200, b"pix" if number == 1 else b"pixels", promised=6)

    with server(answer) as (root, asked):
        assert open_bytes(f"{root}/a.tif", first=first) == b"pixels"
    assert len(asked) == 2


def test_servers_that_are_not_there_are_asked_again_and_named(pauses: list[float]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tif"
        with pytest.raises(ImageError, match="refused") as caught:
            open_bytes(address)
    assert address in str(caught.value)
    assert len(pauses) == 3


def test_addresses_are_quoted_once(pauses: list[float]) -> None:
    with server(lambda request, _: reply(request, 200, b"pixels")) as (root, asked):
        open_bytes(f"{root}/größe 1/a%20b.tif?raw=1&x=%C3%B6")
    assert asked == ["/gr%C3%B6%C3%9Fe%201/a%20b.tif?raw=1&x=%C3%B6"]


def test_whether_a_web_file_exists(pauses: list[float]) -> None:
    statuses = {"/there": 200, "/gone": 404, "/hidden": 403, "/broken": 500, "/odd": 400}
    with server(lambda request, _: reply(request, statuses[request.path])) as (root, asked):
        assert web_file_exists(f"{root}/there")
        assert not web_file_exists(f"{root}/gone")
        assert not web_file_exists(f"{root}/hidden")
        for name in ("broken", "odd"):
            with pytest.raises(ImageError, match=str(statuses[f"/{name}"])):
                web_file_exists(f"{root}/{name}")
    assert asked.count("/broken") == 4
    assert asked.count("/odd") == 1


def outages() -> list[Exception]:
    """Return what buckets raise that do not answer; s3fs lets the second kind through, which is no OSError."""
    try:
        from botocore.exceptions import EndpointConnectionError
    except ImportError:
        return [TimeoutError("slow down")]
    return [TimeoutError("slow down"), EndpointConnectionError(endpoint_url="http://127.0.0.1:9")]


@pytest.mark.parametrize("outage", outages(), ids=lambda error: type(error).__name__)
def test_buckets_that_fail_now_and_then_are_asked_again(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outage: Exception
) -> None:
    import fsspec

    tries: list[str] = []

    class Shaky:
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
    # Of a large file, whoever downloads it tries again.
    tries.clear()
    with (tmp_path / "b").open("wb") as file:
        for _ in range(2):
            with pytest.raises(ImageError, match=r"memory://a/b: cannot be opened"):
                download("memory://a/b", file, num_bytes=6)
        assert download("memory://a/b", file, num_bytes=6) == hashlib.sha256(b"pixels").hexdigest()


def test_missing_and_forbidden_objects_are_not_asked_for_again(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    for error in (FileNotFoundError("x"), PermissionError("Access Denied")):

        class Refusing:
            raised = error

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


def test_local_files_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "ä b.bin").write_bytes(b"pixels")
    assert open_bytes(f"file://{tmp_path}/%C3%A4%20b.bin") == b"pixels"


def test_the_start_of_a_file_is_read_alone(tmp_path: Path, pauses: list[float]) -> None:
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
