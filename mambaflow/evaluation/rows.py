"""Rows of an evaluation, and where they are kept.

    manifest.json                   what every row depends on besides its key; written once
    manifest/0001.json              the same with what was added to it by name; the highest counts
    requests/HASH.json              what was asked for, one file for each set of flags
    truths/HASH.parquet             images whose answers are shown, and their known pixels
    rows/CELL/GROUP-HASH.parquet    rows of some images by one way of answering

A file of rows appears whole and is never changed: its name says which rows it holds, so that two
actors that make the same ones write the same file. Reading drops rows that are there twice.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mambaflow.evaluation.cells import CELL_FIELDS, Cell, Key, Unit
from mambaflow.run_paths import FIRST_OF, require_free
from mambaflow.storage_base import Storage

MANIFEST, ADDED = FIRST_OF["results of an evaluation"], "manifest/"
THREADS = 8
# Of one image, each a column. What an enlarged answer has is told in evaluation.super_resolution;
# its psnr, ssim and lpips are against a real image of its size, where there is one.
COMPLETED = ("psnr", "psnr_unknown", "ssim", "lpips", "mse", "mae")
ENLARGED = (
    "psnr_reduced", "psnr_self", "psnr_bicubic", "rival_psnr_reduced", "rival_psnr_self",
    "rival_psnr_bicubic", "rival_psnr", "rival_ssim", "rival_lpips",
)  # fmt: skip
NUMBERS = (*COMPLETED, *ENLARGED)
# Of several images by adding them up, number by number: see evaluation.sums.
SUMS = ("scores", "fine", "reliability")
KEY = (*CELL_FIELDS, "image", "sample")
_TEXT = ("checkpoint", "sampler", "settings", "error")
SCHEMA = pa.schema(
    [
        *((name, pa.string() if name in _TEXT else pa.int64()) for name in KEY),
        *((name, pa.float64()) for name in NUMBERS),
        *((name, pa.list_(pa.float64())) for name in SUMS),
        ("seconds", pa.float64()),
        ("error", pa.string()),  # empty where there is none, never null
        ("picture", pa.binary()),  # a PNG, or null
        ("deviation", pa.list_(pa.float32())),  # of each pixel, of the samples of an image
    ]
)
TRUTHS = pa.schema([("image", pa.int64()), ("truth", pa.binary()), ("known", pa.list_(pa.int32()))])
Row = dict[str, Any]
log = logging.getLogger(__name__)


class ResultsError(ValueError):
    """Results that do not go with what is asked now; the message names what differs."""


def row(key: Key, error: str = "", **values: Any) -> Row:
    """A row with all of its columns; what is not given is null."""
    found: Row = dict.fromkeys(SCHEMA.names)
    return found | dict(zip(KEY, key.flat, strict=True)) | {"error": error} | values


def key_of(row: Mapping[str, Any]) -> Key:
    """The key of a row."""
    return Key(Cell(*(row[name] for name in CELL_FIELDS)), row["image"], row["sample"])


class Results:
    """The rows of an evaluation in a storage, local or s3://."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def claim(self, fingerprint: Mapping[str, Any]) -> None:
        """Make the place these results' own, or find that it holds the same.

        What a fingerprint adds by name to what is there (a checkpoint, a number of known pixels)
        is no other fingerprint: it is written down beside it.

        Raises:
            ResultsError: rows there depend on something else; nothing was written.
        """
        ours = json.loads(json.dumps(fingerprint))  # as it will be read: lists, and text for keys
        require_free(self.storage, MANIFEST, f"out (={self.storage.uri})", "use another --out")
        self._require_claimed_rows()
        claimed = self.storage.create(MANIFEST, _json(ours))
        while not claimed:
            number, theirs = self._newest(), self.manifest()
            changed = list(_contradictions(theirs, ours))
            if changed:
                raise ResultsError(
                    f"out (={self.storage.uri}) holds results of something else "
                    f"({'; '.join(changed)}); use another --out"
                )
            merged = _merged(theirs, ours)
            # Of several that add at once one writes the next; the others look at what it added.
            claimed = merged == theirs or self.storage.create(_added(number + 1), _json(merged))

    def _require_claimed_rows(self) -> None:
        """Rows of which nobody knows what they depend on would be taken for ours."""
        # In this order: where a row is, its manifest was there before.
        rows = self.storage.list("rows/")
        if rows and not self.storage.exists(MANIFEST):
            raise ResultsError(
                f"out (={self.storage.uri}) holds rows, and no {MANIFEST} that says what they are "
                "of; put it back, or use another --out"
            )

    def manifest(self) -> dict[str, Any]:
        """What `claim` has written.

        Raises:
            ResultsError: there is nothing, or it cannot be read.
        """
        key = _added(number) if (number := self._newest()) else MANIFEST
        where = f"{self.storage.uri}/{key}"
        try:
            found: dict[str, Any] = json.loads(self.storage.read(key))
        except FileNotFoundError as error:
            raise ResultsError(
                f"{where} is not there: no evaluation was started here; run jobs/evaluate.py "
                "--out with this address"
            ) from error
        except ValueError as error:
            raise ResultsError(f"{where} is damaged: {error}; use another --out") from error
        return found

    def _newest(self) -> int:
        """How often something was added to the manifest."""
        found = (re.fullmatch(rf"{ADDED}(\d+)\.json", key) for key in self.storage.list(ADDED))
        return max((int(match[1]) for match in found if match), default=0)

    def ask(self, request: Mapping[str, Any]) -> None:
        """Write down what is asked for, for who looks from elsewhere (see `requests`)."""
        # By its contents: the same flags again are the same request, of the day of the first.
        contents = {key: value for key, value in request.items() if key != "date"}
        self.storage.create(f"requests/{_hash(contents)}.json", _json(request))

    def requests(self) -> list[dict[str, Any]]:
        """Everything that was asked for."""
        return [json.loads(self.storage.read(key)) for key in self.storage.list("requests/")]

    def keep_truths(self, truths: Sequence[Mapping[str, Any]]) -> None:
        """Keep what answers are shown beside: `image` (an id), `truth` (a PNG) and `known` (places
        of the known pixels). So a report needs no data but these results."""
        name = _hash([row["image"] for row in truths])
        table = pa.Table.from_pylist(list(truths), TRUTHS)
        self.storage.write(f"truths/{name}.parquet", _parquet(table))

    def truths(self) -> list[dict[str, Any]]:
        """Everything that `keep_truths` has kept, each image once."""
        found: dict[int, dict[str, Any]] = {}
        for key in self.storage.list("truths/"):
            for row in pq.read_table(io.BytesIO(self.storage.read(key))).to_pylist():
                found.setdefault(row["image"], row)
        return list(found.values())

    def write(self, unit: Unit, rows: Sequence[Row]) -> None:
        """Keep the rows that a unit came to."""
        failed = sum(bool(row["error"]) for row in rows)
        keys = [str(key_of(row).flat) for row in rows]
        # Rows that failed are another file than those that did not: a later try adds to it.
        name = f"{unit.group:06d}-{_hash([keys, failed])}.parquet"
        table = pa.Table.from_pylist(list(rows), SCHEMA)
        self.storage.write(f"rows/{_hash(asdict(unit.cell))}/{name}", _parquet(table))

    def read(self, columns: Iterable[str] | None = None) -> pa.Table:
        """All rows, each key once: of a key's rows one without an error, if there is one.

        Args:
            columns: those wanted besides the key and `error`; all by default.
        """
        wanted = None if columns is None else [*KEY, "error", *columns]
        keys = self.storage.list("rows/")
        with ThreadPoolExecutor(THREADS) as pool:
            tables = [t for t in pool.map(lambda key: self._part(key, wanted), keys) if t]
        schema = SCHEMA if wanted is None else pa.schema([SCHEMA.field(n) for n in wanted])
        return _each_once(pa.concat_tables(tables) if tables else schema.empty_table())

    def _part(self, key: str, columns: list[str] | None) -> pa.Table | None:
        data = self.storage.read(key)
        try:
            return pq.read_table(io.BytesIO(data), columns=columns)
        except (pa.ArrowException, OSError) as error:
            # Its rows are as good as missing, and are made again; the new file has its name.
            log.warning(
                "%s/%s is damaged: %s; its rows count as missing", self.storage.uri, key, error
            )
            return None


def _added(number: int) -> str:
    return f"{ADDED}{number:04d}.json"


def _each_once(table: pa.Table) -> pa.Table:
    columns = [table[name].to_pylist() for name in KEY]
    failed = [bool(error) for error in table["error"].to_pylist()]
    best: dict[tuple[object, ...], int] = {}
    for place, key in enumerate(zip(*columns, strict=True)):
        if key not in best or (failed[best[key]] and not failed[place]):
            best[key] = place
    # Sorted by key: the same rows make the same report, in whatever order they were made.
    return table.take(pa.array([best[key] for key in sorted(best)], pa.int64()))


def _contradictions(theirs: Any, ours: Any, name: str = "") -> Iterable[str]:
    """Where two fingerprints say different things of the same."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() & ours.keys()):  # a message that is the same every time
            yield from _contradictions(theirs[key], ours[key], f"{name}.{key}".strip("."))
    elif theirs != ours:
        yield f"{name}: {theirs} -> {ours}"


def _merged(theirs: Any, ours: Any) -> Any:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return {**ours, **{k: _merged(v, ours.get(k, v)) for k, v in theirs.items()}}
    return theirs


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
