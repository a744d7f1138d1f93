"""Where images come from: the embedded sample, CIFAR-10, Parquet files, a folder of images.

Here it is decided which of them an address is; each is a `Source` in a file of its own.
"""

import tarfile
from pathlib import Path

from mambaflow.data.cifar10 import CIFAR10_FOLDER, Cifar10, Cifar10Unopened
from mambaflow.data.folder_source import FolderSource
from mambaflow.data.parquet_source import Columns, ParquetSource
from mambaflow.data.remote import (
    STAGE_AGAIN,
    AnyPath,
    RemotePath,
    SourceError,
    is_remote,
    remote,
)
from mambaflow.data.sample import Sample
from mambaflow.data.source import Source, Unlabelled, digest
from mambaflow.data.tree import PARQUET, parquet, stray_parquet, with_pictures

# Names that jobs take for data which they stage themselves.
EMBEDDED = ("sample", "cifar10")


def open_source(
    address: str,
    download_to: Path | str = "data/torchvision",
    *,
    image_column: str = "",
    label_column: str = "",
    labels: str = "keep",
    listed: str = "",
) -> Source:
    """The source that a name or a path describes.

    Args:
        address: sample; cifar10; a folder in which torchvision keeps it, that folder's folder, or
            the archive that it came in; a Parquet file; a folder of Parquet files or of pictures
            (see `data.tree` for what of it is data). All but the names may lie in S3.
        image_column: of Parquet; "": img or image.
        label_column: of Parquet; "": label.
        labels: "ignore": no image has one.
        listed: of S3, what its files were when another process listed them; "": that is not asked.

    Raises:
        SourceError: it is none of these, or was another one.
        StorageError: it lies in S3, and cannot be read.
    """
    if label_column and labels != "keep":
        raise SourceError(
            f"label_column (={label_column!r}) names labels that labels (={labels!r}) leaves out; "
            "leave one of them out"
        )
    source = _open(
        address, Path(download_to), Columns(image_column, label_column, labels == "keep")
    )
    if (image_column or label_column) and not isinstance(source, ParquetSource):
        raise SourceError(
            f"image_column (={image_column!r}) and label_column (={label_column!r}) are of "
            f"Parquet, and source (={address!r}) is none; leave them out"
        )
    if is_remote(address):
        source.address = address  # with the slash that says that a folder is meant
    if files := [file for file in source.found().files if isinstance(file, RemotePath)]:
        now = _as_listed(files)
        _require_listed(source, files, now == (listed or now))
        source.options += (("listed", now),)
    return source if labels == "keep" else Unlabelled(source)


def _as_listed(files: list[RemotePath]) -> str:
    """A text that stands for what files were when they were listed."""
    about = (f"{file}\n{file.listed.bytes} {file.listed.etag}\n" for file in sorted(files))
    return digest(line.encode() for line in about)


def _require_listed(source: Source, files: list[RemotePath], same: bool) -> None:
    # Each process lists for itself: it must have found what the one that hashed the files did.
    if not same:
        last = max(files, key=lambda file: file.listed.modified)
        raise SourceError(
            f"the files of {source.address} are others than those that were found first: some were "
            f"changed, added or removed, maybe {last} on {last.listed.modified:%F %T %Z}; "
            f"{STAGE_AGAIN}"
        )


def _open(address: str, download_to: Path, columns: Columns) -> Source:
    if address == "sample":
        return Sample()
    if address == "cifar10":
        return Cifar10.downloaded(download_to)
    path = remote(address) if is_remote(address) else _named(address)
    if path.is_dir():
        return _open_folder(path, columns)
    if path.is_file():
        return _open_file(path, columns)
    raise SourceError(
        f"source (={address!r}) is none of: {', '.join(EMBEDDED)}, a .parquet file, a folder of "
        "them, a folder of images, any of these in s3://; a path must be one that every node sees"
    )


def _named(address: str) -> Path:
    """An absolute path, since other processes open it again from folders of their own."""
    path = Path(address).expanduser().absolute()
    # Its own name stays: a link is called what it is called, whatever it leads to.
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _open_folder(path: AnyPath, columns: Columns) -> Source:
    # torchvision's folder before a folder of images, which it would else be taken for.
    if (path / CIFAR10_FOLDER).is_dir():
        if others := with_pictures(path, CIFAR10_FOLDER):
            raise SourceError(
                f"{path} holds {CIFAR10_FOLDER}, and pictures in {others[0].name}/; give --source "
                f"{path / CIFAR10_FOLDER}, or the folder of those"
            )
        return Cifar10.of_folder(path / CIFAR10_FOLDER, path)
    if all((path / name).is_file() for name in ("data_batch_1", "test_batch")):
        return Cifar10.of_folder(path, path)
    tree = parquet(path)
    if tree is None and not (stray := stray_parquet(path)):
        return FolderSource(path)
    if tree is None:
        return _beside_parquet(path, stray)
    if "train" not in tree.files:
        raise SourceError(_no_training(path, [f.name for fs in tree.files.values() for f in fs]))
    return ParquetSource(tree.files, path, columns, tree)


def _beside_parquet(path: AnyPath, stray: list[str]) -> Source:
    """Pictures beside Parquet files that are no split of theirs, such as tables about them."""
    try:
        return FolderSource(path)
    except SourceError as error:
        raise SourceError(_no_training(path, stray)) from error


def _no_training(folder: AnyPath, names: list[str]) -> str:
    return f"{folder} holds no train*.parquet, only {names[:5]}; name one file"


def _open_file(path: AnyPath, columns: Columns) -> Source:
    # By what it is, where its name does not say it: a cache may have named it by a hash.
    with path.open("rb") as opened:
        is_parquet = path.suffix.lower() in PARQUET or opened.read(4) == b"PAR1"
        is_archive = not is_parquet and not opened.seek(0) and tarfile.is_tarfile(opened)
    if is_parquet:
        return ParquetSource({"train": [path]}, path, columns)
    if is_archive:
        return Cifar10.of_archive(path)
    raise SourceError(
        f"source (={str(path)!r}) is a file, and no .parquet file; give its folder, or unpack it "
        "and give what comes out"
    )


def embedded(name: str) -> Source:
    """An embedded data set, for what is told of its images; nothing is downloaded."""
    return Cifar10Unopened() if name == "cifar10" else open_source(name)
