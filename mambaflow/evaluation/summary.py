"""What the rows of an evaluation come to: a number and its standard error for each cell."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mambaflow.evaluation.cells import Cell, Key
from mambaflow.evaluation.fine_spread import FineSpread
from mambaflow.evaluation.metrics import Scores
from mambaflow.evaluation.reliability import Reliability
from mambaflow.evaluation.rows import NUMBERS, key_of

# Pooled over pixels, and averaged over images in columns of their own instead.
_IN_COLUMNS = {"images", "psnr", "psnr_unknown", "ssim", "nfe", "seconds"}
# Of single pixels: what a part of an image can be asked for.
_OF_PIXELS = ("spread", "coherence")


class Way(NamedTuple):
    """A cell, and whether its samples are taken one by one or together."""

    cell: Cell
    together: int = 0
    """How many samples the answer is the mean of; 0: it is one of them."""

    @classmethod
    def of(cls, key: Key) -> "Way":
        """The way of a row."""
        return cls(key.cell, max(0, -key.sample))


@dataclass(frozen=True)
class Entry:
    """What a way of answering came to."""

    way: Way
    images: int
    failed: int
    """Rows."""
    numbers: dict[str, float]
    """Means over images, with `_se` their standard errors, and what is pooled over pixels."""
    reliability: list[tuple[float, float, int]] = field(default_factory=list)
    """See evaluation.reliability; empty for single answers."""

    def json(self) -> dict[str, Any]:
        """For programs."""
        about = asdict(self.way.cell) | {"together": self.way.together}
        return about | {
            "images": self.images, "failed": self.failed, "numbers": self.numbers,
            "reliability": self.reliability,
        }  # fmt: skip


class Summary:
    """All entries of a table of rows, and its numbers image by image."""

    def __init__(self, table: pa.Table) -> None:
        self._values: dict[Way, dict[str, dict[int, float]]] = {}
        self.entries: dict[Way, Entry] = {}
        for way, rows in _by_way(table).items():
            good = [row for row in rows if not row["error"]]
            self._values[way] = {name: dict(_by_image(good, name)) for name in NUMBERS}
            self.entries[way] = self._entry(way, good, len(rows) - len(good))

    def _entry(self, way: Way, rows: list[dict[str, Any]], failed: int) -> Entry:
        numbers: dict[str, float] = {}
        for name, values in self._values[way].items():
            if values:
                numbers |= mean_and_error(name, values.values())
        numbers |= _pooled(way, rows)
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        if seconds and not way.cell.is_fill:
            numbers["seconds"] = float(np.mean(seconds))
        total = _total(rows, "reliability")
        curve = [] if total is None else Reliability().unflat(iter(total)).report()
        return Entry(way, len({row["image"] for row in rows}), failed, numbers, curve)

    def values(self, way: Way, name: str) -> Mapping[int, float]:
        """A number of each image, the mean over its samples."""
        return self._values[way][name]

    def difference(self, ours: Way, theirs: Way, name: str) -> dict[str, float]:
        """The mean of ours - theirs over the images that both have, and its standard error: what
        images have in common cancels out."""
        a, b = self.values(ours, name), self.values(theirs, name)
        both = sorted(a.keys() & b.keys())
        return mean_and_error(name, [a[i] - b[i] for i in both]) if both else {}

    def find(self, **wanted: object) -> list[Way]:
        """The ways with these values of the fields of a cell, or of `together`."""
        return [
            way
            for way in self.entries
            if all(
                (way.together if name == "together" else getattr(way.cell, name)) == value
                for name, value in wanted.items()
            )
        ]


def mean_and_error(name: str, values: Iterable[float]) -> dict[str, float]:
    """The mean under a name, and its standard error under `name_se`."""
    found = np.array(list(values), np.float64)
    numbers = {name: float(found.mean())}
    if len(found) > 1:
        numbers[f"{name}_se"] = float(found.std(ddof=1) / math.sqrt(len(found)))
    return numbers


def _by_way(table: pa.Table) -> dict[Way, list[dict[str, Any]]]:
    found: dict[Way, list[dict[str, Any]]] = defaultdict(list)
    # Pictures are many times larger than numbers, and are looked up by who shows them.
    for row in table.drop_columns(["picture", "deviation"]).to_pylist():
        found[Way.of(key_of(row))].append(row)
    return dict(found)


def _by_image(rows: list[dict[str, Any]], name: str) -> Iterator[tuple[int, float]]:
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row[name] is not None:
            values[row["image"]].append(row[name])
    for image in sorted(values):
        yield image, float(np.mean(values[image]))


def _total(rows: list[dict[str, Any]], name: str) -> list[float] | None:
    """Sums of several rows; None where no row has any."""
    # Each class of sums adds up field by field, and `flat` has its fields in order.
    sums = [row[name] for row in rows if row[name] is not None]
    return np.sum(sums, axis=0).tolist() if sums else None


def _pooled(way: Way, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What is a ratio of sums over pixels, and hence no mean of images."""
    found: dict[str, float] = {}
    scores, fine = _total(rows, "scores"), _total(rows, "fine")
    if scores is not None:
        report = Scores().unflat(iter(scores)).report()
        kept = {k: v for k, v in report.items() if k.removesuffix("_se") not in _IN_COLUMNS}
        if way.cell.asked:
            kept = {k: v for k, v in kept.items() if k.startswith(_OF_PIXELS)}
        found |= kept
    if fine is not None:
        report = FineSpread().unflat(iter(fine)).report()
        found |= {k: v for k, v in report.items() if not math.isnan(v)}
    return found
