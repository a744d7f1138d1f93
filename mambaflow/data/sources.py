"""Where images come from: the embedded sample, CIFAR-10, Parquet files, a folder of images.

A source has splits, and reads any places of one as uint8 images with labels and ids. The id of
an image is its place in its source, so that masks, which depend on it, never move.
"""

import hashlib
import logging
import pickle
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from jaxtyping import Int, UInt8
from PIL import Image

from mambaflow.data.decode import Pixels, decode
from mambaflow.data.found import Found, PassedOver
from mambaflow.data.random_bits import bits, uniform
from mambaflow.data.remote import (
    STAGE_AGAIN,
    AnyPath,
    RemotePath,
    SourceError,
    is_remote,
    remote,
)
from mambaflow.data.split_names import SPLITS, nearly_split
from mambaflow.data.tree import PARQUET, Tree, parquet, pictures, stray_parquet, with_pictures
from mambaflow.storage_base import StorageError

SPLIT_SEED = 20  # of the validation split, the same whatever the masks
# Names that jobs take for data which they stage themselves.
EMBEDDED = ("sample", "cifar10")
CIFAR10_FOLDER = "cifar-10-batches-py"
# Threads that read the files of a folder; digits of a whole sha256; bytes that are read at a time.
READERS, FULL, BLOCK = 8, 64, 8 * 2**20
# Columns of tables that say of which split a row is; words of one that are looked at.
SPLIT_COLUMNS, MANY = {"split", "subset", "partition", "usage", "set"}, 100
# Begins a folder's fingerprint: earlier versions' was of the names and sizes of its files.
OF_BYTES = "bytes_"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One image; `pixels` is None where it is corrupt, and `fault` says which one and how."""

    id: int
    label: int
    pixels: Pixels | None
    where: str
    fault: str = ""


class Source(ABC):
    """Images by split and place."""

    name: str
    address: str
    """What opens the source again, in any process that sees the same files."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Another one when the images are others."""

    @abstractmethod
    def count(self, split: str) -> int:
        """Images in "train", "test" or "validation"; 0 where there is no such split."""

    @abstractmethod
    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        """The images at some places of a split, in that order; quickest where places ascend."""

    options: tuple[tuple[str, str], ...] = ()
    """What was chosen of it beside the address, as `open_source` takes it."""

    def own_validation(self) -> int:
        """Images of a validation split of its own."""
        return 0

    def labels(self, split: str) -> Int[np.ndarray, " n"] | None:
        """The labels of a split, where no image need be read for them."""
        return None

    def found(self) -> Found:
        """What it holds, and what beside it was passed over."""
        counts = {"train": self.count("train"), "test": self.count("test")}
        return Found(counts | {"validation": self.own_validation()})

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        """Split -> (where its images are, their places).

        Args:
            validation: images to hold out of training, chosen by ranked random words of their
                places, so that the choice does not depend on the masks; of a source that has a
                validation split, all of that instead. As many again become the test split of a
                source that has none.
        """
        train, test, own = self.count("train"), self.count("test"), self.own_validation()
        cut = 0 if own else validation
        held = cut if test else cut + validation
        if held >= train or validation <= 0:
            cure = _fewer(train, parts=(not own) + (not test))
            raise SourceError(
                f"validation (={validation}) leaves nothing to train on: {self.name} has {train} "
                f"training and {test} test images; {cure}"
            )
        # A random word for each place, which hangs on nothing but the place: the same images are
        # held out by every staging of a source, and a larger validation split holds the smaller
        # one.
        rank = bits(SPLIT_SEED, "validation", 0, torch.arange(train), 1)[:, 0].argsort(stable=True)
        places = rank.numpy()
        return {
            # Ascending, so that a Parquet file's row groups are each read once.
            "train": ("train", np.sort(places[held:])),
            "validation": ("validation", np.arange(own)) if own
            else ("train", np.sort(places[:cut])),
            "test": ("test", np.arange(test)) if test
            else ("train", np.sort(places[cut:held])),
        }  # fmt: skip


def _fewer(train: int, parts: int) -> str:
    """What to do where too many of the training images are held out, in so many parts."""
    # One is left to train on.
    most = (train - 1) // parts if parts else train
    if most < 1:
        return f"no other number would do: give {parts + 1} training images or more"
    return f"use {min(max(1, train // 10), most)}, or more images"


class Unlabelled(Source):
    """A source whose images have no labels."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.address = source, source.name, source.address
        self.options = (*source.options, ("labels", "ignore"))

    @property
    def fingerprint(self) -> str:
        """Another one than with labels, which shards hold."""
        return f"{self.source.fingerprint}, labels ignored"

    def count(self, split: str) -> int:
        return self.source.count(split)

    def own_validation(self) -> int:
        return self.source.own_validation()

    def found(self) -> Found:
        return self.source.found()

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        return self.source.splits(validation)

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        return (replace(item, label=-1) for item in self.source.items(split, places))


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
    return _digest(line.encode() for line in about)


def _require_listed(source: Source, files: list[RemotePath], same: bool) -> None:
    # Each process lists for itself: it must have found what the one that hashed the files did.
    if not same:
        last = max(files, key=lambda file: file.listed.modified)
        raise SourceError(
            f"the files of {source.address} are others than those that were found first: some were "
            f"changed, added or removed, maybe {last} on {last.listed.modified:%F %T %Z}; "
            f"{STAGE_AGAIN}"
        )


def _open(address: str, download_to: Path, columns: "Columns") -> Source:
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


def _open_folder(path: AnyPath, columns: "Columns") -> Source:
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


def _open_file(path: AnyPath, columns: "Columns") -> Source:
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


def _digest(parts: Iterable[bytes], digits: int = 16) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:digits]


def decoded(id: int, label: int, data: bytes, where: str) -> Item:
    """An item from an encoded image; one that cannot be decoded keeps the reason."""
    try:
        return Item(id, label, decode(data), where)
    except Exception as error:  # whatever a decoder trips over, the image is at fault
        return Item(id, label, None, where, f"{where}: {error or type(error).__name__}")


@dataclass(frozen=True)
class RowGroup:
    """A part of a Parquet file, which is what is read at a time."""

    file: AnyPath
    number: int
    rows: int
    image: str
    label: str


@dataclass(frozen=True)
class Columns:
    """Which columns of Parquet are images and labels; "": the usual ones."""

    image: str = ""
    label: str = ""
    labelled: bool = True

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """What was chosen, as `open_source` takes it."""
        chosen = {"image_column": self.image, "label_column": self.label}
        return tuple((name, value) for name, value in chosen.items() if value)


class ParquetSource(Source):
    """The public CIFAR-10 Parquet layout: img (or image) struct<bytes, path>, label."""

    def __init__(
        self,
        files: dict[str, list[AnyPath]],
        path: AnyPath,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        tree: Tree | None = None,
    ) -> None:
        self.name, self.address, self.options = path.name, str(path), columns.options
        self.columns = columns
        self.files: dict[str, list[AnyPath]] = {"test": [], "train": []} | files
        self.tree = tree
        self.groups = {
            s: [g for f in fs for g in _groups(f, columns)] for s, fs in self.files.items()
        }
        # The row group in memory, the one last asked for: places that ascend read each once.
        self._open: tuple[RowGroup, pa.ChunkedArray, np.ndarray] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of every byte of the files."""
        # Of all of the data, hence cached.
        files = [file for split in sorted(self.files) for file in self.files[split]]
        chosen = "".join(f", {name} {value}" for name, value in self.columns.options)
        return _digest(part for file in files for part in _blocks(file)) + chosen

    def count(self, split: str) -> int:
        return sum(group.rows for group in self.groups.get(split, []))

    def own_validation(self) -> int:
        return self.count("validation")

    def found(self) -> Found:
        counts = {split: self.count(split) for split in SPLITS}
        files = tuple(_all(self.files))
        passed = self.tree.passed if self.tree else PassedOver()
        return Found(counts, (), passed, files)

    @cached_property
    def _labels(self) -> dict[str, np.ndarray]:
        none = np.empty(0, np.int64)
        return {
            split: np.concatenate([none, *map(_only_labels, groups)])
            for split, groups in self.groups.items()
        }

    def labels(self, split: str) -> Int[np.ndarray, " n"] | None:
        return self._labels[split]

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        groups = self.groups[split]
        ends = np.cumsum([group.rows for group in groups])
        # side="right": the place at a group's end is the next one's first.
        numbers = np.searchsorted(ends, places, side="right")
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            encoded, labels = self._columns(groups[number])
            row = place - int(ends[number]) + groups[number].rows
            where = f"{self.name}, {split} row {place}"
            # A row without an image is corrupt as one with no bytes is: a fault, not an exception.
            yield decoded(place, int(labels[row]), encoded[row].as_py() or b"", where)

    def _columns(self, group: RowGroup) -> tuple[pa.ChunkedArray, np.ndarray]:
        """Encoded images and labels (-1 where there is none) of the row group last asked for."""
        if self._open is None or self._open[0] is not group:
            # The two columns alone: what else a release holds is not read.
            names = [group.image, group.label] if group.label else [group.image]
            table = _parquet(group.file).read_row_group(group.number, names)
            # The images stay encoded in Arrow's memory, and are decoded one at a time.
            cells = pc.struct_field(table[group.image], "bytes")
            self._open = group, cells, _labels_of(table, group)
        return self._open[1:]


def _only_labels(group: RowGroup) -> np.ndarray:
    names = [group.label] if group.label else []
    return _labels_of(_parquet(group.file).read_row_group(group.number, names), group)


def _labels_of(table: pa.Table, group: RowGroup) -> np.ndarray:
    if not group.label:
        return np.full(group.rows, -1)
    try:
        # Before nulls are filled: an unsigned column would not take the -1.
        labels = table[group.label].cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{group.file} has labels beyond 64 bits ({error}); leave them out by --labels ignore"
        ) from error
    return pc.fill_null(labels, -1).to_numpy()


def _parquet(file: AnyPath) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.open("rb") if isinstance(file, RemotePath) else file)
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file} is not whole Parquet: {error}; fetch it again") from error


def _groups(file: AnyPath, columns: Columns) -> list[RowGroup]:
    """The row groups of a file whose columns are those of images.

    Raises:
        SourceError: the file is damaged, or another kind of table.
    """
    # The footer alone: a folder is refused before any image is read.
    opened = _parquet(file)
    about = opened.metadata
    image, label = _columns_of(file, opened.schema_arrow, columns)
    _refuse_rows_of_splits(file, opened)
    return [
        RowGroup(file, number, about.row_group(number).num_rows, image, label)
        for number in range(about.num_row_groups)
    ]


def _refuse_rows_of_splits(file: AnyPath, opened: pq.ParquetFile) -> None:
    """Refuse a table that says in a column of which split each row is."""
    for kind in opened.schema_arrow:
        # Text, or a dictionary of it.
        if kind.name.lower() in SPLIT_COLUMNS and "string" in str(kind.type):
            words = pc.unique(opened.read([kind.name])[kind.name].combine_chunks()).to_pylist()
            named = {nearly_split(word or "") for word in words[:MANY]} - {""}
            if len(named) > 1:
                raise SourceError(
                    f"{file} holds rows of several splits, by its column {kind.name} "
                    f"({', '.join(map(str, words[:5]))}); write each split to a file of its own"
                )


def _columns_of(file: AnyPath, schema: pa.Schema, columns: Columns) -> tuple[str, str]:
    """The columns of images and labels, the second "" where labels are not wanted."""
    kinds = f"columns {dict(zip(schema.names, map(str, schema.types), strict=True))}"
    usual = [columns.image] if columns.image else ["img", "image"]
    there = [name for name in usual if name in schema.names]
    if len(there) > 1:
        raise SourceError(f"{file} has {kinds}: both img and image; choose by --image-column")
    image = there[0] if there else None
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise SourceError(f"{file} has {twice[0]} twice among its columns; rename one of them")
    label = (columns.label or "label") if columns.labelled else ""
    if image is None or (label and label not in schema.names):
        raise SourceError(
            f"{file} has {kinds}; it must have {' (or '.join(usual)}{')' * (len(usual) > 1)}"
            f"{' and ' * bool(label)}{label}; choose by --image-column and --label-column, or "
            "leave labels out by --labels ignore"
        )
    kind = schema.field(image).type
    encoded = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    encoded = encoded and str(kind.field("bytes").type).removeprefix("large_") == "binary"
    if not encoded or (label and not pa.types.is_integer(schema.field(label).type)):
        raise SourceError(
            f"{file} has {kinds}; {image} must be struct<bytes, path> of encoded pictures"
            f"{' and ' * bool(label)}{label}{' an integer' * bool(label)}; choose by "
            "--image-column and --label-column, or leave labels out by --labels ignore"
        )
    return image, label


def _blocks(file: AnyPath) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            yield block


def _all(files: dict[str, list[AnyPath]]) -> list[AnyPath]:
    return [file for split in files.values() for file in split]


def _ahead(files: list[AnyPath]) -> Iterator[bytes]:
    """What files hold, in their order; a few are read at once, since some storage is far away."""
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(files), READERS):
            yield from pool.map(lambda file: file.read_bytes(), files[first : first + READERS])


class FolderSource(Source):
    """Images in a folder for each class, sorted by name; what of a folder they are: `data.tree`."""

    def __init__(self, root: AnyPath) -> None:
        self.root, self.name, self.address = root, root.name, str(root)
        self.tree = pictures(root)
        self.files: dict[str, list[AnyPath]] = {"test": [], "train": []} | self.tree.files
        if not self.files["train"]:
            raise SourceError(self._nothing())
        # Labels are places among the training classes, in the order of their names. A class that is
        # in the test split alone has no label, -1; nor has an image without a class.
        named = {self.tree.class_of("train", f) for f in self.files["train"]} - {None}
        self.classes = sorted(map(str, named))

    def _nothing(self) -> str:
        # A folder that has other splits, and no training split, is told where that would be.
        train = self.root if self.root in self.tree.split_folders.values() else self.root / "train"
        seen = "".join(f"; {line}" for line in self.tree.passed.lines()[:3])
        return f"{self.root} holds no images in class folders; put them in {train}/CLASS/NAME{seen}"

    @cached_property
    def fingerprint(self) -> str:
        """Of every byte of the files, in their order, with their splits and labels."""
        # All that shards are made of, and nothing else: files by other names are the same images,
        # and a file of the same name, size and time may hold another one.
        files = [(split, file) for split in sorted(self.files) for file in self.files[split]]
        with ThreadPoolExecutor(READERS) as pool:
            digests = pool.map(lambda one: _digest(_blocks(one[1]), FULL), files)
            about = (
                f"{split} {self._of(split, file)} {digest}\n"
                for (split, file), digest in zip(files, digests, strict=True)
            )
            return OF_BYTES + _digest(line.encode() for line in about)

    def count(self, split: str) -> int:
        return len(self.files.get(split, []))

    def own_validation(self) -> int:
        return self.count("validation")

    def found(self) -> Found:
        counts = {split: self.count(split) for split in SPLITS}
        lost = {split: self._lost(split) for split in SPLITS if self._lost(split)}
        return Found(counts, tuple(self.classes), self.tree.passed, tuple(_all(self.files)), lost)

    def _lost(self, split: str) -> tuple[str, ...]:
        """Classes that training has not."""
        named = {self.tree.class_of(split, f) for f in self.files.get(split, [])} - {None}
        return tuple(sorted(map(str, named - {*self.classes}))) if self.classes else ()

    @cached_property
    def _label(self) -> dict[str | None, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def labels(self, split: str) -> Int[np.ndarray, " n"] | None:
        return np.array([self._of(split, f) for f in self.files.get(split, [])], np.int64)

    def _of(self, split: str, file: AnyPath) -> int:
        return self._label.get(self.tree.class_of(split, file), -1)

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        files = [self.files[split][place] for place in places.tolist()]
        for place, file, data in zip(places.tolist(), files, _ahead(files), strict=True):
            yield decoded(place, self._of(split, file), data, str(file))


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


class _Cifar10Unopened(Source):
    """What is known of CIFAR-10 without its files."""

    name = address = "cifar10"
    fingerprint = Cifar10.fingerprint

    def count(self, split: str) -> int:
        return {"train": 50_000, "test": 10_000}[split]

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        raise SourceError("CIFAR-10 was not opened")


def embedded(name: str) -> Source:
    """An embedded data set, for what is told of its images; nothing is downloaded."""
    return _Cifar10Unopened() if name == "cifar10" else open_source(name)


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


# Photographs inside packages that are installed anyway; no photograph is in two splits.
# camera.png and coins.png are grey, and become three equal channels.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "flower.jpg", "motorcycle_left.png", "rocket.jpg", "camera.png",
              "ihc.png", "retina.jpg", "coins.png"),
    "validation": ("coffee.png", "grace_hopper.jpg"),
    "test": ("chelsea.png", "china.jpg"),
}  # fmt: skip
KEPT_IN = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}
# A test pins the crops: other numbers below are another data set, and measured figures with it.
SAMPLE_COUNTS = {"train": 4096, "validation": 256, "test": 512}
SAMPLE_SEED, SAMPLE_SIZE = 7, 32
# 9 takes 288 pixels a side; the smallest photograph, chelsea.png, is 300 high. CONTRAST is what the
# standard deviation of a crop's strongest channel must exceed, in bytes.
REDUCTIONS = range(2, 10)
CONTRAST, TRIES = 16.0, 8


@cache
def photograph(name: str) -> Pixels:
    """A photograph from an installed package."""
    # find_spec finds a package's folder without importing it.
    for package, folder in KEPT_IN.items():
        found = find_spec(package)
        if found is not None and found.origin is not None:
            file = Path(found.origin).parent / folder / name
            if file.is_file():
                # Its numbers as they stand: rocket.jpg is in Adobe RGB, and the sample, which is
                # pinned, was cut from what it says as if that were sRGB.
                with Image.open(file) as image:
                    return np.asarray(image.convert("RGB"))
    raise SourceError(f"photograph {name} is in none of {list(KEPT_IN)}; install scikit-image, "
                      "scikit-learn and matplotlib as constraints.txt says")  # fmt: skip


class Sample(Source):
    """The embedded sample: 32 x 32 crops of real photographs, each reduced 2 to 9 times by area.

    Photograph, reduction, place and mirroring are functions of (split, crop number). Crops of
    little contrast, of which sky and background have many, are drawn again, a few times at most.
    """

    name = address = "sample"

    @property
    def fingerprint(self) -> str:
        """Of the photographs."""
        return _digest(photograph(n).tobytes() for names in PHOTOGRAPHS.values() for n in names)

    def count(self, split: str) -> int:
        return SAMPLE_COUNTS[split]

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        """Its own, from other photographs; `validation` takes the first of them."""
        most = SAMPLE_COUNTS["validation"]
        if validation > most:
            raise SourceError(f"validation (={validation}) must be at most {most}, all that the "
                              f"sample has; use {most}")  # fmt: skip
        counts = SAMPLE_COUNTS | {"validation": validation}
        return {split: (split, np.arange(count)) for split, count in counts.items()}

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        # Five numbers a try, for all tries at once: photograph, reduction, across, down, mirror.
        draws = uniform(SAMPLE_SEED, f"sample/{split}", 0, torch.from_numpy(places), 5 * TRIES)
        tries = draws.view(-1, TRIES, 5).tolist()
        for place, chances in zip(places.tolist(), tries, strict=True):
            yield _crop_with_contrast(split, place, chances)


def _crop_with_contrast(split: str, place: int, chances: list[list[float]]) -> Item:
    names = PHOTOGRAPHS[split]
    for which, *how in chances:
        label = int(which * len(names))
        crop = _crop(photograph(names[label]), *how)
        if crop.std((0, 1)).max() > CONTRAST:
            break
    # The last try is kept, whatever its contrast.
    return Item(place, label, crop, f"sample, {split} {place}")


def _crop(
    image: Pixels, reduction: float, across: float, down: float, mirror: float
) -> UInt8[np.ndarray, "32 32 3"]:
    # Draws are below 1: no index is beyond its end.
    factor = REDUCTIONS[int(reduction * len(REDUCTIONS))]
    side = SAMPLE_SIZE * factor
    top, left = int(down * (image.shape[0] - side)), int(across * (image.shape[1] - side))
    # The mean of each factor x factor block, rounded to the nearest byte.
    blocks = image[top : top + side, left : left + side].reshape(
        SAMPLE_SIZE, factor, SAMPLE_SIZE, factor, 3
    )
    crop = (blocks.mean((1, 3)) + 0.5).astype(np.uint8)
    # A view that runs backwards; it is copied when the crops of a shard are stacked.
    return crop[:, ::-1] if mirror < 0.5 else crop
