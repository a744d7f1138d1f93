"""Parquet files of encoded images as a source, read by the row group."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from mambaflow.data.found import Found, PassedOver
from mambaflow.data.remote import AnyPath, SourceError
from mambaflow.data.source import Item, Source, all_files, blocks, decoded, digest
from mambaflow.data.split_names import SPLITS, is_of_anything, nearly_split
from mambaflow.data.tree import Tree
from mambaflow.storage_base import StorageError

# Columns that say of which split a row is, whatever else they say; words of one that are looked at.
SPLIT_COLUMNS, MANY = {"split", "subset", "partition", "usage", "set"}, 100


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
        # But for what is taken unless another is chosen.
        others = [option for option in self.columns.options if option != ("label_column", "label")]
        chosen = "".join(f", {name} {value}" for name, value in others)
        return digest(part for file in files for part in blocks(file)) + chosen

    def count(self, split: str) -> int:
        return sum(group.rows for group in self.groups.get(split, []))

    def own_validation(self) -> int:
        return self.count("validation")

    def found(self) -> Found:
        counts = {split: self.count(split) for split in SPLITS}
        files = tuple(all_files(self.files))
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
            table = _table(group.file, _parquet(group.file), group.number, names)
            # The images stay encoded in Arrow's memory, and are decoded one at a time.
            cells = pc.struct_field(table[group.image], "bytes")
            self._open = group, cells, _labels_of(table, group)
        return self._open[1:]


def _only_labels(group: RowGroup) -> np.ndarray:
    names = [group.label] if group.label else []
    return _labels_of(_table(group.file, _parquet(group.file), group.number, names), group)


def _table(file: AnyPath, opened: pq.ParquetFile, group: int, names: list[str]) -> pa.Table:
    """Some columns of a row group.

    Raises:
        SourceError: they are damaged, of which the footer knows nothing.
    """
    try:
        return opened.read_row_group(group, names)
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise SourceError(
            f"{file} is damaged in row group {group}: {why}; fetch it again"
        ) from error


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
        # Opened here, since Arrow takes no name that is not UTF-8. A page that has a checksum is
        # held against it: a flipped bit of a label is no other label.
        return pq.ParquetFile(file.open("rb"), page_checksum_verification=True)
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
        if _may_say_splits(file, opened, kind):
            words = _values(file, opened, kind, opened.num_row_groups)
            if _are_several_splits(kind, words):
                raise SourceError(
                    f"{file} holds rows of several splits, by its column {kind.name} "
                    f"({', '.join(map(str, words[:5]))}); write each split to a file of its own"
                )


def _is_usual(kind: pa.Field) -> bool:
    return kind.name.strip().lower() in SPLIT_COLUMNS


def _is_text(kind: pa.Field) -> bool:
    values = kind.type.value_type if pa.types.is_dictionary(kind.type) else kind.type
    names = ("string", "binary") if _is_usual(kind) else ("string",)
    return _plain(values) in names


def _plain(kind: pa.DataType) -> str:
    """The name of a type of texts or bytes, whichever way Arrow has them in memory."""
    return str(kind).removeprefix("large_").removesuffix("_view")


def _may_say_splits(file: AnyPath, opened: pq.ParquetFile, kind: pa.Field) -> bool:
    """Whether a column is worth reading for it."""
    if _is_text(kind):
        # Of another name, by its first rows: captions are not read to their end.
        return _is_usual(kind) or _are_splits(_values(file, opened, kind, 1))
    if pa.types.is_boolean(kind.type):
        return _is_split(re.sub(r"^(is|in|for)", "", kind.name.lower()))
    return pa.types.is_integer(kind.type) and kind.name.strip().lower() == "split"


def _are_several_splits(kind: pa.Field, words: list[object]) -> bool:
    if not _is_text(kind):
        return len(words) > 1
    named = {nearly_split(str(word)) for word in words[:MANY]} - {""}
    return len(named) > 1 and (_is_usual(kind) or _are_splits(words))


def _are_splits(words: list[object]) -> bool:
    return all(_is_split(str(word)) for word in words)


def _is_split(word: str) -> bool:
    """Whether a word is a split's, and says nothing besides."""
    return bool(nearly_split(word)) and is_of_anything(word)


def _values(file: AnyPath, opened: pq.ParquetFile, kind: pa.Field, groups: int) -> list[object]:
    """The different values of a column in the first row groups, but for empty ones."""
    found: dict[object, None] = {}
    for group in range(min(groups, opened.num_row_groups)):
        column = _table(file, opened, group, [kind.name])[kind.name]
        if pa.types.is_dictionary(kind.type):
            column = column.cast(kind.type.value_type)
        found |= dict.fromkeys(column.unique().to_pylist())
    words = (w.decode(errors="replace") if isinstance(w, bytes) else w for w in found)
    return [word for word in words if word not in (None, "")]


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
    encoded = encoded and _plain(kind.field("bytes").type) == "binary"
    if not encoded or (label and not pa.types.is_integer(schema.field(label).type)):
        raise SourceError(
            f"{file} has {kinds}; {image} must be struct<bytes, path> of encoded pictures"
            f"{' and ' * bool(label)}{label}{' an integer' * bool(label)}; choose by "
            "--image-column and --label-column, or leave labels out by --labels ignore"
        )
    return image, label
