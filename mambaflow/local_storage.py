"""A local folder as a storage."""

import contextlib
import errno
import shutil
import time
from pathlib import Path

from mambaflow.disk import appearing, partial_file, sync
from mambaflow.storage_base import Storage, is_hidden

# What a file system without hard links answers: a bucket that is mounted, exFAT, many SMB shares.
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
# Seconds that a folder which locks a name may be old.
LOCK_S = 10.0


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
        with appearing(self.root / key) as partial:
            partial.write_bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        with partial_file(self.root / key) as partial:
            partial.write_bytes(data)
            sync(partial)
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
        with appearing(self.root / key) as partial:
            shutil.copyfile(path, partial)

    def download(self, key: str, path: Path) -> None:
        with appearing(path) as partial:
            shutil.copyfile(self.root / key, partial)

    def list(self, prefix: str = "") -> list[str]:
        # A prefix is of the text of a key, as in S3: "b" finds b/1 and bc. Only the folder part of
        # it can be walked.
        folder = self.root / prefix.rpartition("/")[0]
        if not folder.is_dir():
            return []
        files = (p for p in folder.rglob("*") if p.is_file())
        keys = (p.relative_to(self.root).as_posix() for p in files)
        return sorted(key for key in keys if key.startswith(prefix) and not is_hidden(key))

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        super().delete_tree(prefix)
        # Folders, which S3 does not have, and what listings leave out.
        if prefix.endswith("/") and (self.root / prefix).is_dir():
            shutil.rmtree(self.root / prefix)
