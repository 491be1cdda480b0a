"""One large remote file to a local one, in pieces, with its sha256."""

import hashlib
import http.client
import urllib.request
from typing import IO, Any

from dinocell.data_shards.locations import bucket_errors, bucket_options, quoted
from dinocell.errors import ImageError

_CHUNK = 4 << 20
_TIMEOUT_S = 60.0


def download(address: str, target: IO[bytes], *, num_bytes: int) -> str:
    """Copy a remote file (``https://``, ``s3://`` or any other protocol that fsspec knows) and return its sha256.

    Raises
    ------
    ImageError
        If it cannot be read to its end, which is worth trying again, or has more than ``num_bytes`` bytes.
    OSError
        If the target cannot be written.
    """
    source = _open(address)
    digest = hashlib.sha256()
    received = 0
    with source:
        while chunk := _read(source, address):
            received += len(chunk)
            if received > num_bytes:  # whatever else it is, it must not fill the disk
                raise ImageError(f"{address}: more than the {num_bytes} bytes that the manifest says")
            digest.update(chunk)
            target.write(chunk)
        if isinstance(source, http.client.HTTPResponse) and source.length:  # read(n) does not mind the end
            raise ImageError(f"{address}: reading stopped (the server broke off after {received} bytes)")
    return digest.hexdigest()


def _open(address: str) -> Any:  # something with read() and close()
    try:
        if address.startswith(("http://", "https://")):
            return urllib.request.urlopen(quoted(address), timeout=_TIMEOUT_S)
        import fsspec  # type: ignore[import-untyped]

        filesystem, path = fsspec.url_to_fs(address, **bucket_options(address))
        return filesystem.open(path, "rb", block_size=16 << 20)
    except _failures() as error:
        raise ImageError(f"{address}: cannot be opened ({_line(error)})") from error


def _read(source: Any, address: str) -> bytes:
    try:
        return bytes(source.read(_CHUNK))
    except _failures() as error:
        raise ImageError(f"{address}: reading stopped ({_line(error)})") from error


def _failures() -> tuple[type[Exception], ...]:
    return (*bucket_errors(), http.client.HTTPException, ImportError)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
