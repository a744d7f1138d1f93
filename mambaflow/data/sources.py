"""Where images come from: the embedded sample, CIFAR-10, Parquet files, a folder of images.

A source has splits, and reads any places of one as uint8 images with labels and ids. The id of
an image is its place in its source, so that masks, which depend on it, never move.
"""

import hashlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from jaxtyping import Int, UInt8
from PIL import Image

from mambaflow.data.random_bits import bits, uniform

SPLIT_SEED = 20  # of the validation split, the same whatever the masks
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# Names that jobs take for data which they stage themselves.
EMBEDDED = ("sample", "cifar10")
CIFAR10_FOLDER = "cifar-10-batches-py"
log = logging.getLogger(__name__)
Pixels = UInt8[np.ndarray, "h w 3"]


class SourceError(ValueError):
    """Images that cannot be had or used; the message says what to do instead."""


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
        """Images in "train" or "test"; 0 where there is no such split."""

    @abstractmethod
    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        """The images at some places of a split, in that order; quickest where places ascend."""

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        """Split -> (where its images are, their places).

        Args:
            validation: images to hold out of training, chosen by ranked random words of their
                places, so that the choice does not depend on the masks. As many again become
                the test split of a source that has none.
        """
        train, test = self.count("train"), self.count("test")
        held = validation if test else 2 * validation
        if not 0 < held < train:
            raise SourceError(
                f"validation (={validation}) leaves nothing to train on: {self.name} has {train} "
                f"training and {test} test images; use {max(1, train // 10)}, or more images"
            )
        # A random word for each place, which hangs on nothing but the place: the same images are
        # held out by every staging of a source, and a larger validation split holds the smaller
        # one.
        rank = bits(SPLIT_SEED, "validation", 0, torch.arange(train), 1)[:, 0].argsort(stable=True)
        places = rank.numpy()
        return {
            # Ascending, so that a Parquet file's row groups are each read once.
            "train": ("train", np.sort(places[held:])),
            "validation": ("train", np.sort(places[:validation])),
            "test": ("test", np.arange(test)) if test
            else ("train", np.sort(places[validation:held])),
        }  # fmt: skip


def open_source(address: str, download_to: Path = Path("data/torchvision")) -> Source:
    """The source that a name or a path describes.

    Args:
        address: sample; cifar10; a folder in which torchvision keeps it; a .parquet file, or a
            folder with train*.parquet and test*.parquet; a folder of images with one folder for
            each class (inside train/ and test/, or at its top for training alone).

    Raises:
        SourceError: it is none of these.
    """
    if address == "sample":
        return Sample()
    if address == "cifar10":
        return Cifar10(download_to, download=True)
    # Absolute, since other processes open it again from folders of their own.
    path = Path(address).expanduser().resolve()
    if path.is_file() and path.suffix == ".parquet":
        return ParquetSource({"train": [path], "test": []}, path)
    if path.is_dir():
        # torchvision's folder before a folder of images, which it would else be taken for.
        if (path / CIFAR10_FOLDER).is_dir():
            return Cifar10(path, download=False)
        files = sorted(path.glob("*.parquet"))
        return ParquetSource(_parquet_splits(path, files), path) if files else FolderSource(path)
    raise SourceError(
        f"source (={address!r}) is none of: {', '.join(EMBEDDED)}, a .parquet file, a folder of "
        "them, a folder of images; a path must be one that every node sees"
    )


def _parquet_splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits = {s: [f for f in files if f.name.startswith(s)] for s in ("train", "test")}
    if not splits["train"]:
        raise SourceError(
            f"{folder} holds no train*.parquet, only {[f.name for f in files][:5]}; name one file"
        )
    # One data set has one training file; other encodings of the same images stay out.
    exact = [f for f in splits["train"] if f.stem == "train"]
    return splits | {"train": exact or splits["train"]}


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def decoded(id: int, label: int, data: bytes, where: str) -> Item:
    """An item from an encoded image; one that cannot be decoded keeps the reason."""
    try:
        return Item(id, label, _decode(data), where)
    except Exception as error:  # whatever a decoder trips over, the image is at fault
        return Item(id, label, None, where, f"{where}: {error or type(error).__name__}")


def _decode(data: bytes) -> Pixels:
    # PIL reads only the header here, and decodes in `convert`, which raises where data are cut off.
    # Grey, palette and transparent images become RGB.
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "PNG":
            return np.asarray(image.convert("RGB"))
        image.verify()  # PNG has checksums, which decoding alone does not look at
    # Opened anew: `verify` leaves an image that cannot be read any more.
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class RowGroup:
    """A part of a Parquet file, which is what is read at a time."""

    file: Path
    number: int
    rows: int
    image: str


class ParquetSource(Source):
    """The public CIFAR-10 Parquet layout: img (or image) struct<bytes, path>, label."""

    def __init__(self, files: dict[str, list[Path]], path: Path) -> None:
        self.name, self.address = path.name, str(path)
        self.files = files
        self.groups = {split: [g for f in fs for g in _groups(f)] for split, fs in files.items()}
        # The row group in memory, the one last asked for: places that ascend read each once.
        self._open: tuple[RowGroup, pa.ChunkedArray, np.ndarray] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of every byte of the files."""
        # Of all of the data, hence cached.
        files = [file for split in sorted(self.files) for file in self.files[split]]
        return _digest(part for file in files for part in _blocks(file))

    def count(self, split: str) -> int:
        return sum(group.rows for group in self.groups[split])

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
            table = _parquet(group.file).read_row_group(group.number, [group.image, "label"])
            labels = pc.fill_null(table["label"], -1).to_numpy()
            # The images stay encoded in Arrow's memory, and are decoded one at a time.
            self._open = group, pc.struct_field(table[group.image], "bytes"), labels
        return self._open[1:]


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file} is not whole Parquet: {error}; fetch it again") from error


def _groups(file: Path) -> list[RowGroup]:
    """The row groups of a file whose columns are those of images.

    Raises:
        SourceError: the file is damaged, or another kind of table.
    """
    # The footer alone: a folder is refused before any image is read.
    opened = _parquet(file)
    schema, about = opened.schema_arrow, opened.metadata
    image = next((name for name in ("img", "image") if name in schema.names), None)
    kinds = f"columns {dict(zip(schema.names, map(str, schema.types), strict=True))}"
    if image is None or "label" not in schema.names:
        raise SourceError(f"{file} has {kinds}; it must have img (or image) and label")
    kind = schema.field(image).type
    encoded = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not encoded or not pa.types.is_integer(schema.field("label").type):
        raise SourceError(
            f"{file} has {kinds}; {image} must be struct<bytes, path> and label an integer"
        )
    return [
        RowGroup(file, number, about.row_group(number).num_rows, image)
        for number in range(about.num_row_groups)
    ]


def _blocks(file: Path, size: int = 2**20) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(size):
            yield block


class FolderSource(Source):
    """Images in a folder for each class, sorted by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.name, self.address = root, root.name, str(root)
        # A folder without train/ and test/ is training alone; `splits` cuts the test split from it.
        train = root / "train" if (root / "train").is_dir() else root
        self.files = {"train": _images(train), "test": _images(root / "test")}
        if not self.files["train"]:
            raise SourceError(
                f"{root} holds no images in class folders; put them in {train}/CLASS/NAME.png"
            )
        # Labels are places among the training classes, in the order of their names. A class that is
        # in the test split alone has no label, -1.
        self.classes = sorted({f.parent.name for f in self.files["train"]})

    @cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of the files."""
        files = [file for split in sorted(self.files) for file in self.files[split]]
        # Of sizes and not of bytes, which would read every file: an image that is replaced by one
        # of the same size goes unnoticed.
        names = (f"{f.relative_to(self.root)} {f.stat().st_size}\n" for f in files)
        return _digest(name.encode() for name in names)

    def count(self, split: str) -> int:
        return len(self.files[split])

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        for place in places.tolist():
            file = self.files[split][place]
            known = file.parent.name in self.classes
            label = self.classes.index(file.parent.name) if known else -1
            yield decoded(place, label, file.read_bytes(), str(file))


def _images(root: Path) -> list[Path]:
    # Sorted: an image's id is its place, and a file system lists in any order.
    return sorted(f for f in root.glob("*/*") if f.suffix.lower() in IMAGE_SUFFIXES)


class Cifar10(Source):
    """CIFAR-10 as torchvision keeps it, downloaded once by one process."""

    name = "cifar10"
    fingerprint = "cifar-10-python"  # torchvision compares the files with their known checksums

    def __init__(self, folder: Path, *, download: bool) -> None:
        # Here and not above: who stages other data does not wait for torchvision.
        from torchvision.datasets import CIFAR10

        self.address = str(folder.resolve())
        try:
            if download:
                folder.mkdir(parents=True, exist_ok=True)
                # Of several jobs that begin at once one downloads; the others wait, and find it.
                with FileLock(folder / "download.lock"):
                    CIFAR10(self.address, download=True)
            self.sets = {s: CIFAR10(self.address, train=s == "train") for s in ("train", "test")}
        except (OSError, RuntimeError) as error:
            raise SourceError(
                f"CIFAR-10 could not be {'downloaded to' if download else 'read in'} {folder} "
                f"({error}); offline, use --source FILE.parquet (its public Parquet release), "
                "--source FOLDER of images, or --source sample"
            ) from error

    def count(self, split: str) -> int:
        return len(self.sets[split].targets)

    def items(self, split: str, places: Int[np.ndarray, " m"]) -> Iterator[Item]:
        data = self.sets[split]
        for place in places.tolist():
            yield Item(place, data.targets[place], data.data[place], f"cifar10, {split} {place}")


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
                return _decode(file.read_bytes())
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
