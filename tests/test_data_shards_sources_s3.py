"""Sources in buckets and behind web addresses, from servers on this machine, as a client without an account."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocell.data_shards.sources.field import read_field
from dinocell.data_shards.sources.files import MultichannelSource
from dinocell.data_shards.sources.hpa_chammi import HpaFovSource, HpaOneSource
from dinocell.data_shards.sources.load_data import LoadDataSource
from dinocell.data_shards.sources.phenix import PhenixSource
from dinocell.errors import ImageError
from dinocell.images.listing import list_files
from dinocell.images.storage import open_bytes
from dinocell.images.write import write_tiff
from helpers.servers import serving_folder
from helpers.sources import fields

BUCKET = "cellpainting-gallery"
PLATE = "cpg0016-jump/images/größe/BR1__2020-11-05T19_51_35-Measurement 1"


def pixels_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 60000, (8, 10)).astype(np.uint16)


def tiff_bytes(pixels: np.ndarray, tmp_path: Path) -> bytes:
    write_tiff(tmp_path / "one.tif", pixels)
    return (tmp_path / "one.tif").read_bytes()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a client that may write; everything else in the process has no key and no profile."""
    import botocore.session

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    forget_connections()
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=endpoint, aws_access_key_id="writer", aws_secret_access_key="x", region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET, ACL="public-read")
    yield partial(put, client)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
    client.delete_bucket(Bucket=BUCKET)
    client.close()
    forget_connections()


def forget_connections() -> None:
    """Close what s3fs holds open to one server, so that the next test finds its own."""
    import s3fs

    for files in s3fs.S3FileSystem._cache.values():
        if files._s3 is None:
            continue
        if files.asynchronous:  # opened by zarr, in the loop that it runs
            import zarr.core.sync

            zarr.core.sync.sync(files._s3.close())
        else:
            s3fs.S3FileSystem.close_session(files.loop, files._s3)
    s3fs.S3FileSystem.clear_instance_cache()


def put(client: Any, key: str, content: bytes) -> None:
    client.put_object(Bucket=BUCKET, Key=key, Body=content, ACL="public-read")


def test_phenix_plates_in_a_public_bucket_are_listed_and_read(bucket: Any, tmp_path: Path) -> None:
    for channel in (1, 2):
        content = tiff_bytes(pixels_of(channel), tmp_path)
        bucket(f"{PLATE}/Images/r01c01f01p01-ch{channel}sk1fk1fl1.tiff", content)
    index = (
        "<EvaluationInputData><Images><Image><ChannelID>1</ChannelID><ChannelName>Größe</ChannelName>"
        '<ImageResolutionX Unit="m">5E-07</ImageResolutionX></Image></Images></EvaluationInputData>'
    )
    bucket(f"{PLATE}/Images/Index.idx.xml", index.encode())
    (field,) = fields(PhenixSource(input=f"s3://{BUCKET}/cpg0016-jump/images"))
    assert field.id == "größe/BR1__2020-11-05T19_51_35-Measurement 1/A01/f01"
    assert (field.plate, field.pixel_size_um) == ("BR1", 0.5)
    picture = read_field(field)
    assert picture.channel_names == ("Größe", "ch2")
    np.testing.assert_array_equal(picture.pixels, np.stack([pixels_of(1), pixels_of(2)]))
    (field,) = fields(PhenixSource(input=f"s3://{BUCKET}/{PLATE}/Images/"))
    assert (field.id, field.plate) == ("A01/f01", "BR1")


def test_more_objects_than_one_answer_holds_are_all_listed_in_order(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    names = [f"P{number % 3}/{number:04d} ä.tif" for number in range(55)]
    for name in names:
        bucket(f"many/{name}", b"x")
    bucket("many-others/x.tif", b"x")
    bucket("many/.hidden/x.tif", b"x")
    listed = list_files(f"s3://{BUCKET}/many")
    assert [file.name for file in listed] == sorted(names)
    assert open_bytes(listed[7].path) == b"x"


def test_objects_that_come_later_are_seen_by_the_next_listing(bucket: Any) -> None:
    bucket("later/a.tif", b"x")
    assert len(list_files(f"s3://{BUCKET}/later")) == 1
    bucket("later/b.tif", b"x")
    assert len(list_files(f"s3://{BUCKET}/later")) == 2
    assert len(list_files(f"s3://{BUCKET}/later", folders_as_files=(".zarr",))) == 2


def test_folders_created_by_a_web_console_are_not_files(bucket: Any) -> None:
    for key in ("marked/", "marked/sub/", "marked/sub/a.tif", "marked/b.zarr/", "marked/b.zarr/0"):
        bucket(key, b"" if key.endswith("/") else b"x")
    names = [file.name for file in list_files(f"s3://{BUCKET}/marked")]
    assert names == ["b.zarr/0", "sub/a.tif"]
    names = [file.name for file in list_files(f"s3://{BUCKET}/marked", folders_as_files=(".zarr",))]
    assert names == ["b.zarr", "sub/a.tif"]


def test_a_missing_object_of_a_bucket_is_one_clear_line(bucket: Any) -> None:
    bucket("there/a.txt", b"x")
    for address, message in (
        (f"s3://{BUCKET}/nowhere", "no such folder"),
        ("s3://no-such-bucket-anywhere/x", "no such"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            list_files(address)
        assert address in str(caught.value)
    with pytest.raises(ImageError, match="no such file"):
        open_bytes(f"s3://{BUCKET}/there/b.txt")
    with pytest.raises(ImageError, match=f"s3://{BUCKET}/there: no files named like r01c01f01p01"):
        list(PhenixSource(input=f"s3://{BUCKET}/there").fields())


def test_an_unreachable_server_is_one_clear_line(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(s3fs.core, "S3_RETRYABLE_ERRORS", ())
    forget_connections()
    for ask in (open_bytes, list_files):
        with pytest.raises(ImageError, match=f"s3://{BUCKET}/a.tif: cannot be") as caught:
            ask(f"s3://{BUCKET}/a.tif")
        assert "\n" not in str(caught.value)


def test_load_data_finds_folders_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    bucket("screen/images/P1/Images/a 1.tif", tiff_bytes(pixels_of(1), tmp_path))
    bucket("other/ER/b.tif", tiff_bytes(pixels_of(2), tmp_path))
    table = (
        "Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigDNA,PathName_OrigDNA,FileName_OrigER,PathName_OrigER\n"
        f"P1,A01,1,a 1.tif,/home/ubuntu/bucket/images/P1/Images,b.tif,s3://{BUCKET}/other/ER/\n"
    )
    bucket("screen/load_data.csv", table.encode())
    for address in (f"s3://{BUCKET}/screen", f"s3://{BUCKET}/screen/load_data.csv"):
        (field,) = fields(LoadDataSource(input=address))
        assert field.id == "P1/A01/1"
        picture = read_field(field)
        assert picture.channel_names == ("DNA", "ER")
        np.testing.assert_array_equal(picture.pixels, np.stack([pixels_of(1), pixels_of(2)]))


def test_zarr_folders_in_a_bucket_are_one_input_each(bucket: Any) -> None:
    zarr = pytest.importorskip("zarr")
    pixels = np.stack([pixels_of(3), pixels_of(4)])
    store = zarr.storage.MemoryStore()
    group = zarr.open_group(store, mode="w", zarr_format=2)
    group.create_array("0", shape=pixels.shape, dtype=pixels.dtype, chunks=(1, 8, 10))[:] = pixels
    group.attrs["multiscales"] = [
        {"axes": [{"name": name, "type": "space"} for name in "cyx"], "datasets": [{"path": "0"}], "version": "0.4"}
    ]
    for key, value in store._store_dict.items():
        bucket(f"zarrs/plate 1/a.zarr/{key}", value.to_bytes())
    (field,) = fields(MultichannelSource(input=f"s3://{BUCKET}/zarrs", channels=("DNA", "ER")))
    assert field.id == "plate 1/a.zarr"
    np.testing.assert_array_equal(read_field(field).pixels, pixels)


# Tables behind web addresses.


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    with serving_folder(tmp_path / "web") as root:
        yield root


def test_load_data_from_a_web_address(web: str, tmp_path: Path) -> None:
    folder = tmp_path / "web" / "screen"
    (folder / "P 1").mkdir(parents=True)
    for number, name in enumerate(("P 1/größe #1.tif", "P 1/b.tif")):
        write_tiff(folder / name, pixels_of(number))
    (folder / "load_data.csv").write_text(
        "Metadata_Well,Metadata_Site,FileName_DNA,PathName_DNA\nA01,1,größe #1.tif,D:\\screens\\P 1\nA01,2,b.tif,P 1\n",
        encoding="utf-8",
    )
    (folder / "urls.csv").write_text(
        f"Metadata_Well,Metadata_Site,URL_OrigDNA\nA01,1,{web}/screen/P%201/gr%C3%B6%C3%9Fe%20%231.tif\n"
        f"A01,2,{web}/screen/P 1/b.tif\n"
    )
    for table in ("load_data.csv", "urls.csv"):
        found = fields(LoadDataSource(input=f"{web}/screen/{table}"))
        assert [field.id for field in found] == ["A01/1", "A01/2"]
        for number, field in enumerate(found):
            np.testing.assert_array_equal(read_field(field).pixels[0], pixels_of(number))


def test_hpa_tables_from_a_web_address(web: str, tmp_path: Path) -> None:
    from dinocell.images.write import write_png

    side_by_side = np.concatenate([np.full((4, 4), number, np.uint8) for number in range(4)], axis=1)
    for source, folder, name in (
        (HpaOneSource, "varied_size_masked_single_cells_HPA", "varied_size_masked_single_cells_pretrain_20240507.csv"),
        (HpaFovSource, "normalized_data", "whole_images_names.csv"),
    ):
        (tmp_path / "web" / folder).mkdir()
        write_png(tmp_path / "web" / folder / "1_A1_1.png", side_by_side)
        (tmp_path / "web" / name).write_text("img_path,ID\n1_A1_1.png,1_A1_1\n")
        (field,) = fields(source(input=web))
        assert field.id == f"{folder}/1_A1_1.png"
        assert [int(plane.max()) for plane in read_field(field).pixels] == [0, 1, 2, 3]


def test_bytes_of_a_bucket_are_read_exactly(bucket: Any) -> None:
    content = bytes(range(256)) * 300
    bucket("bytes/a b+c%20.bin", content)
    assert open_bytes(f"s3://{BUCKET}/bytes/a b+c%20.bin") == content
    assert open_bytes(f"s3://{BUCKET}/bytes/a b+c%20.bin", first=1000) == content[:1000]
    assert open_bytes(f"s3://{BUCKET}/bytes/a b+c%20.bin", first=10**6) == content
