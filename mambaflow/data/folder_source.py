"""A folder of pictures as a source, with the classes that its folders name as labels."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from jaxtyping import Int

from mambaflow.data.found import Found
from mambaflow.data.remote import AnyPath, SourceError
from mambaflow.data.source import Item, Source, all_files, blocks, decoded, digest
from mambaflow.data.split_names import SPLITS
from mambaflow.data.tree import pictures

# Threads that read the files of a folder; digits of a whole sha256.
READERS, FULL = 8, 64
# Begins a folder's fingerprint: earlier versions' was of the names and sizes of its files.
OF_BYTES = "bytes_"


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
            digests = pool.map(lambda one: digest(blocks(one[1]), FULL), files)
            about = (
                f"{split} {self._of(split, file)} {of_file}\n"
                for (split, file), of_file in zip(files, digests, strict=True)
            )
            return OF_BYTES + digest(line.encode() for line in about)

    def count(self, split: str) -> int:
        return len(self.files.get(split, []))

    def own_validation(self) -> int:
        return self.count("validation")

    def found(self) -> Found:
        counts = {split: self.count(split) for split in SPLITS}
        lost = {split: self._lost(split) for split in SPLITS if self._lost(split)}
        return Found(
            counts, tuple(self.classes), self.tree.passed, tuple(all_files(self.files)), lost
        )

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


def _ahead(files: list[AnyPath]) -> Iterator[bytes]:
    """What files hold, in their order; a few are read at once, since some storage is far away."""
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(files), READERS):
            yield from pool.map(lambda file: file.read_bytes(), files[first : first + READERS])
