"""A prefix in S3 as a storage.

The only room that knows S3; credentials, region and endpoint come from boto3's usual environment
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …).
"""

import contextlib
import io
import os
import re
import time
import uuid
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

from mambaflow.disk import appearing
from mambaflow.storage_base import Storage, StorageError, is_hidden
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
# Seconds that a claim needs to be seen by others (twice the second in which services count times);
# that a claim may be old.
SETTLE_S, CLAIM_S = 2.0, 60.0
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


def _client() -> Any:
    """This process's client for its present environment: boto3's may not live through a fork."""
    # Looked at for every request: with other credentials or another endpoint in the environment the
    # client of before must not be used again.
    return _client_for(os.getpid(), tuple(sorted(family("AWS_").items())))


# Secrets that boto3 found, in its own file for one -> what messages have in their place.
_SECRETS: dict[str, str] = {}


def _without_secrets(text: str) -> str:
    """A message without the values of secrets, which some services quote."""
    given = {as_it_is(name): name for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
    for value, name in (_SECRETS | given).items():
        text = text.replace(value, f"({name})") if value else text
    # Of an endpoint or a proxy with a name and a password.
    return re.sub(r"//[^/\s]*@", "//(hidden)@", text)


def _cleaned(error: BaseException) -> BaseException:
    """An error, and what caused it, without secrets: a traceback tells them all."""
    found: BaseException | None = error
    while found is not None:
        told = (_without_secrets(x) if isinstance(x, str) else x for x in found.args)
        found.args = tuple(told)
        found = found.__cause__ or found.__context__
    return error


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
    if credentials := session.get_credentials():
        frozen = credentials.get_frozen_credentials()
        _SECRETS[frozen.secret_key or ""] = "the secret key"
        _SECRETS[frozen.token or ""] = "the session token"
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
            raise StorageError(f"{where}: {_cleaned(error)}; {cure}") from error
        # No answer at all, or the transfer's own errors: botocore's and boto3's have no common
        # base.
        except (BotoCoreError, Boto3Error) as error:
            told = f"{where}: {_cleaned(error)}"
            cure = "check AWS_ENDPOINT_URL, the network and the credentials"
            raise StorageError(_without_secrets(f"{told}; {cure}")) from error

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
        with self._named(""):
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
        with self._named(key):
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
        with self._named(key), appearing(path) as partial:
            _client().download_file(self.bucket, self._key(key), str(partial))

    def list(self, prefix: str = "") -> list[str]:
        # Keys come whole, from the bucket's root on.
        keys = (o["Key"][len(self._key("")) :] for o in self._objects(prefix))
        return sorted(key for key in keys if not is_hidden(key))

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
