"""Where files are kept: a local folder or a prefix in S3, behind one small class.

`at("runs/x")`, `at("s3://bucket/runs/x")`. A key is a path below it with '/' between parts. The
only room that knows S3; credentials, region and endpoint come from boto3's usual environment
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …).
"""

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from mambaflow.variables import (
    COUNT,
    as_it_is,
    drop_empty,
    empty,
    family,
    number,
    refused,
    stated,
)

# boto3's own default; tests cut their files at it.
MULTIPART_BYTES = 8 * 2**20
# Attempts at a request, the first one included. botocore's own numbers are 3 attempts and 60 s for
# either wait.
ATTEMPTS = 5
CONNECT_S, READ_S = 10, 60
# What a file system without hard links answers: a bucket that is mounted, exFAT, many SMB shares.
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
# What a file system answers that has no room, or no more for this user.
FULL = {errno.ENOSPC, errno.EDQUOT}
# Seconds that a folder which locks a name may be old; that a claim in S3 needs to be seen by others
# (twice the second in which services count times); that a claim may be old.
LOCK_S, SETTLE_S, CLAIM_S = 10.0, 2.0, 60.0
# A HEAD has no body, and so no error's name: botocore gives its status as the code, here and in
# "403" below.
MISSING = {"404", "NoSuchKey", "NotFound"}
# What a service says that does not know a header.
UNKNOWN = {"NotImplemented", "501", "MethodNotAllowed"}
# What it says of a part that would begin beyond a file's end.
BEYOND = {"InvalidRange", "416"}
# What a body raises that ends early or stands still.
BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
CURES = {
    "NoSuchBucket": "create the bucket, or name another",
    "InvalidAccessKeyId": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "set the AWS_SECRET_ACCESS_KEY of this key id",
    "AccessDenied": "ask for access to this prefix: s3:ListBucket and s3:GetObject to read, "
    "s3:PutObject to write",
    "403": "check the credentials, and ask for access to this prefix",
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"),
        "get a new AWS_SESSION_TOKEN, with its key id and secret",
    ),
    "RequestTimeTooSkewed": "set the clock of this machine",
    **dict.fromkeys(
        ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
        "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required if the service is older than checksums",
    ),
    "ConditionalRequestConflict": "another process is writing it: try again",
    "InvalidObjectState": "restore it from the archive that it was moved to",
}


class StorageError(OSError):
    """Storage that refuses or cannot be reached; the message names it, the cause and a cure."""


class ChangedError(StorageError):
    """A file that is another one than it was when it was listed, or gone."""


@dataclass(frozen=True)
class Object:
    """A file as a service lists it."""

    key: str
    bytes: int
    etag: str
    """Another one where the bytes are others; "" where the service has none."""
    modified: datetime


class FullError(StorageError):
    """A disk, or somebody's share of it, that has no room left: to try again cannot help."""


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """What is written in here; a disk that is full is said by the name of what it had no room for.

    Raises:
        FullError: there is no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FullError(
            f"{path}: {error.strerror}; free space there, or keep it elsewhere (runs by --storage, "
            "shards and results by --out)"
        ) from error


def at(uri: str | Path) -> "Storage":
    """The storage at a local path, file:///path or s3://bucket/prefix.

    Raises:
        ValueError: another scheme, or an S3 address without a bucket.
    """
    # A Path made of s3://bucket reads s3:/bucket, which would be a folder called s3: here.
    text = str(uri)
    _require_plain(text)
    scheme, found, rest = text.partition("://")
    if not found:
        # Absolute, so that the address means the same to workers in folders of their own.
        return LocalStorage(Path(text).expanduser().resolve())
    if scheme == "file":
        # What stands before the first slash is a host's name there.
        if not rest.startswith("/"):
            raise ValueError(f"{text!r} must be file:///path, with three slashes; or give the path")
        return LocalStorage(Path(rest).resolve())
    if scheme != "s3":
        raise ValueError(f"unknown scheme {scheme!r} in {text!r}; valid: a path, file://, s3://")
    # Of pyarrow's addresses; here it would silently be a part of every key.
    if "?" in rest:
        raise ValueError(
            f"an S3 address must have no '?' ({text.partition('?')[0]}?…); set AWS_ENDPOINT_URL "
            "and the like in the environment"
        )
    # Of pyarrow's addresses, too: before it stand a key and its secret, which no message may hold.
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            "an S3 address must hold no credentials before an '@'; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and use s3://bucket/prefix"
        )
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ValueError(f"{text!r} must name a bucket; use s3://bucket/prefix")
    # As in a folder: what is joined with a slash too many is the same place.
    parts = [part for part in prefix.split("/") if part]
    if {".", ".."} & {*parts}:
        raise ValueError(f"{text!r} must have no part '.' or '..', which S3 does not follow")
    return S3Storage(bucket, "/".join(parts))


def _require_plain(text: str) -> None:
    """Refuse an address that would silently be another place than is meant."""
    if text != text.strip() or not text.isprintable():
        raise ValueError(
            f"{text!r} must have no blanks around it and no control characters, such as the end of "
            "a line that was copied with it"
        )
    if re.match(r"\$\{?\w", text):
        raise ValueError(f"{text!r} begins with a variable that no shell has put in; put it in")
    # What a Path makes of s3://bucket; it would be a folder called s3: here.
    if re.match(r"s3:(?!//)", text, re.IGNORECASE):
        raise ValueError(f"{text!r} is not an S3 address; use s3://bucket/prefix")
    if re.match(r"[A-Za-z][\w+.-]+:/(?!/)", text):
        raise ValueError(f"{text!r} is no address; use a path, or s3://bucket/prefix")


def _is_hidden(key: str) -> bool:
    """Whether a file is none of anybody's: it is being written, a killed writer left it, or it is a
    copy that some program keeps in a folder of its own, such as .ipynb_checkpoints."""
    return key.startswith(".") or "/." in key


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
    def create(self, key: str, data: bytes) -> bool:
        """Put a whole file unless there is one, and say whether: of many processes one does."""

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
        # Not at once: who looks meanwhile sees some of the files. What says that they are there
        # must be deleted before (see training.checkpoint).
        for key in self.list(prefix):
            self.delete(key)

    @property
    def path(self) -> Path:
        """The local folder."""
        raise ValueError(f"{self.uri} is not a local folder; use read and write")


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, gone at the end."""
    with room_for(path):
        name = _temporary(path)
        try:
            yield name
        finally:
            # Gone already where it was renamed.
            name.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, since a rename is one step only within a file system; with a dot before
        # its name, which listings leave out.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise StorageError(f"{path}: {error}; give a folder that you may write to") from error
    # mkstemp's files are for their owner alone; a run's may be read by others.
    os.fchmod(handle, 0o644)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is whole, and on the disk."""
    with _partial(path) as partial:
        yield partial
        # Before the rename: after a power cut some file systems would have the name without the
        # bytes.
        _sync(partial)
        partial.replace(path)


def _sync(path: Path) -> None:
    # fsync is of the file, whichever descriptor wrote to it.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _renamed_unless_taken(partial: Path, path: Path) -> bool:
    """A file under its name unless that is taken, where there are no links: one process at a time,
    by a folder beside it, since a folder is made by one of many on every file system."""
    lock, since = path.with_name(f".{path.name}.lock"), time.monotonic()
    while not path.exists():
        try:
            lock.mkdir()
        except FileExistsError:
            # Whoever made it looks and renames at once: by now it has been killed in between.
            if time.monotonic() - since > LOCK_S:
                with contextlib.suppress(OSError):
                    lock.rmdir()
            time.sleep(0.05)
            continue
        try:
            # Looked at again: it may have got its name before the folder was ours.
            return not path.exists() and bool(partial.replace(path))
        finally:
            lock.rmdir()
    return False


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
        with _appearing(self.root / key) as partial:
            partial.write_bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        with _partial(self.root / key) as partial:
            partial.write_bytes(data)
            _sync(partial)
            try:
                # A link to a name that is taken fails, in one step, where a rename would replace
                # what is there. The file is whole before it gets its name.
                (self.root / key).hardlink_to(partial)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return _renamed_unless_taken(partial, self.root / key)
        return True

    def upload(self, path: Path, key: str) -> None:
        with _appearing(self.root / key) as partial:
            shutil.copyfile(path, partial)

    def download(self, key: str, path: Path) -> None:
        with _appearing(path) as partial:
            shutil.copyfile(self.root / key, partial)

    def list(self, prefix: str = "") -> list[str]:
        # A prefix is of the text of a key, as in S3: "b" finds b/1 and bc. Only the folder part of
        # it can be walked.
        folder = self.root / prefix.rpartition("/")[0]
        if not folder.is_dir():
            return []
        files = (p for p in folder.rglob("*") if p.is_file())
        keys = (p.relative_to(self.root).as_posix() for p in files)
        return sorted(key for key in keys if key.startswith(prefix) and not _is_hidden(key))

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        super().delete_tree(prefix)
        # Folders, which S3 does not have, and what listings leave out.
        if prefix.endswith("/") and (self.root / prefix).is_dir():
            shutil.rmtree(self.root / prefix)


def _client() -> Any:
    """This process's client for its present environment: boto3's may not live through a fork."""
    # Looked at for every request: with other credentials or another endpoint in the environment the
    # client of before must not be used again.
    return _client_for(os.getpid(), tuple(sorted(family("AWS_").items())))


def _without_secrets(text: str) -> str:
    """A message without the values of secrets, which some services quote."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if value := as_it_is(name):
            text = text.replace(value, f"({name})")
    return text


# One client for all threads of a process, which clients allow and sessions do not.
@lru_cache(maxsize=8)
def _client_for(process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    names = [name for name, _ in settings]
    # Settings go into headers, and what refuses them there tells them, secrets and all.
    refused(names)
    # boto3 takes an empty variable for a value: a profile without a name, say.
    drop_empty(empty("AWS_"))
    # A session of its own: boto3.client would take the process's one, which keeps the credentials
    # that it found first.
    session = boto3.session.Session()
    config = Config(
        retries=_retries(session._session.get_scoped_config()),
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
    )
    return session.client("s3", config=config)


def _retries(file: Mapping[str, str]) -> dict[str, Any]:
    """How requests are repeated. What is stated in a client's Config hides the variables and what
    boto3's own file says, so both are asked here."""
    told = file.get("max_attempts", "")
    if told and not COUNT.holds(told):
        raise StorageError(f"max_attempts (={told!r}) of boto3's file must {COUNT.words}; use 5")
    return {
        # adaptive also slows down all requests of this client when the service asks for fewer.
        "mode": stated("AWS_RETRY_MODE") or file.get("retry_mode") or "adaptive",
        # Counts the first request; max_attempts, its neighbour, does not.
        "total_max_attempts": number("AWS_MAX_ATTEMPTS") or int(told or ATTEMPTS),
    }


# Client and bucket -> whether the service keeps conditions.
_CONDITIONS: dict[tuple[Any, str], bool] = {}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _etag(answer: dict[str, Any]) -> str:
    # Services do not agree on the quotes, nor do listings with answers.
    return str(answer.get("ETag") or "").removeprefix("W/").strip('"')


class S3Storage(Storage):
    """A prefix in an S3 bucket; uploads in parts carry checksums that the service verifies."""

    is_local = False

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        # A bucket's root has no prefix; a key that began with "/" would be another one.
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextlib.contextmanager
    def _named(self, key: str) -> Iterator[None]:
        """Failures as errors that name the file, the cause and a cure."""
        where = f"{self.uri}/{key}"
        try:
            yield
        except ClientError as error:
            code = _code(error)
            # For a HEAD a bucket that is not there is a 404 too, and so a file that is not there.
            if code in MISSING:
                raise FileNotFoundError(f"{where} is not there") from error
            cure = CURES.get(code, "see the cause")
            raise StorageError(_without_secrets(f"{where}: {error}; {cure}")) from error
        # No answer at all, or the transfer's own errors: botocore's and boto3's have no common
        # base.
        except (BotoCoreError, Boto3Error) as error:
            told = f"{where}: {error}; check AWS_ENDPOINT_URL, the network and the credentials"
            raise StorageError(_without_secrets(told)) from error

    def child(self, name: str) -> Storage:
        return S3Storage(self.bucket, self._key(name).strip("/"))

    def read(self, key: str) -> bytes:
        return self._got(key)[0]

    def _got(self, key: str, **more: str) -> tuple[bytes, str]:
        """A file's bytes, and its ETag."""
        with self._named(key):
            for left in reversed(range(ATTEMPTS)):  # boto3 repeats a request, not a broken body
                try:
                    # By the answer's arrival boto3's own attempts are over: the body is read by us.
                    answer = _client().get_object(Bucket=self.bucket, Key=self._key(key), **more)
                    return answer["Body"].read(), _etag(answer)
                except BROKEN_OFF:
                    if not left:
                        raise
        raise AssertionError("unreachable")

    def read_part(self, listed: Object, first: int, count: int) -> bytes:
        """Some bytes of a file as it was listed, fewer where it ends before.

        Raises:
            ChangedError: it is another one now, or gone.
        """
        count = min(count, listed.bytes - first)
        if count <= 0:
            return b""
        where = f"{self.uri}/{listed.key}"
        # A whole file is asked for as such: then what checksum the service keeps of it is compared.
        part = {} if count == listed.bytes else {"Range": f"bytes={first}-{first + count - 1}"}
        try:
            data, etag = self._got(listed.key, **part)
        except FileNotFoundError as error:
            raise ChangedError(f"{where} was listed, and is gone") from error
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and _code(cause) in BEYOND:
                raise ChangedError(f"{where} is shorter than when it was listed") from error
            raise
        # By the answer itself: of two parts each is of the file that was listed, or is refused.
        if len(data) != count or (listed.etag and etag != listed.etag):
            raise ChangedError(f"{where} has changed since it was listed")
        return data

    def find(self, key: str) -> Object | None:
        """A file as the service knows it now; None where there is none."""
        try:
            with self._named(key):
                found = _client().head_object(Bucket=self.bucket, Key=self._key(key))
        except FileNotFoundError:
            return None
        return Object(key, found["ContentLength"], _etag(found), found["LastModified"])

    def objects(self, prefix: str = "") -> list[Object]:
        """All that is listed below a prefix, marks of folders too, in no order."""
        start = len(self._key(""))
        return [
            Object(o["Key"][start:], o["Size"], _etag(o), o["LastModified"])
            for o in self._objects(prefix)
        ]

    def write(self, key: str, data: bytes) -> None:
        self._put(key, io.BytesIO(data))

    def create(self, key: str, data: bytes) -> bool:
        if not self._keeps_conditions():
            return self._create_by_claims(key, data)
        writer = uuid.uuid4().hex
        if self._put_if_free(key, data, writer):
            return True
        # boto3 repeats a request whose answer was lost, and it then meets its own file.
        with self._named(key):
            found = _client().head_object(Bucket=self.bucket, Key=self._key(key))
        return bool(found.get("Metadata", {}).get("writer") == writer)

    def _put_if_free(self, key: str, data: bytes, writer: str) -> bool:
        try:
            with self._named(key):
                # One request, which S3 does only if the key is free: of many writers one gets 200.
                # upload_fileobj takes no such condition.
                _client().put_object(
                    Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*",
                    Metadata={"writer": writer},
                )  # fmt: skip
        except StorageError as error:
            # 412 is the answer "taken". 409, while another writer is at it, is no answer, and stays
            # an error.
            cause = error.__cause__
            if isinstance(cause, ClientError) and _code(cause) == "PreconditionFailed":
                return False
            raise
        return True

    def _keeps_conditions(self) -> bool:
        """Whether the service refuses to replace a file where it is asked to; some gateways answer
        that they do not know how, and some replace it without a word. Tried once a process."""
        known = (_client(), self.bucket)
        if known not in _CONDITIONS:
            _CONDITIONS[known] = self._tried_condition()
        return _CONDITIONS[known]

    def _tried_condition(self) -> bool:
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            return self._put_if_free(probe, b"", "") and not self._put_if_free(probe, b"", "")
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and _code(cause) in UNKNOWN:
                return False
            raise
        finally:
            # Without the right to delete the empty file stays, which no listing shows.
            with contextlib.suppress(OSError):
                self.delete(probe)

    def _create_by_claims(self, key: str, data: bytes) -> bool:
        """Create without conditions: everybody puts a claim beside the file, waits until all can
        see it, and the oldest has it. Listings must show at once what was put, as S3's do."""
        folder, _, name = key.rpartition("/")
        claims = f"{folder}/.{name}.claim-" if folder else f".{name}.claim-"
        mine = claims + uuid.uuid4().hex
        if self.exists(key):
            return False
        self.write(mine, b"")
        try:
            # A claim that is put from here on is younger than ours by the service's own clock.
            time.sleep(SETTLE_S)
            first = self._oldest(claims, mine)
            # In this order: who had it has written the file before its claim went away.
            if first != mine or self.exists(key):
                return False
            self.write(key, data)
            return True
        finally:
            self.delete(mine)

    def _oldest(self, claims: str, mine: str) -> str:
        """The oldest of some claims, but for those that a killed process has left."""
        found = {o["Key"][len(self._key("")) :]: o["LastModified"] for o in self._objects(claims)}
        living = [name for name in found if (found[mine] - found[name]).total_seconds() < CLAIM_S]
        return min(living, key=lambda name: (found[name], name))

    def upload(self, path: Path, key: str) -> None:
        with path.open("rb") as file:
            self._put(key, file)

    def _put(self, key: str, file: io.BufferedIOBase) -> None:
        """In parts beyond MULTIPART_BYTES, which become a file when all are there."""
        # SHA256, which the service checks and keeps, rather than botocore's CRC. Older services
        # know neither: their users set when_required, in the environment or in boto3's own file,
        # and nothing is added.
        asked = _client().meta.config.request_checksum_calculation
        extra = {"ChecksumAlgorithm": "SHA256"} if asked == "when_supported" else {}
        parts = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES
        )
        with self._named(key):
            # A transfer that fails gives up its parts, which one would else pay for unseen.
            _client().upload_fileobj(
                file, self.bucket, self._key(key), ExtraArgs=extra, Config=parts
            )

    def download(self, key: str, path: Path) -> None:
        # Here boto3 also reads the body, and asks again for what broke off.
        with self._named(key), _appearing(path) as partial:
            _client().download_file(self.bucket, self._key(key), str(partial))

    def list(self, prefix: str = "") -> list[str]:
        # Keys come whole, from the bucket's root on.
        keys = (o["Key"][len(self._key("")) :] for o in self._objects(prefix))
        return sorted(key for key in keys if not _is_hidden(key))

    def _objects(self, prefix: str) -> Iterator[dict[str, Any]]:
        """What the service lists, a thousand at a time."""
        with self._named(prefix):
            pages = (
                _client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            )
            for page in pages:
                yield from page.get("Contents", ())

    def exists(self, key: str) -> bool:
        try:
            with self._named(key):
                _client().head_object(Bucket=self.bucket, Key=self._key(key))
            return True
        except FileNotFoundError:
            return False

    def delete(self, key: str) -> None:
        with self._named(key):
            _client().delete_object(Bucket=self.bucket, Key=self._key(key))
