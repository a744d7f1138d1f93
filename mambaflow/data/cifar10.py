"""CIFAR-10 as a source: downloaded, in the folder of its files, or in the archive of them."""

import hashlib
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from filelock import FileLock
from jaxtyping import Int, UInt8

from mambaflow.data.remote import AnyPath, SourceError
from mambaflow.data.source import Item, Source
from mambaflow.storage_base import StorageError

CIFAR10_FOLDER = "cifar-10-batches-py"


@dataclass(frozen=True)
class Batches:
    """A split of CIFAR-10."""

    images: UInt8[np.ndarray, "n 32 32 3"]
    labels: list[int]


class Cifar10(Source):
    """CIFAR-10 as it is published, in six files; all of it is held in memory.

    Args:
        read: gives a file's bytes by its name.
        address: see `Source`.

    Raises:
        SourceError: a file is not there, or not the published one.
        StorageError: one cannot be fetched.
    """

    name = "cifar10"
    fingerprint = "cifar-10-python"  # the files are compared with their known checksums

    def __init__(self, read: Callable[[str], bytes], address: str) -> None:
        self.address = address
        try:
            self.sets = {split: _batches(read, names) for split, names in _published().items()}
        except StorageError:
            raise
        except OSError as error:
            raise SourceError(_not_cifar10("read in", address, error)) from error

    @classmethod
    def downloaded(cls, folder: Path) -> "Cifar10":
        """From a folder where torchvision keeps it, which is fetched once, by one process."""
        # Here and not above: who stages other data does not wait for torchvision.
        from torchvision.datasets import CIFAR10

        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Of several jobs that begin at once one downloads; the others wait, and find it.
            with FileLock(folder / "download.lock"):
                CIFAR10(str(folder.resolve()), download=True)
        except (OSError, RuntimeError) as error:
            raise SourceError(_not_cifar10("downloaded to", str(folder), error)) from error
        return cls.of_folder(folder.resolve() / CIFAR10_FOLDER, folder.resolve())

    @classmethod
    def of_folder(cls, files: AnyPath, address: AnyPath) -> "Cifar10":
        """From the folder that its files are in."""
        return cls(lambda name: (files / name).read_bytes(), str(address))

    @classmethod
    def of_archive(cls, archive: AnyPath) -> "Cifar10":
        """From the archive that it is published in, or another of the same files.

        Raises:
            SourceError: it is of other files.
        """
        wanted = {name for files in _published().values() for name, _ in files}
        found = _unpacked(archive, wanted)
        if wanted - found.keys():
            raise SourceError(
                f"{archive} is no archive of {CIFAR10_FOLDER}; unpack it, and give the folder"
            )
        return cls(found.__getitem__, str(archive))

    def labels(self, split: str) -> Int[np.ndarray, " n"] | None:
        return np.array(self.sets[split].labels, np.int64) if split in self.sets else None

    def count(self, split: str) -> int:
        return len(self.sets[split].labels)

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        data = self.sets[split]
        for place in places.tolist():
            where = f"cifar10, {split} {place}"
            yield Item(place, data.labels[place], data.images[place], where)


def _published() -> dict[str, list[tuple[str, str]]]:
    """CIFAR-10's files by split, each with its MD5."""
    from torchvision.datasets import CIFAR10

    return {"train": [*map(tuple, CIFAR10.train_list)], "test": [*map(tuple, CIFAR10.test_list)]}


def _batches(read: Callable[[str], bytes], files: list[tuple[str, str]]) -> Batches:
    """The images and labels of some files.

    Raises:
        OSError: one is not there, or damaged.
    """
    images, labels = [], []
    for name, digest in files:
        data = read(name)
        # Before it is unpickled, which would run what another file says.
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != digest:
            raise OSError(f"{name} is not the published file")
        batch = pickle.loads(data, encoding="latin1")
        images.append(batch["data"])
        labels += batch["labels"]
    return Batches(np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


def _not_cifar10(what: str, where: str, error: Exception) -> str:
    return (
        f"CIFAR-10 could not be {what} {where} ({error}); offline, use --source FILE.parquet (its "
        "public Parquet release), --source FOLDER of images, or --source sample"
    )


def _unpacked(archive: AnyPath, names: set[str]) -> dict[str, bytes]:
    """The files of some names, wherever in the archive they are."""
    found = {}
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=file) as opened:
            for member in opened:
                name = PurePosixPath(member.name).name
                if name in names and (data := opened.extractfile(member)):
                    found[name] = data.read()
    except StorageError:
        raise
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{archive} is not whole ({error}); fetch it again") from error
    return found


class Cifar10Unopened(Source):
    """What is known of CIFAR-10 without its files."""

    name = address = "cifar10"
    fingerprint = Cifar10.fingerprint

    def count(self, split: str) -> int:
        return {"train": 50_000, "test": 10_000}[split]

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        raise SourceError("CIFAR-10 was not opened")
