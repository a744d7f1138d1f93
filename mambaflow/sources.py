"""Where images come from: the embedded sample, CIFAR-10, Parquet files, a folder of images.

A source has splits, and reads any range of one as uint8 images with labels and ids. The id of an
image is its place in its source, so that masks, which depend on it, never move.
"""

import io
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mambaflow.randomness import uniform, words

SPLIT_SEED = 20  # of the validation split, the same whatever the masks
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
EMBEDDED = ("sample", "cifar10")
log = logging.getLogger(__name__)
Pixels = UInt8[np.ndarray, "h w 3"]


class SourceError(ValueError):
    """Images that cannot be had or used; the message says what to do instead."""


@dataclass(frozen=True)
class Item:
    """One image; `pixels` is None where it is corrupt, and `fault` says how."""

    id: int
    label: int
    pixels: Pixels | None
    fault: str = ""


class Source(ABC):
    """Images by split and place."""

    name: str

    @abstractmethod
    def count(self, split: str) -> int:
        """Images in "train" or "test"; 0 where there is no such split."""

    @abstractmethod
    def item(self, split: str, place: int) -> Item:
        """One image of a split."""

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        """Split -> (where its images are, their places); validation is cut from training.

        Args:
            validation: images to hold out of training, chosen by ranked random words of their
                places, so that the choice does not depend on the masks.
        """
        train, test = self.count("train"), self.count("test")
        if not 0 < validation < train:
            raise SourceError(
                f"validation (={validation}) must be in [1, {train - 1}], as {self.name} has "
                f"{train} training images; use {max(1, train // 10)}"
            )
        rank = words(SPLIT_SEED, "validation", 0, torch.arange(train), 1)[:, 0].argsort(stable=True)
        parts = {
            "train": ("train", np.sort(rank[validation:].numpy())),
            "validation": ("train", np.sort(rank[:validation].numpy())),
        }
        return parts | ({"test": ("test", np.arange(test))} if test else {})


def open_source(spec: str, download_to: Path = Path("data/torchvision")) -> Source:
    """The source that a name or a path describes.

    Args:
        spec: sample, cifar10, a .parquet file, a folder of them, or a folder of images with one
            folder for each class (inside train/ and test/, or at its top for training alone).

    Raises:
        SourceError: it is none of these.
    """
    if spec == "sample":
        return Sample()
    if spec == "cifar10":
        return Cifar10(download_to)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return ParquetSource({"train": [path]}, path.name)
    if path.is_dir() and (files := sorted(path.glob("*.parquet"))):
        return ParquetSource(_parquet_splits(files), path.name)
    if path.is_dir():
        return FolderSource(path)
    raise SourceError(
        f"source (={spec!r}) is none of: {', '.join(EMBEDDED)}, a .parquet file, a folder of "
        ".parquet files, a folder of images"
    )


def _parquet_splits(files: list[Path]) -> dict[str, list[Path]]:
    splits = {s: [f for f in files if f.name.startswith(s)] for s in ("train", "test")}
    # One data set has one training file; other encodings of the same images stay out.
    exact = [f for f in splits["train"] if f.stem == "train"]
    return {"train": exact or splits["train"], "test": splits["test"]}


def _decode(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def decoded(id: int, label: int, data: bytes, where: str) -> Item:
    """An item from an encoded image; one that cannot be decoded keeps the reason."""
    try:
        return Item(id, label, _decode(data))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return Item(id, label, None, f"{where}: {error}")


class ParquetSource(Source):
    """The public CIFAR-10 Parquet layout: img (or image) struct<bytes, path>, label."""

    def __init__(self, files: dict[str, list[Path]], name: str) -> None:
        self.files, self.name = files, name

    @cached_property
    def _tables(self) -> dict[str, pa.Table]:
        return {split: _table(files) for split, files in self.files.items() if files}

    def count(self, split: str) -> int:
        table = self._tables.get(split)
        return 0 if table is None else table.num_rows

    def item(self, split: str, place: int) -> Item:
        row = self._tables[split].slice(place, 1).to_pylist()[0]
        label = -1 if row["label"] is None else row["label"]
        where = f"{self.name}, split {split}, row {place}"
        data = (row["image"] or {}).get("bytes") or b""
        return decoded(place, label, data, where)


def _table(files: list[Path]) -> pa.Table:
    parts = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file} is not whole Parquet: {error}; fetch it again") from error
        image = next((c for c in ("img", "image") if c in table.column_names), None)
        if image is None or "label" not in table.column_names:
            raise SourceError(
                f"{file} has columns {table.column_names}; it must have img (or image) and label"
            )
        parts.append(table.select([image, "label"]).rename_columns(["image", "label"]))
    return pa.concat_tables(parts)


class FolderSource(Source):
    """Images in a folder for each class, sorted by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name
        train = root / "train" if (root / "train").is_dir() else root
        self.files = {"train": _images(train), "test": _images(root / "test")}
        if not self.files["train"]:
            raise SourceError(
                f"{root} holds no images in class folders; put them in {root}/CLASS/NAME.png"
            )
        self.classes = sorted({f.parent.name for f in self.files["train"]})

    def count(self, split: str) -> int:
        return len(self.files[split])

    def item(self, split: str, place: int) -> Item:
        file = self.files[split][place]
        known = file.parent.name in self.classes
        label = self.classes.index(file.parent.name) if known else -1
        return decoded(place, label, file.read_bytes(), str(file))


def _images(root: Path) -> list[Path]:
    return sorted(f for f in root.glob("*/*") if f.suffix.lower() in IMAGE_SUFFIXES)


class Cifar10(Source):
    """CIFAR-10 through torchvision, downloaded once."""

    name = "cifar10"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _sets(self) -> dict[str, tuple[np.ndarray, list[int]]]:
        from torchvision.datasets import CIFAR10

        try:
            sets = {
                split: CIFAR10(str(self.folder), train=split == "train", download=True)
                for split in ("train", "test")
            }
        except (OSError, RuntimeError) as error:
            raise SourceError(
                f"CIFAR-10 could not be downloaded to {self.folder} ({error}); offline, use "
                "--source FILE.parquet (its public Parquet release), --source FOLDER, or "
                "--source sample"
            ) from error
        return {split: (data.data, data.targets) for split, data in sets.items()}

    def count(self, split: str) -> int:
        return len(self._sets[split][1])

    def item(self, split: str, place: int) -> Item:
        images, labels = self._sets[split]
        return Item(place, labels[place], images[place])


# Photographs inside the scikit-image and scikit-learn packages; no photograph in two splits.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "flower.jpg", "motorcycle_left.png", "rocket.jpg", "retina.jpg",
              "hubble_deep_field.jpg", "ihc.png"),
    "validation": ("coffee.png",),
    "test": ("chelsea.png", "china.jpg"),
}  # fmt: skip
SAMPLE_COUNTS = {"train": 4096, "validation": 256, "test": 512}
SAMPLE_SEED, SAMPLE_SIZE = 7, 32
REDUCTIONS = (2, 3, 4, 5, 6)
FLAT_STD, TRIES = 8.0, 8


@cache
def photograph(name: str) -> Pixels:
    """A photograph from an installed package."""
    import skimage
    import sklearn

    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    )
    for folder in folders:
        if (folder / name).is_file():
            with Image.open(folder / name) as image:
                return np.asarray(image.convert("RGB"))
    raise SourceError(f"photograph {name} is in neither {folders[0]} nor {folders[1]}; install "
                      "scikit-image and scikit-learn")  # fmt: skip


class Sample(Source):
    """The embedded sample: 32 x 32 crops of real photographs, each reduced 2 to 6 times by area.

    Photograph, reduction and place are functions of (split, crop number). Almost constant
    crops, of which sky and background have many, are drawn again, a few times at most.
    """

    name = "sample"

    def count(self, split: str) -> int:
        return SAMPLE_COUNTS[split]

    def splits(self, validation: int) -> dict[str, tuple[str, np.ndarray]]:
        """Its own, from other photographs; `validation` takes the first of them."""
        counts = SAMPLE_COUNTS | {"validation": min(validation, SAMPLE_COUNTS["validation"])}
        return {split: (split, np.arange(count)) for split, count in counts.items()}

    def item(self, split: str, place: int) -> Item:
        names = PHOTOGRAPHS[split]
        draws = uniform(SAMPLE_SEED, f"sample/{split}", 0, torch.tensor([place]), 4 * TRIES)
        for which, reduction, across, down in draws.view(TRIES, 4).tolist():
            label = int(which * len(names))
            crop = _crop(photograph(names[label]), reduction, across, down)
            if crop.std() > FLAT_STD:
                break
        return Item(place, label, crop)


def _crop(image: Pixels, reduction: float, across: float, down: float) -> Pixels:
    factor = REDUCTIONS[int(reduction * len(REDUCTIONS))]
    side = SAMPLE_SIZE * factor
    top, left = int(down * (image.shape[0] - side)), int(across * (image.shape[1] - side))
    blocks = image[top : top + side, left : left + side].reshape(
        SAMPLE_SIZE, factor, SAMPLE_SIZE, factor, 3
    )
    return (blocks.mean((1, 3)) + 0.5).astype(np.uint8)
