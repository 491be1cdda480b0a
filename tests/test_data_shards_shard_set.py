"""The cache of remote shards: right content or none, one download for all, bounded, and patient with the network."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from dinocell.data_shards import shard_set as cache_module
from dinocell.data_shards.inspect import verify
from dinocell.data_shards.manifest import Shard
from dinocell.data_shards.read import loader, stream
from dinocell.data_shards.shard_set import ShardCache, check_cache_size
from dinocell.errors import ShardError
from helpers.servers import serving


class Server:
    """A web server of one folder that counts requests and can be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.failures, self.cut_at = folder, [], 0, None
        self.cut_shards_at: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path.lstrip("/"))
                path = server.folder / unquote(urlsplit(self.path).path.lstrip("/"))
                if server.failures:
                    server.failures -= 1
                    self.send_error(503)
                    return
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: server.cut_shards_at if path.suffix == ".tar" else None][: server.cut_at])
                server.cut_at = None

            def log_message(self, *_: object) -> None:
                pass

        self.running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.running.server_port}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(cache_module, "_FIRST_WAIT_S", 0.01)
    (tmp_path / "web").mkdir()
    server = Server(tmp_path / "web")
    with serving(server.running):
        yield server


def put(server: Server, name: str, content: bytes) -> Shard:
    (server.folder / name).write_bytes(content)
    return Shard(file=name, num_samples=1, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_a_copy_is_fetched_once_and_is_right(server: Server, tmp_path: Path) -> None:
    shard = put(server, "a.tar", os.urandom(9_000_000))
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: cache.fetch(f"{server.address}/a.tar", shard), range(16)))
    assert server.requests == ["a.tar"]
    assert copies.pop().read_bytes() == (server.folder / "a.tar").read_bytes()


def test_failures_are_tried_again(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = put(server, "a.tar", os.urandom(5000))
    server.failures, server.cut_at = 2, 1000
    copy = ShardCache(tmp_path / "cache", max_bytes=10**9).fetch(f"{server.address}/a.tar", shard)
    assert copy.read_bytes() == (server.folder / "a.tar").read_bytes()
    assert len(server.requests) == 4
    assert "503" in caplog.text
    assert "trying again" in caplog.text


def test_a_permanent_failure_is_an_error_and_leaves_no_file(server: Server, tmp_path: Path) -> None:
    shard = put(server, "a.tar", b"good")
    (server.folder / "a.tar").write_bytes(b"evil")
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    with pytest.raises(ShardError, match=r"a.tar: .*its content differs"):
        cache.fetch(f"{server.address}/a.tar", shard)
    with pytest.raises(ShardError, match="404"):
        cache.fetch(f"{server.address}/b.tar", shard)
    assert not [path for path in cache.folder.iterdir() if path.suffix != ".lock"]


def test_a_copy_that_was_cut_short_is_fetched_again(server: Server, tmp_path: Path) -> None:
    shard = put(server, "a.tar", os.urandom(5000))
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    copy = cache.fetch(f"{server.address}/a.tar", shard)
    copy.write_bytes(copy.read_bytes()[:700])  # as a full disk or a power cut may leave it
    assert cache.fetch(f"{server.address}/a.tar", shard).read_bytes() == (server.folder / "a.tar").read_bytes()
    assert len(server.requests) == 2


def test_a_file_that_is_longer_than_its_shard_does_not_fill_the_disk(server: Server, tmp_path: Path) -> None:
    shard = put(server, "a.tar", b"good")
    (server.folder / "a.tar").write_bytes(bytes(1 << 20))
    with pytest.raises(ShardError, match="4 bytes"):
        ShardCache(tmp_path / "cache", max_bytes=10**9).fetch(f"{server.address}/a.tar", shard)


def test_verify_distinguishes_an_aborted_download_from_a_damaged_shard(server: Server, shard_set: Path) -> None:
    server.folder = shard_set
    server.cut_shards_at = 3000
    problems = verify(server.address)
    assert {problem.what.split(" (")[0] for problem in problems} == {"cannot be read"}
    assert "broke off" in problems[0].what


def test_the_least_recently_used_copies_are_deleted(server: Server, tmp_path: Path) -> None:
    shards = [put(server, f"{number}.tar", os.urandom(1000)) for number in range(5)]
    cache = ShardCache(tmp_path / "cache", max_bytes=3000)
    for number in (0, 1, 2, 0, 3, 0, 4):
        cache.fetch(f"{server.address}/{number}.tar", shards[number])
        time.sleep(0.01)
    kept = {path.stem for path in cache.folder.glob("*.tar")}
    assert kept == {shards[number].sha256 for number in (0, 3, 4)}
    assert server.requests == [f"{number}.tar" for number in (0, 1, 2, 3, 4)]


def test_a_copy_that_is_being_read_can_be_deleted(server: Server, tmp_path: Path) -> None:
    first, second = (put(server, f"{number}.tar", os.urandom(1000)) for number in range(2))
    cache = ShardCache(tmp_path / "cache", max_bytes=1000)
    with cache.fetch(f"{server.address}/0.tar", first).open("rb") as file:
        cache.fetch(f"{server.address}/1.tar", second)
        assert file.read() == (server.folder / "0.tar").read_bytes()


def test_leftovers_of_a_killed_download_are_deleted(server: Server, tmp_path: Path) -> None:
    shard = put(server, "a.tar", b"x" * 100)
    cache = ShardCache(tmp_path / "cache", max_bytes=150)
    cache.folder.mkdir()
    for name in ("dead", "alive"):
        (cache.folder / f"{name}.part").write_bytes(b"half")
    with (cache.folder / "alive.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.fetch(f"{server.address}/a.tar", shard)
    assert {path.name for path in cache.folder.glob("*.part")} == {"alive.part"}


def test_downloads_at_the_same_time_stay_within_the_bound(server: Server, tmp_path: Path) -> None:
    shards = [put(server, f"{number}.tar", os.urandom(100_000)) for number in range(12)]
    cache = ShardCache(tmp_path / "cache", max_bytes=500_000)
    most = 0

    def fetch(number: int) -> None:
        nonlocal most
        cache.fetch(f"{server.address}/{number}.tar", shards[number])
        most = max(most, 100_000 * len(list(cache.folder.glob("*.tar"))))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(12)))
    assert 100_000 < most <= 500_000


def test_a_cache_too_small_for_three_blocks_is_rejected(tmp_path: Path) -> None:
    shards = tuple(Shard(file=f"{n}.tar", num_samples=1, num_bytes=10**9, sha256="0" * 64) for n in range(100))
    with pytest.raises(ShardError, match=r"cache size 50.0 GB.*60.0 GB"):
        check_cache_size(ShardCache(tmp_path, max_bytes=50 * 10**9), shards, 20)
    with pytest.raises(ShardError, match="free disk space"):
        check_cache_size(ShardCache(tmp_path / "a" / "b", max_bytes=10**18), (replace(shards[0], num_bytes=10**17),), 1)
    check_cache_size(ShardCache(tmp_path, max_bytes=50 * 10**9), shards[:3], 1)


def test_copies_removed_by_another_process_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "gone.tar").symlink_to(tmp_path / "removed")  # listed, and not there when it is looked at
    shard = Shard(file="a.tar", num_samples=1, num_bytes=100, sha256="0" * 64)
    check_cache_size(ShardCache(tmp_path, max_bytes=10**6), (shard,), block_shards=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_reads_like_the_local_one(server: Server, shard_set: Path, tmp_path: Path, workers: int) -> None:
    server.folder = shard_set
    options = {"batch_size": 4, "stop": 120, "seed": 3, "block_shards": 2}
    local = list(stream(shard_set, **options))
    size = sum(path.stat().st_size for path in shard_set.glob("*.tar"))
    remote = stream(server.address, cache=tmp_path / "cache", cache_gb=0.7 * size / 1e9, **options)
    for ours, theirs in zip(loader(remote, workers=workers), local, strict=True):
        assert ours.origins == theirs.origins
        assert ours.infos == theirs.infos
        assert (ours.storage == theirs.storage).all()
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
    assert held <= 0.7 * size


@pytest.mark.parametrize("place", ["my set é", "my%20set%20%C3%A9", "my set é/?signature=a/b%3D"])
def test_web_addresses_may_have_spaces_and_queries(server: Server, shard_set: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(shard_set, server.folder / "my set é")
    address = f"{server.address}/{place}"
    assert verify(address) == []
    for batch in stream(address, batch_size=20, stop=60, cache=tmp_path / "cache"):
        assert not batch.damaged
    assert all(("?signature=a/b%3D" in request) == ("?" in place) for request in server.requests)


def test_a_file_address_is_a_local_folder(shard_set: Path) -> None:
    address = f"file://{shard_set}"
    assert verify(address) == []
    [batch] = stream(address, batch_size=60, stop=60)
    assert len(batch) == 60
    (shard_set / "manifest.json").unlink()
    with pytest.raises(ShardError, match="no shard set"):
        stream(address, batch_size=1)


def test_a_remote_set_needs_a_cache(server: Server, shard_set: Path) -> None:
    server.folder = shard_set
    with pytest.raises(ShardError, match="a remote set needs a cache"):
        stream(server.address, batch_size=1)


def test_a_web_address_without_a_set_is_an_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest.json: .*404"):
        stream(server.address, batch_size=1, cache=tmp_path / "cache")


def test_s3_as_a_public_bucket_serves_it(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        running.start()
    try:
        host, port = running.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        import boto3

        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        )
        client.create_bucket(Bucket="cells", ACL="public-read")
        for path in shard_set.iterdir():
            client.put_object(Bucket="cells", Key=f"jump/{path.name}", Body=path.read_bytes(), ACL="public-read")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        want = list(stream(shard_set, batch_size=6, stop=60))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = list(stream("s3://cells/jump", batch_size=6, stop=60, cache=tmp_path / "cache"))
        assert [batch.origins for batch in got] == [batch.origins for batch in want]
        assert all((ours.storage == theirs.storage).all() for ours, theirs in zip(got, want, strict=True))
    finally:
        running.stop()
