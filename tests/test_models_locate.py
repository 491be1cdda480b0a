"""`locate`: every way to name weights, and every error."""

import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from dinocell.errors import WeightsError
from dinocell.models import locate as module
from dinocell.models.locate import RELEASES, locate, sha256_of
from helpers.servers import serving

BODY = b"not really a tensor" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Reply:
    """The answer of the loopback server to one request; `length` is the announced size of the body."""

    status: int = 200
    body: bytes = BODY
    length: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    """A loopback server: replies by path, the last one repeated; it records the requests."""

    replies: dict[str, list[Reply]]
    requests: list[str]

    def address(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        waiting = self.server.replies.get(path, [Reply(404, b"")])
        reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
        for key, value in reply.headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(reply.body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), _Handler)
    server.replies, server.requests = defaultdict(lambda: [Reply(404, b"")]), []
    with serving(server):
        yield server


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every lookup inside `tmp_path` and off the network; return the weights folder."""
    folder, here = tmp_path / "weights", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("DINOCELL_WEIGHTS", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "_BACKOFF_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its own retries
    return folder


def problem(source: str | Path, **options: str) -> str:
    """Return the error of `locate`, which is always one line that names the source."""
    with pytest.raises(WeightsError) as caught:
        locate(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source).split("?")[0].split("#")[0] in message
    return message


def put(*path: str | Path, body: bytes = BODY) -> Path:
    file = Path(*path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(body)
    return file


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Paths


def test_an_existing_file_is_returned_with_its_home_expanded(tmp_path: Path) -> None:
    file = put(tmp_path, "runs", "teacher.pth")
    assert locate(file) == file
    assert locate(str(file)) == file
    assert locate("~/runs/teacher.pth") == file
    assert locate("../runs/teacher.pth").samefile(file)


def test_sha256_of_a_local_file_is_checked_in_either_case(tmp_path: Path) -> None:
    file = put(tmp_path, "teacher.pth")
    assert locate(file, sha256=SHA256.upper()) == file
    message = problem(file, sha256="0" * 64)
    assert "0" * 64 in message
    assert SHA256 in message


def test_a_sha256_that_is_not_64_hex_digits_is_refused(tmp_path: Path) -> None:
    assert "64 hex digits" in problem(put(tmp_path, "teacher.pth"), sha256="08c60483")


def test_a_hugging_face_folder_is_returned(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "optimizer.pt"):
        put(tmp_path, "model", name)
    assert locate(tmp_path / "model") == tmp_path / "model"


def test_a_folder_with_one_weights_file_of_its_own_name_gives_the_file(tmp_path: Path) -> None:
    put(tmp_path, "training_100", "config.json")
    file = put(tmp_path, "training_100", "teacher_checkpoint.pth")
    assert locate(tmp_path / "training_100") == file


def test_a_sharded_folder_needs_every_shard(tmp_path: Path) -> None:
    folder = put(tmp_path, "model", "config.json").parent
    put(folder, "model-00001-of-00002.safetensors")
    assert "2 shards, got 1" in problem(folder)
    put(folder, "model-00002-of-00002.safetensors")
    assert locate(folder) == folder


def test_a_folder_without_weights_or_with_several_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path, "run", "notes.txt").parent
    assert ".safetensors" in problem(folder)
    put(folder, "a.pth")
    put(folder, "b.pth")
    assert "a.pth, b.pth; give the name of one" in problem(folder)


def test_a_training_state_is_refused_and_the_exported_teacher_named(tmp_path: Path) -> None:
    folder = put(tmp_path, "ckpt", ".metadata").parent
    put(folder, "__0_0.distcp")
    assert "teacher_checkpoint.pth" in problem(folder)


def test_a_sha256_for_a_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "model", "model.safetensors")
    folder = put(tmp_path, "model", "config.json").parent
    assert "one file" in problem(folder, sha256=SHA256)


def test_a_missing_path_gets_the_nearest_name_in_its_folder(tmp_path: Path) -> None:
    file = put(tmp_path, "runs", "teacher_checkpoint.pth")
    message = problem(tmp_path / "runs" / "teacher_chekpoint.pth")
    assert "no such file" in message
    assert str(file) in message
    put("teacher.pth")
    assert "did you mean 'teacher.pth'" in problem("teachr.pth")
    assert f"nor the folder {str(tmp_path / 'nowhere')!r}" in problem(tmp_path / "nowhere" / "x.pth")


def test_owner_slash_name_that_is_no_path_suggests_the_hub_address() -> None:
    Path("facebook").mkdir()
    assert "hf://facebook/dinov2-small" in problem("facebook/dinov2-small")


def test_a_path_that_cannot_be_read_is_refused_in_one_line() -> None:
    assert "cannot be read" in problem("x" * 300)
    assert "cannot be read" in problem("~nobody-of-this-name/x.pth")


@pytest.mark.parametrize("source", ["file:///weights.pth", "s3://bucket/x.pth", "hf:/owner/name", "https:/host/x.pth"])
def test_other_schemes_and_lost_slashes_are_refused(source: str) -> None:
    assert "expected a path, hf://, http:// or https://" in problem(source)


def test_an_empty_name_is_refused() -> None:
    assert "no such file" in problem("")


# Bare names


def test_a_bare_name_is_an_existing_path_first_then_in_the_weights_folder(weights: Path) -> None:
    put(weights, "my_teacher")
    assert locate("my_teacher") == weights / "my_teacher"
    put("my_teacher")
    assert locate("my_teacher") == Path("my_teacher")


def test_a_bare_name_prefers_the_very_name_then_a_suffix_then_a_release_file(weights: Path) -> None:
    for name in ("my_teacher_pretrain_cells-0123abcd.pth", "my_teacher.safetensors", "my_teacher"):
        file = put(weights, name)
        assert locate("my_teacher") == file


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov3_vits16", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"),
        ("dinov3_vits16plus", "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth"),
        ("dinov3_vitl16", "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth"),
        ("dinov3_vitl16_sat", "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"),
        ("dinov2_vits14", "dinov2_vits14_pretrain.pth"),
        ("dinov2_vits14_reg", "dinov2_vits14_reg4_pretrain.pth"),
        ("cell_dino_cp_vits8", "cell_dino_vits8_pretrain_cp-37d20e9c.pth"),
        ("cell_dino_hpa_vitl16", "cell_dino_vitl16_pretrain_hpa_sc-d3ab8938.pth"),
        ("channel_adaptive_dino_vitl16", "channel_adaptive_dino_vitl16_pretrain_cells-ef7c17ff.pth"),
        ("dinov3_vitb16", "dinov3_vitb16-73cec8be.pth"),
        ("my_teacher", "my_teacher-0123abcd.safetensors"),
    ],
)
def test_a_name_finds_its_own_release_file_among_its_neighbours(weights: Path, name: str, file: str) -> None:
    for neighbour in (
        "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
        "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
        "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth",
        "dinov2_vits14_pretrain.pth",
        "dinov2_vits14_linear_head.pth",
        "dinov2_vits14_reg4_pretrain.pth",
        "dinov2_vits14_reg4_linear_head.pth",
        "my_teacher_old.pth",
        ".my_teacher.pth.0123abcd.part",
    ):
        put(weights, neighbour)
    put(weights, file)
    assert locate(name) == weights / file


def test_the_satellite_model_is_not_used_for_the_model_of_natural_images(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(weights, "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in problem("dinov3_vitl16")


def test_a_repository_folder_in_the_weights_folder_is_found_by_its_release_name(weights: Path) -> None:
    put(weights, "dinov3-vits16-pretrain-lvd1689m", "config.json")
    file = put(weights, "dinov3-vits16-pretrain-lvd1689m", "model.safetensors")
    assert locate("dinov3_vits16") == file.parent


def test_two_files_for_one_bare_name_are_listed(weights: Path) -> None:
    put(weights, "my_teacher.pth")
    put(weights, "my_teacher.safetensors")
    assert "my_teacher.pth, my_teacher.safetensors; give" in problem("my_teacher")


def test_an_unknown_name_lists_the_places_and_the_nearest_name(weights: Path) -> None:
    message = problem("dinov3_vits17")
    assert str(weights) in message
    assert "did you mean 'dinov3_vits16'" in message
    assert "hf://owner/name" in message
    put(weights, "my_teacher.pth")
    assert "did you mean 'my_teacher.pth'" in problem("my_taecher")


def test_the_weights_folder_defaults_to_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOCELL_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = put(tmp_path, "cache", "dinocell", "a.pth")
    assert locate("a") == file
    monkeypatch.delenv("XDG_CACHE_HOME")
    file = put(tmp_path, ".cache", "dinocell", "b.pth")
    assert locate("b") == file


def test_cell_dino_weights_must_be_downloaded_by_hand_from_their_page(weights: Path) -> None:
    message = problem("cell_dino_cp_vits8")
    assert "https://github.com/facebookresearch/dinov2" in message
    assert "DINOCELL_WEIGHTS" in message


def test_every_release_has_its_page_and_its_files() -> None:
    assert len(RELEASES) == 20
    assert RELEASES["dinov3_vit7b16_sat"].hub == "facebook/dinov3-vit7b16-pretrain-sat493m"
    assert RELEASES["dinov3_vith16plus"].hub == "facebook/dinov3-vith16plus-pretrain-lvd1689m"
    assert RELEASES["dinov2_vitg14_reg"].hub == "facebook/dinov2-with-registers-giant"
    assert RELEASES["dinov2_vitb14"].hub == "facebook/dinov2-base"
    assert all(release.page.startswith("https://") and release.file for release in RELEASES.values())


# URLs


def test_a_url_is_downloaded_once_and_then_found_without_a_request(server: Server, weights: Path) -> None:
    server.replies["/a/teacher.pth"] = [Reply()]
    url = server.address("/a/teacher.pth")
    file = locate(f"{url}#sha256={SHA256}")
    assert file == weights / f"teacher-{SHA256[:8]}.pth"
    assert file.read_bytes() == BODY
    assert locate(url, sha256=SHA256) == file
    assert server.requests == ["GET /a/teacher.pth"]
    assert names_in(weights) == [file.name]
    assert locate("teacher") == file


def test_the_start_of_the_hash_in_the_file_name_is_enough(server: Server, weights: Path) -> None:
    path = f"/dinov3_vits16_pretrain_lvd1689m-{SHA256[:8]}.pth"
    server.replies[path] = [Reply()]
    file = locate(server.address(path) + "?Signature=secret")
    assert file == weights / path[1:]
    assert locate("dinov3_vits16") == file


def test_a_damaged_file_in_the_weights_folder_is_fetched_again_when_the_whole_hash_is_known(
    server: Server, weights: Path
) -> None:
    path = f"/teacher-{SHA256[:8]}.pth"
    server.replies[path] = [Reply()]
    file = put(weights, path[1:], body=b"half")
    assert locate(server.address(path)) == file
    assert server.requests == []
    assert sha256_of(locate(server.address(path), sha256=SHA256)) == SHA256


def test_a_url_without_any_hash_is_refused_with_the_way_to_give_one(server: Server) -> None:
    url = server.address("/teacher.pth")
    assert f"{url}#sha256=<64 hex digits>" in problem(url)
    assert "64 hex digits" in problem(f"{url}#sha256=0123")
    assert server.requests == []


def test_two_hashes_that_differ_are_refused(server: Server) -> None:
    assert "drop the wrong one" in problem(server.address(f"/x.pth#sha256={SHA256}"), sha256="0" * 64)


def test_a_url_that_names_no_weights_file_is_refused(server: Server) -> None:
    for path in ("/download", "/weights.zip", "", "/a%2F..", "/x%0Ay.pth"):
        assert "expected a file ending in" in problem(server.address(path), sha256=SHA256)


def test_a_wrong_hash_names_both_and_leaves_nothing(server: Server, weights: Path) -> None:
    server.replies["/x.pth"] = [Reply(body=b"a login page")]
    server.replies["/x-20240131.pth"] = [Reply()]
    message = problem(server.address("/x.pth"), sha256=SHA256)
    assert f"expected sha256 {SHA256}" in message
    assert hashlib.sha256(b"a login page").hexdigest() in message
    assert "expected sha256 20240131" in problem(server.address("/x-20240131.pth"))
    assert server.requests == ["GET /x.pth", "GET /x-20240131.pth"]
    assert names_in(weights) == []


@pytest.mark.parametrize(("status", "advice"), [(404, "check it"), (403, "may have expired")])
def test_a_refusal_of_the_server_is_one_line_at_once_and_keeps_the_signature_secret(
    server: Server, weights: Path, status: int, advice: str
) -> None:
    server.replies["/x.pth"] = [Reply(status, b"")]
    message = problem(server.address("/x.pth?Signature=secret"), sha256=SHA256)
    assert f"HTTP {status}" in message
    assert advice in message
    assert "secret" not in message
    assert len(server.requests) == 1
    assert names_in(weights) == []


def test_a_download_is_repeated_after_errors_of_the_server(server: Server) -> None:
    server.replies["/x.pth"] = [Reply(503, b""), Reply(429, b""), Reply()]
    assert locate(server.address("/x.pth"), sha256=SHA256).read_bytes() == BODY
    assert len(server.requests) == 3


def test_an_incomplete_body_is_an_error_and_leaves_nothing(server: Server, weights: Path) -> None:
    server.replies["/x.pth"] = [Reply(body=BODY[:-7], length=len(BODY))]
    assert "incomplete" in problem(server.address("/x.pth"), sha256=SHA256)
    assert names_in(weights) == []


def test_a_server_that_does_not_answer_is_one_line() -> None:
    assert "failed 4 times" in problem("http://127.0.0.1:9/x.pth", sha256=SHA256)


def test_an_interrupted_download_leaves_nothing(server: Server, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.replies["/x.pth"] = [Reply()]

    def interrupted(*_: object) -> None:
        assert len(names_in(weights)) == 1
        assert module._in_weights_folder("x") is None
        raise KeyboardInterrupt

    monkeypatch.setattr("http.client.HTTPResponse.read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate(server.address("/x.pth"), sha256=SHA256)
    assert names_in(weights) == []


def test_a_malformed_url_is_refused_without_its_query() -> None:
    for address in ("http://[bad/x.pth", "http://127.0.0.1:port/x.pth", "http://127.0.0.1/a b.pth"):
        message = problem(f"{address}?Signature=secret", sha256=SHA256)
        assert "malformed" in message
        assert "secret" not in message


def test_a_weights_folder_that_cannot_be_written_names_the_variable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOCELL_WEIGHTS", str(put(tmp_path, "a_file")))
    server.replies["/x.pth"] = [Reply()]
    assert "set DINOCELL_WEIGHTS" in problem(server.address("/x.pth"), sha256=SHA256)


# The Hugging Face hub: the real library against a loopback hub, and against a cache made here


def serve_repository(server: Server, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    """Let `server` answer requests for the repository owner/name."""
    monkeypatch.setattr(constants, "ENDPOINT", server.address())
    template = server.address() + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    tree = [{"type": "file", "path": path, "size": len(body), "oid": COMMIT} for path, body in files.items()]
    info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
    api = "/api/models/owner/name"
    for revision in ("main", COMMIT):
        server.replies[f"{api}/tree/{revision}"] = [Reply(body=json.dumps(tree).encode())]
        server.replies[f"{api}/revision/{revision}"] = [Reply(body=json.dumps(info).encode())]
        for path, body in files.items():
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            server.replies[f"/owner/name/resolve/{revision}/{path}"] = [Reply(body=body, headers=headers)]
    server.replies[api] = [Reply(body=json.dumps(info).encode())]


def refuse(server: Server, status: int, code: str | None, *, endings: tuple[str, ...] = ("",)) -> None:
    """Answer the paths with one of these endings with an error of the hub."""
    headers = {"X-Error-Code": code} if code else {}
    for path in (*server.replies, "/owner/name/resolve/main/absent.pth", "/api/models/owner/name/revision/v9"):
        if path.endswith(endings):
            server.replies[path] = [Reply(status, b"", headers=headers)]


def put_in_hub_cache(repo: str, *files: str) -> Path:
    """Write a snapshot as the library does: refs/main, and links into blobs."""
    store = Path(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))
    put(store, "refs", "main", body=COMMIT.encode())
    for number, name in enumerate(files):
        blob = put(store, "blobs", f"{number:040x}")
        link = store / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return store / "snapshots" / COMMIT


def downloaded(server: Server) -> list[str]:
    return sorted(path.rsplit("/", 1)[1] for path in set(server.requests) if "/resolve/" in path and "GET" in path)


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin", "onnx/model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (
            [f"model-{n}-of-00002.safetensors" for n in ("00001", "00002")] + ["model.safetensors.index.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
    ],
)
def test_a_repository_gives_its_folder_and_only_the_weights_needed_are_downloaded(
    server: Server, monkeypatch: pytest.MonkeyPatch, files: list[str], fetched: list[str]
) -> None:
    serve_repository(server, monkeypatch, {name: name.encode() for name in ("README.md", "config.json", *files)})
    folder = locate("hf://owner/name")
    assert names_in(folder) == ["config.json", *fetched]
    assert downloaded(server) == ["config.json", *fetched]


def test_a_repository_with_one_other_weights_file_gives_that_file(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_repository(server, monkeypatch, {"README.md": b"#", "teacher.pth": BODY})
    assert locate("hf://owner/name", sha256=SHA256).read_bytes() == BODY


def test_a_repository_with_several_models_downloads_none_and_lists_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_repository(server, monkeypatch, {"a.pth": BODY, "b.pth": BODY})
    assert "a.pth, b.pth; give the name of one" in problem("hf://owner/name")
    assert downloaded(server) == []


@pytest.mark.parametrize("address", ["hf://owner/name/deep/teacher.pth", f"hf://owner/name@{COMMIT}/deep/teacher.pth"])
def test_one_file_of_a_repository_is_fetched_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    serve_repository(server, monkeypatch, {"config.json": b"{}", "deep/teacher.pth": BODY})
    assert locate(address, sha256=SHA256).read_bytes() == BODY
    assert downloaded(server) == ["teacher.pth"]


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "GatedRepo", "accept the licence at https://huggingface.co/owner/name"),
        (401, "GatedRepo", "`hf auth login`"),
        (403, None, "access refused (HTTP 403)"),
        (401, None, "HF_TOKEN"),
        (404, "RepoNotFound", "no such repository"),
        (500, None, "HTTP 500"),
    ],
)
@pytest.mark.parametrize("address", ["hf://owner/name", "hf://owner/name/teacher.pth"])
def test_a_refusal_of_the_hub_names_the_page_and_the_solution(
    server: Server, monkeypatch: pytest.MonkeyPatch, address: str, status: int, code: str | None, says: str
) -> None:
    serve_repository(server, monkeypatch, {"config.json": b"{}", "teacher.pth": BODY})
    refuse(server, status, code)
    message = problem(address)
    assert says in message
    assert "https://huggingface.co/owner/name" in message


def test_a_gated_repository_that_lists_its_files_names_the_licence(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_repository(server, monkeypatch, {"config.json": b"{}", "model.safetensors": BODY})
    refuse(server, 403, "GatedRepo", endings=("config.json", "model.safetensors"))
    assert "accept the licence at https://huggingface.co/owner/name" in problem("hf://owner/name")


def test_a_missing_revision_and_a_missing_file_are_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_repository(server, monkeypatch, {"config.json": b"{}"})
    refuse(server, 404, "RevisionNotFound")
    assert "no revision 'v9'" in problem("hf://owner/name@v9")
    refuse(server, 404, "EntryNotFound")
    assert "no file 'absent.pth'" in problem("hf://owner/name/absent.pth")


def test_an_unreachable_hub_is_one_line_but_the_cache_is_used() -> None:
    message = problem("hf://owner/name")
    assert "check the network" in message
    assert "https://huggingface.co/owner/name" in message
    folder = put_in_hub_cache("owner/name", "config.json", "model.safetensors")
    assert locate("hf://owner/name") == folder
    assert locate("hf://owner/name/model.safetensors") == folder / "model.safetensors"


@pytest.mark.parametrize(
    "address", ["hf://name", "hf://", "hf://owner/name@", "hf://owner/name/notes.txt", "hf://owner/name/folder/"]
)
def test_a_malformed_hub_address_is_refused(address: str) -> None:
    assert "expected" in problem(address)


def test_a_name_that_the_hub_would_not_accept_is_refused() -> None:
    assert "not a repository name" in problem("hf://own--er/na..me")


def test_offline_the_cache_is_used_and_missing_weights_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = put_in_hub_cache("owner/name", "config.json", "model.safetensors")
    assert locate("hf://owner/name") == folder
    assert locate(f"hf://owner/name@{COMMIT}") == folder
    put_in_hub_cache("owner/half", "config.json")
    message = problem("hf://owner/half")
    assert "offline mode is on" in message
    assert "`hf download owner/half`" in message
    assert "`hf download owner/name teacher.pth --revision v1`" in problem("hf://owner/name@v1/teacher.pth")


def test_a_known_name_comes_from_the_cache_without_a_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_repository(server, monkeypatch, {})
    folder = put_in_hub_cache("facebook/dinov2-small", "config.json", "model.safetensors")
    assert locate("dinov2_vits14") == folder
    assert server.requests == []


def test_a_known_name_that_cannot_be_fetched_names_the_hub_page_and_the_other_page(weights: Path) -> None:
    message = problem("dinov3_vits16")
    assert "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m" in message
    assert "https://ai.meta.com" in message
    assert str(weights) in message


def test_offline_a_process_uses_the_cache_and_imports_torch_and_the_hub_late() -> None:
    folder = put_in_hub_cache("owner/name", "config.json", "model.safetensors")
    program = (
        "import sys; from dinocell.models.locate import locate;"
        "assert not {'torch', 'huggingface_hub', 'rich'} & set(sys.modules), 'imported too early';"
        "print(locate('hf://owner/name'))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    environment["PYTHONPATH"] = str(Path(module.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == str(folder), result.stderr
