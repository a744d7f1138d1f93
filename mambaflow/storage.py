"""Where files are kept: a local folder or a prefix in S3, behind one small class.

`at("runs/x")`, `at("s3://bucket/runs/x")`. A key is a path below it with '/' between parts. The
only room that knows S3; credentials, region and endpoint come from boto3's usual environment
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …).
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

MULTIPART_BYTES = 8 * 2**20
ATTEMPTS = 5
CONNECT_S, READ_S = 10, 60
MISSING = {"404", "NoSuchKey", "NotFound"}
CURES = {
    "NoSuchBucket": "create the bucket, or name another",
    "InvalidAccessKeyId": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "set the AWS_SECRET_ACCESS_KEY of this key id",
    "AccessDenied": "ask for read and write access to this prefix",
    "403": "check the credentials, and ask for access to this prefix",
}


class StorageError(OSError):
    """Storage that refuses or cannot be reached; the message names it, the cause and a cure."""


def at(uri: str | Path) -> "Storage":
    """The storage at a local path, file:///path or s3://bucket/prefix.

    Raises:
        ValueError: another scheme, or an S3 address without a bucket.
    """
    text = str(uri)
    scheme, found, rest = text.partition("://")
    if not found:
        return LocalStorage(Path(text).expanduser().resolve())
    if scheme == "file":
        return LocalStorage(Path(rest).resolve())
    if scheme != "s3":
        raise ValueError(f"unknown scheme {scheme!r} in {text!r}; valid: a path, file://, s3://")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ValueError(f"{text!r} must name a bucket; use s3://bucket/prefix")
    return S3Storage(bucket, prefix.strip("/"))


class Storage(ABC):
    """Files by key. A file that can be seen is whole."""

    uri: str
    is_local: bool

    @abstractmethod
    def child(self, name: str) -> "Storage":
        """The storage below `name`."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The file's bytes; FileNotFoundError if it is not there."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put a whole file, replacing one that is there."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Put a local file."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Fetch a file to a local path, where it appears whole."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Keys that begin with `prefix`, sorted."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether the file is there."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is no error."""

    def delete_tree(self, prefix: str) -> None:
        """Remove every file whose key begins with `prefix`."""
        for key in self.list(prefix):
            self.delete(key)

    @property
    def path(self) -> Path:
        """The local folder."""
        raise ValueError(f"{self.uri} is not a local folder; use read and write")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class LocalStorage(Storage):
    """A folder."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    @property
    def path(self) -> Path:
        return self.root

    def child(self, name: str) -> Storage:
        return LocalStorage(self.root / name)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        with _appearing(self.root / key) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def upload(self, path: Path, key: str) -> None:
        with _appearing(self.root / key) as partial:
            shutil.copyfile(path, partial)

    def download(self, key: str, path: Path) -> None:
        with _appearing(path) as partial:
            shutil.copyfile(self.root / key, partial)

    def list(self, prefix: str = "") -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        if not folder.is_dir():
            return []
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        keys = (p.relative_to(self.root).as_posix() for p in files)
        return sorted(key for key in keys if key.startswith(prefix))

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        super().delete_tree(prefix)
        if prefix.endswith("/"):
            shutil.rmtree(self.root / prefix, ignore_errors=True)


@cache
def _client(process: int) -> Any:
    """One client a process: boto3's may not be shared across a fork."""
    config = Config(
        retries={"mode": "adaptive", "max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
    )
    return boto3.client("s3", config=config)


class S3Storage(Storage):
    """A prefix in an S3 bucket; uploads in parts carry checksums that the service verifies."""

    is_local = False

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @property
    def _s3(self) -> Any:
        return _client(os.getpid())

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextlib.contextmanager
    def _named(self, key: str) -> Iterator[None]:
        """Failures as errors that name the file, the cause and a cure."""
        where = f"{self.uri}/{key}"
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in MISSING:
                raise FileNotFoundError(f"{where} is not there") from error
            cure = CURES.get(code, "see the cause")
            raise StorageError(f"{where}: {error}; {cure}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(
                f"{where}: {error}; check AWS_ENDPOINT_URL, the network and the credentials"
            ) from error

    def child(self, name: str) -> Storage:
        return S3Storage(self.bucket, self._key(name).strip("/"))

    def read(self, key: str) -> bytes:
        with self._named(key):
            return self._s3.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="mambaflow-") as folder:
            path = Path(folder) / "part"
            path.write_bytes(data)
            self.upload(path, key)

    def upload(self, path: Path, key: str) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        extra: dict[str, Any] = {"Metadata": {"sha256": digest}}
        if os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported") == "when_supported":
            extra["ChecksumAlgorithm"] = "SHA256"
        with self._named(key):
            self._s3.upload_file(
                str(path),
                self.bucket,
                self._key(key),
                ExtraArgs=extra,
                Config=TransferConfig(
                    multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES
                ),
            )

    def download(self, key: str, path: Path) -> None:
        with self._named(key), _appearing(path) as partial:
            self._s3.download_file(self.bucket, self._key(key), str(partial))

    def list(self, prefix: str = "") -> list[str]:
        skip = len(self._key(""))
        with self._named(prefix):
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(prefix)
            )
            return sorted(o["Key"][skip:] for page in pages for o in page.get("Contents", ()))

    def exists(self, key: str) -> bool:
        try:
            with self._named(key):
                self._s3.head_object(Bucket=self.bucket, Key=self._key(key))
            return True
        except FileNotFoundError:
            return False

    def delete(self, key: str) -> None:
        with self._named(key):
            self._s3.delete_object(Bucket=self.bucket, Key=self._key(key))
