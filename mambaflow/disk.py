"""Files on a disk of this machine: each appears whole, and a disk that is full is said by name."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mambaflow.storage_base import StorageError

# What a file system answers that has no room, or no more for this user.
FULL = {errno.ENOSPC, errno.EDQUOT}


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


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
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
    # mkstemp's files are for their owner alone; a run's may be read by others. Not where all files
    # are somebody else's or have no mode, as on many SMB shares and mounted buckets.
    with contextlib.suppress(OSError):
        os.fchmod(handle, 0o644)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is whole, and on the disk."""
    with partial_file(path) as partial:
        yield partial
        # Before the rename: after a power cut some file systems would have the name without the
        # bytes.
        sync(partial)
        partial.replace(path)


def sync(path: Path) -> None:
    # fsync is of the file, whichever descriptor wrote to it; SMB refuses one that only reads.
    with path.open("r+b") as file:
        os.fsync(file.fileno())
