"""The sparse shard: images of which only a staged choice of pixels is kept.

    <root>/train/shard-00000.parquet     rows of the columns below, zstd
    <root>/train/manifest.json           the spec, every shard's rows, bytes, sha256, and a hash of
                                         what is in it; written last: without it there is no split

A row: id int64, label int8, index uint16[k + n] and rgb uint8[3 (k + n)], the known pixels first,
then the asked ones; and, in held-out splits or where staged so, image uint8[3 size size].
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, UInt8, UInt16

from mambaflow.data.pixels import choose
from mambaflow.storage_base import Storage

# Raised when a shard's bytes come to mean something else; another format is refused with "stage
# again".
FORMAT = 1
MANIFEST = "manifest.json"
METADATA_KEY = b"mambaflow"
CONTENT_BITS, HASH_DIGITS = 256, 12


class ShardError(ValueError):
    """A shard or manifest that cannot be trusted; the message names it and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """All that the bytes of a split's shards depend on, beside the images."""

    source: str
    split: str
    size: int
    known: int
    target: int
    mask_seed: int
    full_images: bool
    rows_per_shard: int
    reduce: int = 1
    """How many times smaller, by area, the images are than those of the source."""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields by name, as whatever is written holds them."""
        named = asdict(self)
        # Younger than the format: a spec without it is of images as their source has them, whose
        # hashes and bytes stay what they were.
        if self.reduce == 1:
            del named["reduce"]
        return named

    @property
    def hash(self) -> str:
        """Equal specs, equal hash."""
        # By name and sorted: the order of the fields here may change, the hash may not.
        text = json.dumps({"format": FORMAT, **self.fields}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """Rows of a shard, a column each."""

    # Pixels lie flat in a row, as Parquet's lists have them: of rgb and images byte 3 j + c is
    # channel c of pixel j. Columns of a shard that was read are Arrow's memory, and read-only.
    ids: Int[np.ndarray, " m"]
    labels: Int[np.ndarray, " m"]
    index: UInt16[np.ndarray, "m p"]
    rgb: UInt8[np.ndarray, "m values"]
    images: UInt8[np.ndarray, "m pixels"] | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Memory that the rows take."""
        columns = (self.ids, self.labels, self.index, self.rgb, self.images)
        return sum(c.nbytes for c in columns if c is not None)

    @classmethod
    def blank(cls, rows: int, spec: ShardSpec) -> "Rows":
        """Room for rows; the system gives it memory as it is first written to."""
        pixels, values = spec.known + spec.target, 3 * spec.size**2
        return cls(
            np.empty(rows, np.int64),
            np.empty(rows, np.int8),
            np.empty((rows, pixels), np.uint16),
            np.empty((rows, 3 * pixels), np.uint8),
            np.empty((rows, values), np.uint8) if spec.full_images else None,
        )

    def take(self, rows: Int[np.ndarray, " m"], pixels: bool = True, images: bool = True) -> "Rows":
        """Some of the rows, copied; without their chosen pixels, or without whole images."""
        # A column that is not wanted keeps its place with no width, and nothing of it is copied.
        # `take` and not [rows], which takes nearly twice as long for whole rows.
        width = None if pixels else 0
        whole = self.images if images else None
        return Rows(
            self.ids.take(rows),
            self.labels.take(rows),
            self.index[:, :width].take(rows, axis=0),
            self.rgb[:, :width].take(rows, axis=0),
            None if whole is None else whole.take(rows, axis=0),
        )

    def put(self, first: int, rows: "Rows") -> None:
        """Copy rows in, from place `first` on."""
        here = slice(first, first + len(rows))
        # Assigning into the arrays: labels become int8 here, whatever width they came in.
        self.ids[here], self.labels[here] = rows.ids, rows.labels
        self.index[here], self.rgb[here] = rows.index, rows.rgb
        if self.images is not None:
            self.images[here] = rows.images


def encode(
    images: UInt8[np.ndarray, "m h w 3"],
    labels: Int[np.ndarray, " m"],
    ids: Int[np.ndarray, " m"],
    spec: ShardSpec,
) -> Rows:
    """Keep the pixels that the spec's masks choose."""
    size = spec.size
    if images.shape[1:] != (size, size, 3):
        raise ValueError(f"images {images.shape[1:]} must be ({size}, {size}, 3), as the spec says")
    # Known first, then targets; what is not chosen is in no byte of a training shard.
    chosen = choose(
        spec.mask_seed, spec.split, torch.from_numpy(ids), size, spec.known, spec.target
    ).numpy()
    count, pixels = len(images), size * size
    # Three channels with one number: the index is spread over the last dimension.
    kept = np.take_along_axis(images.reshape(count, pixels, 3), chosen[..., None], 1)
    rgb = kept.reshape(count, 3 * chosen.shape[1])
    # A view; the copy is made as the shard is written.
    whole = images.reshape(count, 3 * pixels) if spec.full_images else None
    # At most 256 x 256 pixels (see `choose`): the largest index is what 16 bits hold.
    return Rows(ids, labels, chosen.astype(np.uint16), rgb, whole)


def to_bytes(rows: Rows, spec: ShardSpec) -> bytes:
    """A shard: the same rows and spec give the same bytes."""
    # Types are stated, so that the bytes do not hang on what NumPy made of the numbers. A label
    # beyond an int8 is refused by Arrow; staging names it before.
    columns = {"id": pa.array(rows.ids, pa.int64()), "label": pa.array(rows.labels, pa.int8())}
    lists = {"index": rows.index, "rgb": rows.rgb, "image": rows.images}
    for name, values in lists.items():
        if values is not None:
            # Lists of one size have no offsets: a column is its numbers one after the other, which
            # Arrow takes and gives without a copy.
            flat = pa.array(np.ascontiguousarray(values).ravel())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    # In the file itself, so that a shard without its manifest still says what it is.
    about = json.dumps({"format": FORMAT, "hash": spec.hash, **spec.fields}, sort_keys=True)
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: about.encode()})
    sink = io.BytesIO()
    # Parquet knows no integers below 32 bits: split into byte streams, the empty ones vanish.
    # Arrow takes an encoding of one's own only where dictionaries are off.
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=False, column_encoding="BYTE_STREAM_SPLIT"
    )
    return sink.getvalue()


def from_bytes(data: bytes, name: str) -> tuple[Rows, ShardSpec]:
    """Read a shard, and check every rule of the format.

    Raises:
        ShardError: naming the shard and the rule.
    """
    try:
        # Arrow raises its own errors, or OSError, by where in the file it stumbles.
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            f"shard {name} is not whole Parquet ({len(data)} bytes): {error}"
        ) from error
    spec = _spec(table.schema.metadata or {}, name)
    wanted = ["id", "label", "index", "rgb"] + ["image"] * spec.full_images
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise ShardError(f"shard {name} lacks the column(s) {missing}; it has {table.column_names}")
    pixels, size = spec.known + spec.target, spec.size
    rows = Rows(
        table["id"].to_numpy(),
        table["label"].to_numpy(),
        _lists(table, "index", pixels, name),
        _lists(table, "rgb", 3 * pixels, name),
        _lists(table, "image", 3 * size * size, name) if spec.full_images else None,
    )
    # Beyond the image it would be another image's pixel: gathers go over a flat list of all. `max`
    # of nothing is an error, hence the size.
    if rows.index.size and int(rows.index.max()) >= size * size:
        raise ShardError(
            f"shard {name} has a pixel index {rows.index.max()} beyond a {size} x {size} image"
        )
    return rows, spec


def _spec(metadata: dict[bytes, bytes], name: str) -> ShardSpec:
    if METADATA_KEY not in metadata:
        raise ShardError(f"shard {name} has no mambaflow metadata: it is another kind of Parquet")
    try:
        about = json.loads(metadata[METADATA_KEY])
        found = about.pop("format")
        if found != FORMAT:
            raise ShardError(f"shard {name} has format {found}, not {FORMAT}; stage the data again")
        # For people and other programs; the fields themselves are compared with the manifest's.
        about.pop("hash")
        # A field too many or too few is a TypeError, which is damage too.
        return ShardSpec(**about)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"shard {name} has damaged metadata: {error!r}") from error


def _lists(table: pa.Table, column: str, width: int, name: str) -> np.ndarray:
    kind = table.schema.field(column).type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != width:
        raise ShardError(f"shard {name}: column {column} is {kind}, not lists of {width} values")
    # flatten leaves rows that are null out: all rows behind one would move up by one.
    whole = table[column].combine_chunks()
    if whole.null_count:
        raise ShardError(f"shard {name}: column {column} has {whole.null_count} empty rows")
    # A view of Arrow's memory: to_numpy of an array refuses to copy unless it is told to.
    return whole.flatten().to_numpy().reshape(-1, width)


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A split: its spec and its shards."""

    spec: ShardSpec
    shards: list[ShardInfo]
    contents: Mapping[str, str] = field(default_factory=dict)
    """A shard's sha256 -> what its rows hold (see `content_of`). By the hash and not by the name:
    of another file of that name nothing is said."""

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(shard.rows for shard in self.shards)

    @property
    def hash(self) -> str:
        """What the split holds: equal images, masks and labels, equal hash, wherever and however
        they are kept; "" where the version that staged it did not say."""
        if not self.contents.keys() >= {shard.sha256 for shard in self.shards}:
            return ""
        whole = joined(self.contents[shard.sha256] for shard in self.shards)
        # What rows are cut from counts too: masks of other shares are drawn by these.
        about = [self.spec.split, self.spec.size, self.spec.mask_seed, self.rows, whole]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:HASH_DIGITS]


def content_of(rows: Rows) -> str:
    """What some rows hold: ids, labels, masks and colours, whatever file they are in, and in
    whatever order; see `joined`."""
    # Of stated widths: the same bytes on every machine.
    columns = [rows.ids.astype("<i8"), rows.labels.astype("i1"), rows.index.astype("<u2"), rows.rgb]
    columns += [] if rows.images is None else [rows.images]
    total = 0
    for number in range(len(rows)):
        digest = hashlib.blake2b(digest_size=CONTENT_BITS // 8)
        for column in columns:
            # How long first: what ends one column must not begin the next.
            digest.update(f"{column[number].nbytes},".encode() + column[number].tobytes())
        total += int.from_bytes(digest.digest(), "big")
    return f"{total % 2**CONTENT_BITS:0{CONTENT_BITS // 4}x}"


def joined(contents: Iterable[str]) -> str:
    """What several sets of rows hold together: a sum, so that it is the same however the rows are
    cut into shards."""
    total = sum(int(content, 16) for content in contents)
    return f"{total % 2**CONTENT_BITS:0{CONTENT_BITS // 4}x}"


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.parquet"


def write_manifest(split: Storage, manifest: Manifest) -> None:
    """Publish a split; its shards are all in place."""
    about = {
        "format": FORMAT,
        "hash": manifest.spec.hash,
        "data": manifest.hash,  # for people: it follows from the contents
        "rows": manifest.rows,
        "recipe": manifest.spec.fields,  # as format 1 calls it
        "shards": [asdict(shard) for shard in manifest.shards],
        "contents": {
            shard.sha256: manifest.contents[shard.sha256]
            for shard in manifest.shards
            if shard.sha256 in manifest.contents
        },
    }
    # One write, which appears whole: from here on the split is there.
    split.write(MANIFEST, (json.dumps(about, indent=2) + "\n").encode())


def read_manifest(split: Storage) -> Manifest:
    """The manifest of a split.

    Raises:
        ShardError: there is none, or it is damaged.
    """
    where = f"{split.uri}/{MANIFEST}"
    try:
        about = json.loads(split.read(MANIFEST))
        # The format before the fields, whose names another format may have changed.
        if about["format"] != FORMAT:
            raise ShardError(f"{where} has format {about['format']}, not {FORMAT}; stage again")
        spec = ShardSpec(**about["recipe"])
        shards = [ShardInfo(**shard) for shard in about["shards"]]
        # Earlier versions wrote none: `shard_reader.data_hash` then reads the shards.
        contents = {sha: f"{int(text, 16):x}" for sha, text in about.get("contents", {}).items()}
    except FileNotFoundError as error:
        raise ShardError(
            f"{where} is not there: no staged split, or one whose staging did not finish; "
            "run jobs/stage.py --out with this address"
        ) from error
    except ShardError:
        raise
    # Text that is no JSON, or no number, is a ValueError.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{where} is damaged: {error!r}; stage the data again") from error
    # A manifest has no checksum of its own: what it says twice must agree.
    if about["hash"] != spec.hash or about["rows"] != sum(s.rows for s in shards):
        raise ShardError(f"{where} contradicts itself; stage the data again")
    manifest = Manifest(spec, shards, contents)
    # Where it says nothing of a shard, nothing can be compared.
    if manifest.hash and about.get("data", manifest.hash) != manifest.hash:
        raise ShardError(f"{where} contradicts itself; stage the data again")
    return manifest
