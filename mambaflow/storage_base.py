"""What every storage does: files by key, behind one small class.

A key is a path below the storage's address, with '/' between parts.
"""

from abc import ABC, abstractmethod
from pathlib import Path


class StorageError(OSError):
    """Storage that refuses or cannot be reached; the message names it, the cause and a cure."""


def is_hidden(key: str) -> bool:
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
