"""A prefix in S3 as a folder that is read: listed once, and each read held against that listing.

Nothing is copied to a disk, so that none can be full and nothing is left there, however a process
ends: files are read where they lie, by the part.
"""

import io
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mambaflow.s3_storage import ChangedError, Object, S3Storage
from mambaflow.storage import at
from mambaflow.storage_base import StorageError

# What is fetched at least where a part is asked for: Parquet and archives ask for many small ones.
AHEAD = 2**20
STAGE_AGAIN = "stage again once nothing writes there"
log = logging.getLogger(__name__)


class SourceError(ValueError):
    """Images that cannot be had or used; the message says what to do instead."""


class Listing:
    """The files below a prefix, as they were when they were listed.

    Args:
        bucket: its root.
        objects: of any order.

    Raises:
        SourceError: a key is no path.
    """

    def __init__(self, bucket: S3Storage, objects: list[Object]) -> None:
        self.bucket = bucket
        self.files: dict[PurePosixPath, Object] = {}
        self.inside: dict[PurePosixPath, set[PurePosixPath]] = defaultdict(set)
        """What is directly in each folder."""
        for found in objects:
            path = self._path(found.key)
            # What ends so stands for a folder, and holds nothing.
            if found.key.endswith("/"):
                self.inside[path].update()
            else:
                self.files[path] = found
            for inner, outer in zip([path, *path.parents], path.parents, strict=False):
                self.inside[outer].add(inner)
        self._drop_marks()

    def _path(self, key: str) -> PurePosixPath:
        # A path would lose these parts, and two keys might become one.
        if {"", ".", ".."} & set(key.removesuffix("/").split("/")):
            raise SourceError(
                f"{self.bucket.uri}/{key} has an empty part, '.' or '..' in its key, and so is no "
                "path; copy it to another key, or give a folder without it"
            )
        return PurePosixPath(key)

    def _drop_marks(self) -> None:
        """Some programs mark a folder by an empty object of its name, without the slash."""
        for path in self.files.keys() & self.inside.keys():
            if self.files[path].bytes:
                raise SourceError(
                    f"{self.bucket.uri}/{path} is a file and a folder at once; rename one of them"
                )
            del self.files[path]


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder of a listing; of pathlib.Path what sources use of it."""

    listing: Listing
    inner: PurePosixPath
    """From the bucket's root on."""

    def __str__(self) -> str:
        return "/".join([self.listing.bucket.uri, *self.inner.parts])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "RemotePath") -> bool:
        # As paths of a disk are compared: the order that ids come from.
        return self.inner < other.inner

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.listing, self.inner / name)

    @property
    def name(self) -> str:
        """The last part; of a bucket's root the bucket."""
        return self.inner.name or self.listing.bucket.bucket

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The name's ending."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder that it is in."""
        return RemotePath(self.listing, self.inner.parent)

    @property
    def parts(self) -> tuple[str, ...]:
        """Of its key."""
        return self.inner.parts

    def resolve(self) -> "RemotePath":
        """Itself: there are no links."""
        return self

    def is_dir(self) -> bool:
        """Whether anything lies below."""
        return self.inner in self.listing.inside

    def is_file(self) -> bool:
        """Whether it has bytes to read."""
        return self.inner in self.listing.files

    def exists(self) -> bool:
        """Whether it was listed."""
        return self.is_dir() or self.is_file()

    def iterdir(self) -> list["RemotePath"]:
        """What is in the folder, in any order."""
        return [RemotePath(self.listing, path) for path in self.listing.inside.get(self.inner, ())]

    @property
    def listed(self) -> Object:
        """The file as it was listed.

        Raises:
            FileNotFoundError: it was not.
        """
        if not self.is_file():
            raise FileNotFoundError(f"{self} is not there")
        return self.listing.files[self.inner]

    def read_part(self, first: int, count: int) -> bytes:
        """Some of the file's bytes, fewer where it ends before.

        Raises:
            SourceError: it is not what it was when it was listed.
            StorageError: it could not be fetched.
        """
        try:
            return self.listing.bucket.read_part(self.listed, first, count)
        except ChangedError as error:
            raise SourceError(f"{error}; {STAGE_AGAIN}") from error

    def read_bytes(self) -> bytes:
        """All of the file; raises as `read_part`."""
        return self.read_part(0, self.listed.bytes)

    def open(self, mode: str) -> io.BufferedReader:
        """The file, to be read by the part; raises as `read_part`."""
        assert mode == "rb"
        return io.BufferedReader(_RemoteFile(self), AHEAD)


AnyPath = Path | RemotePath


class _RemoteFile(io.RawIOBase):
    """A file's bytes, each read a request."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.place = path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.path.listed.bytes}
        self.place = max(0, start[whence] + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def readall(self) -> bytes:
        # In one request; the one that this replaces asks for 8 KiB at a time.
        data = self.path.read_part(self.place, max(0, self.path.listed.bytes - self.place))
        self.place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.path.read_part(self.place, len(view))
        view[: len(data)] = data
        self.place += len(data)
        return len(data)


def is_remote(address: str) -> bool:
    """Whether an address is of S3."""
    return address.startswith("s3:")


def remote(address: str) -> RemotePath:
    """What is at an address, a file or all that lies below it.

    Raises:
        ValueError: it is no address of S3.
        SourceError: nothing is there, or what is there has no paths.
        StorageError: it cannot be listed.
    """
    asked = at(address)
    assert isinstance(asked, S3Storage)
    bucket = S3Storage(asked.bucket, "")
    objects = _objects(bucket, asked.prefix, address)
    size = sum(found.bytes for found in objects)
    log.info("%s: %d object(s) of %s bytes in all", address, len(objects), f"{size:,}")
    listing = Listing(bucket, objects)
    path = RemotePath(listing, PurePosixPath(asked.prefix))
    if not path.exists():
        raise SourceError(
            f"source (={address!r}) is not there: there is no object of that key and none below "
            "it; look for it by `aws s3 ls`"
        )
    return path


def _objects(bucket: S3Storage, prefix: str, address: str) -> list[Object]:
    """The one object of a key, or those below it."""
    alone, refusal = None, None
    # A slash at the end says which of the two is meant.
    if prefix and not address.endswith("/"):
        try:
            alone = bucket.find(prefix)
        except StorageError as error:
            # A look has no reason in its answer; a listing has, or it may be allowed.
            refusal = error
    if alone and alone.bytes:
        return [alone]
    below = bucket.objects(f"{prefix}/" if prefix else "")
    if refusal and not below:
        raise refusal
    return below or ([alone] if alone else [])


def fetched(files: Iterable[AnyPath]) -> tuple[int, int]:
    """Those of some files that are fetched when they are read: how many, and their bytes."""
    sizes = [file.listed.bytes for file in files if isinstance(file, RemotePath)]
    return len(sizes), sum(sizes)
