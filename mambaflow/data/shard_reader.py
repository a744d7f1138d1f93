"""A split's rows by number, from shards that are opened as they are needed, or a little before."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from jaxtyping import Int

from mambaflow.data.shards import (
    MANIFEST,
    Manifest,
    Rows,
    ShardError,
    ShardInfo,
    ShardSpec,
    content_of,
    from_bytes,
    read_manifest,
)
from mambaflow.storage import at
from mambaflow.storage_base import Storage

# Of open shards. Those that are fetched ahead take as much again: a split takes about 2 GiB at
# most.
MEMORY_BYTES = 2**30
THREADS = 8
# In the order in which `data_hash` names them.
SPLITS = ("train", "validation", "test")
NOT_THERE = "none"
log = logging.getLogger(__name__)


class Fetcher:
    """Shards of a split, fetched and verified by threads.

    Shards in S3 are fetched once per node, into a cache that its processes share.
    """

    def __init__(self, storage: Storage, manifest: Manifest, cache: Path | None = None) -> None:
        self.storage, self.manifest = storage, manifest
        # By user, so that two on one machine do not meet in a folder that only one may write to.
        self.cache = cache or Path(tempfile.gettempdir()) / f"mambaflow-shards-{os.getuid()}"
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="shards")
        # Touched by the caller's thread alone; those of the pool only fetch and verify.
        self._coming: dict[int, Future[Rows]] = {}

    def begin(self, numbers: Sequence[int], most: int) -> None:
        """Fetch shards in the background, while no more than `most` wait to be taken."""
        for number in numbers:
            # What is beyond `most` is not put off: it is begun when its rows are asked for.
            if number not in self._coming and len(self._coming) < most:
                info = self.manifest.shards[number]
                self._coming[number] = self._pool.submit(self._verified, info)

    def take(self, number: int) -> Rows:
        """The rows of a shard, which is forgotten.

        Raises:
            ShardError: it is missing or damaged.
        """
        # `exception` waits for the end of the fetch. One that failed is tried once more, here; what
        # fails again is the caller's.
        coming = self._coming.pop(number, None)
        if coming is None or coming.exception() is not None:  # what failed then may do now
            return self._verified(self.manifest.shards[number])
        return coming.result()

    def close(self) -> None:
        """Fetch no more; without this the end of the process waits for all that was begun."""
        self._pool.shutdown(cancel_futures=True)

    def _verified(self, info: ShardInfo) -> Rows:
        where = f"{self.storage.uri}/{info.name}"
        try:
            data = self._bytes(info)
        except FileNotFoundError as error:
            raise ShardError(f"shard {where} is listed and not there; stage again") from error
        # The bytes before their meaning: Parquet does not notice every flipped bit.
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != info.bytes or digest != info.sha256:
            raise ShardError(
                f"shard {where} is damaged: {len(data)} bytes with sha256 {digest[:12]}…, the "
                f"manifest says {info.bytes} with {info.sha256[:12]}…; stage the data again"
            )
        rows, spec = from_bytes(data, where)
        # Whole bytes may still be another staging's, under a manifest that was written for these.
        if len(rows) != info.rows or spec != self.manifest.spec:
            raise ShardError(
                f"shard {where} has {len(rows)} rows of spec {spec.hash}, the manifest says "
                f"{info.rows} of {self.manifest.spec.hash}; stage the data again"
            )
        return rows

    def _bytes(self, info: ShardInfo) -> bytes:
        """A shard's bytes, through the node's cache where it is far away."""
        if self.storage.is_local:
            return self.storage.read(info.name)
        # Called after its contents: a copy serves every data set that has this shard, and never
        # another staging at the same address. The folder is its owner's alone, since a name in a
        # shared /tmp can be foreseen.
        path = self.cache / f"{info.sha256}.parquet"
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One process of the node fetches a shard, and the others read its copy. A copy is hashed
        # every time: one that was cut off or damaged is fetched again.
        with FileLock(f"{path}.lock"):
            data = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(data).hexdigest() != info.sha256:
                self.storage.download(info.name, path)
                data = path.read_bytes()
        return data


def split_hash(split: Storage, cache: Path | None = None, *, read: bool = True) -> str:
    """What a split holds (see `Manifest.hash`); "" where its manifest does not say, and the shards
    are not to be read for it.

    Raises:
        ShardError: no split, or a damaged one.
    """
    manifest = read_manifest(split)
    if manifest.hash or not read:
        return manifest.hash
    log.info("%s: an earlier version staged it, so that all shards are read once", split.uri)
    fetcher = Fetcher(split, manifest, cache)
    try:
        contents = {}
        for number, info in enumerate(manifest.shards):
            ahead = range(number, min(number + THREADS, len(manifest.shards)))
            fetcher.begin(ahead, THREADS)
            contents[info.sha256] = content_of(fetcher.take(number))
    finally:
        fetcher.close()
    return replace(manifest, contents=contents).hash


def data_hash(uri: str, *, read: bool = True) -> str:
    """What a data set holds, wherever it is: the hashes of its splits, train-validation-test, with
    "none" for one that is not there; "" as in `split_hash`.

    Raises:
        ShardError: a damaged split.
    """
    found = []
    for name in SPLITS:
        split = at(uri).child(name)
        there = split.exists(MANIFEST)
        found.append(split_hash(split, read=read) if there else NOT_THERE)
    return "-".join(found) if all(found) else ""


def other_splits(was: str, now: str) -> str:
    """In which splits two of `data_hash` differ, for a person; "" where they do not."""
    pairs = zip(SPLITS, was.split("-"), now.split("-"), strict=False)
    return ", ".join(f"{name}: {a} -> {b}" for name, a, b in pairs if a != b)


class ShardSet:
    """A split's rows by number, opening only the shards that hold them.

    Open shards lie side by side in one piece of memory, so that a batch is one gather per
    column. Beyond `memory` bytes the one unused for longest makes room; shards that are expected
    take as much again. For one thread at a time.
    """

    def __init__(
        self, uri: str, split: str, *, cache: Path | None = None, memory: int = MEMORY_BYTES
    ) -> None:
        self.storage = at(uri).child(split)
        self.manifest = read_manifest(self.storage)
        self._fetcher = Fetcher(self.storage, self.manifest, cache)
        # Where each shard's rows begin and end among those of the split. A slot has room for the
        # largest shard, so that a row's place in memory is slot x stride + its place in the shard.
        rows = np.array([shard.rows for shard in self.manifest.shards], np.int64)
        self._ends, self._starts = rows.cumsum(), rows.cumsum() - rows
        self._stride = max(1, int(rows.max(initial=0)))
        slot_bytes = self._stride * Rows.blank(1, self.spec).nbytes
        self.open_bytes = slot_bytes * len(rows)
        """Memory that all shards would take."""
        self.capacity = min(max(1, memory // slot_bytes), max(1, len(rows)))
        """Shards that may be open at once."""
        self._open = Rows.blank(self.capacity * self._stride, self.spec)
        # Of each shard: its slot, or -1 where it is not open; and when it was last used, by a clock
        # that counts the calls.
        self._slots = np.full(len(rows), -1)
        self._used = np.zeros(len(rows), np.int64)
        self._clock = 0

    @property
    def spec(self) -> ShardSpec:
        """How the split was staged."""
        return self.manifest.spec

    @property
    def shuffle_block(self) -> int:
        """Rows, one after the other, whose shards may be open together, wherever they begin; when
        only one shard may be open, as many rows as the smallest has."""
        rows = [shard.rows for shard in self.manifest.shards if shard.rows]
        if self.capacity >= len(rows):
            return max(1, len(self))
        # A block that begins inside a shard needs one shard more than its rows fill. The last shard
        # may be short and does not count: no block goes on behind it.
        return max(self.capacity - 1, 1) * min(rows[:-1])

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(
        self, row_numbers: Int[np.ndarray, " m"], *, pixels: bool = True, images: bool = True
    ) -> Rows:
        """Rows in the order asked for, without what is not wanted of them: see `Rows.take`.

        Raises:
            ValueError: a number beyond the rows of the split.
            ShardError: a shard that is missing or damaged.
        """
        if len(row_numbers) and not (0 <= row_numbers.min() and row_numbers.max() < len(self)):
            raise ValueError(
                f"row_numbers ({row_numbers.min()} to {row_numbers.max()}) must be in "
                f"[0, {len(self)}), the rows of {self.storage.uri}"
            )
        # side="right": the row at a shard's end is the next one's, and empty shards are stepped
        # over.
        shards = np.searchsorted(self._ends, row_numbers, side="right")
        wanted = np.unique(shards)
        if len(wanted) > self.capacity:
            order, found = self._in_turns(row_numbers, shards)
            return found.take(order, pixels, images)
        self._admit(wanted)
        inside = row_numbers - self._starts[shards]
        return self._open.take(self._slots[shards] * self._stride + inside, pixels, images)

    def expect(self, row_numbers: Int[np.ndarray, " m"]) -> None:
        """Begin to fetch, in the background, the shards of rows that will be asked for."""
        shards = np.unique(np.searchsorted(self._ends, row_numbers, side="right"))
        self._fetcher.begin(shards[self._slots[shards] < 0].tolist(), self.capacity)

    def forget(self) -> None:
        """Give back the memory of the shards that are open; they are opened anew when needed."""
        self._open = Rows.blank(self.capacity * self._stride, self.spec)
        self._slots[:] = -1

    def close(self) -> None:
        """Leave what was expected."""
        self._fetcher.close()

    def _in_turns(
        self, row_numbers: Int[np.ndarray, " m"], shards: np.ndarray
    ) -> tuple[np.ndarray, Rows]:
        """Rows of more shards than may be open at once, by shard, and where each one is there."""
        # Half of the rows, then the other half, each again in halves while its shards are too many.
        # Sorted by shard first: each is opened once, or twice where a cut runs through it.
        found = Rows.blank(len(row_numbers), self.spec)
        order, first = np.argsort(shards, kind="stable"), 0
        for some in np.array_split(order, 2):
            found.put(first, self.rows(row_numbers[some]))
            first += len(some)
        # The way back to the caller's order; taking it is the one gather that also drops columns.
        return np.argsort(order), found

    def _admit(self, wanted: Int[np.ndarray, " s"]) -> None:
        """Open the shards that are not open yet."""
        self._clock += 1
        # Before a slot is looked for: no shard of this call makes room for another of it.
        self._used[wanted] = self._clock
        missing = wanted[self._slots[wanted] < 0].tolist()
        # All at once, in the pool's threads; then they are taken one after the other.
        self._fetcher.begin(missing, self.capacity)
        for number in missing:
            rows = self._fetcher.take(number)
            # Only now that its rows are here: a shard that is damaged closes no other.
            slot = self._free_slot()
            self._open.put(slot * self._stride, rows)
            # Last: it is open when its rows are in place.
            self._slots[number] = slot

    def _free_slot(self) -> int:
        opened = np.flatnonzero(self._slots >= 0)
        if len(opened) < self.capacity:
            return int(np.setdiff1d(np.arange(self.capacity), self._slots[opened])[0])
        oldest = opened[self._used[opened].argmin()]
        slot = int(self._slots[oldest])
        self._slots[oldest] = -1
        return slot
