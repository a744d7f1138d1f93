"""A source: what images come from.

It has splits, and reads any places of one as uint8 images with labels and ids. The id of an image
is its place in its source, so that masks, which depend on it, never move.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int

from mambaflow.data.decode import Pixels, decode
from mambaflow.data.found import Found
from mambaflow.data.random_bits import bits
from mambaflow.data.remote import AnyPath, SourceError

SPLIT_SEED = 20  # of the validation split, the same whatever the masks
BLOCK = 8 * 2**20  # bytes that are read at a time


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


def decoded(id: int, label: int, data: bytes, where: str) -> Item:
    """An item from an encoded image; one that cannot be decoded keeps the reason."""
    try:
        return Item(id, label, decode(data), where)
    except Exception as error:  # whatever a decoder trips over, the image is at fault
        return Item(id, label, None, where, f"{where}: {error or type(error).__name__}")


def digest(parts: Iterable[bytes], digits: int = 16) -> str:
    """The first digits of a sha256, in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:digits]


def blocks(file: AnyPath) -> Iterator[bytes]:
    """A file's bytes, some at a time."""
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            yield block


def all_files(files: dict[str, list[AnyPath]]) -> list[AnyPath]:
    """The files of all splits."""
    return [file for split in files.values() for file in split]
