"""Staging: from a source's images to a split's shards, in parallel and restartable.

    <root>/claim.json                             what is staged there: written first, by the first
    <root>/train/staging/shard-00000.parquet.json a note: this shard is whole, and its checksum

A staging that stopped goes on where it was: a shard is kept if it has its note and its checksum.
Two stagings of the same images write the same bytes; another one finds the claim, and is refused.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int

from mambaflow.checks import require
from mambaflow.data.decode import VERSION
from mambaflow.data.pixels import reduced
from mambaflow.data.random_bits import drawn
from mambaflow.data.shards import (
    MANIFEST,
    Manifest,
    ShardError,
    ShardInfo,
    ShardSpec,
    content_of,
    encode,
    from_bytes,
    read_manifest,
    shard_name,
    to_bytes,
    write_manifest,
)
from mambaflow.data.sources import (
    OF_BYTES,
    SPLIT_SEED,
    Item,
    Pixels,
    Source,
    SourceError,
    embedded,
    open_source,
)
from mambaflow.run_paths import FIRST_OF, require_free
from mambaflow.storage import at
from mambaflow.storage_base import Storage, StorageError

# Beside the shards' own names: a listing of "shard-" sees neither.
CLAIM, NOTES = FIRST_OF["staged data"], "staging"
TOLD = 3  # images in two splits that are named
LABELS = range(-1, 128)  # an int8; -1 where there is none
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What to stage, how, and where."""

    source: str = "sample"
    """sample, cifar10, a .parquet file, a folder with train*.parquet, val*.parquet and
    test*.parquet, or a folder of images by class, in train/, val/ and test/ or without them; files
    and folders may be s3://bucket/key and s3://bucket/prefix/, which are read where they lie."""
    out: str = "data/sample"
    """Where to: a folder or s3://bucket/prefix."""
    size: int = 32
    """Side of the images in pixels, once reduced; an image of another shape is refused by name."""
    reduce: int = 1
    """Reduce every image by area first, this many times on a side: 2 makes 16 x 16 of 32 x 32. Ids
    stay those of the images as the source has them."""
    known_ratio: float = 0.2
    """Share of the pixels that are known."""
    target_ratio: float = 0.2
    """Share of the pixels, disjoint from the known, that training asks for."""
    mask_seed: int = 42
    """Seed of the masks."""
    validation: int = 256
    """Training images held out for validation, unless the source has a validation split, which is
    then taken whole; and as many again for testing where the source has no test images."""
    full_images: bool = False
    """Keep whole training images too, for training with fresh masks."""
    rows_per_shard: int = 1024
    """Images in a shard."""
    on_corrupt: Literal["stop", "count"] = "stop"
    """A corrupt image is named, and stops the staging, or is counted and left out."""
    limit: int = 0
    """Stage only as many training images as this, drawn from all of them; a larger limit keeps
    those of a smaller one. 0: all."""
    image_column: str = ""
    """Of Parquet: the column of images; by default img or image."""
    label_column: str = ""
    """Of Parquet: the column of labels; by default label. CIFAR-100 has fine_label."""
    labels: Literal["keep", "ignore"] = "keep"
    """No training uses labels: ignore stages sources that have none, or more than 128 classes."""
    ray: bool = True
    """Fan out over Ray; --no-ray: one shard after the other in this process."""

    def __post_init__(self) -> None:
        # NaN is in no interval, and so is refused as well.
        for name in ("known_ratio", "target_ratio"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} (={value}) must be in (0, 1); use 0.2")
        total = self.known_ratio + self.target_ratio
        require(
            total <= 1,
            f"known_ratio + target_ratio (={total:g}) must be at most 1: the two are disjoint; "
            "use 0.2 and 0.2",
        )
        # 256: a pixel's place must fit in 16 bits, in a shard and where masks are ranked.
        require(1 <= self.size <= 256, f"size (={self.size}) must be in [1, 256]; use 32")
        for name, pixels in (("known_ratio", self.known), ("target_ratio", self.target)):
            require(
                pixels > 0,
                f"{name} (={getattr(self, name)}) keeps no pixel of {self.size} x {self.size}; "
                f"use at least {1 / self.size**2:.3g}",
            )
        require(
            0 <= self.mask_seed < 2**32,
            f"mask_seed (={self.mask_seed}) must be in [0, 2^32); use 42",
        )
        for name in ("rows_per_shard", "validation", "reduce"):
            value = getattr(self, name)
            require(value > 0, f"{name} (={value}) must be positive; use 1 or more")
        require(self.limit >= 0, f"limit (={self.limit}) must not be negative; use 0 for all")

    @property
    def known(self) -> int:
        """Known pixels of an image."""
        # Rounded down: 204 of 1,024 for a fifth.
        return int(self.known_ratio * self.size**2)

    @property
    def target(self) -> int:
        """Pixels of an image that training asks for."""
        return int(self.target_ratio * self.size**2)


@dataclass(frozen=True)
class SplitPlan:
    """A split to stage: which images, how, and where to."""

    source: str
    images: str
    out: str
    spec: ShardSpec
    # The source's split that the images are in: most sources' validation images are in train.
    stored_split: str
    places: np.ndarray
    on_corrupt: str
    options: tuple[tuple[str, str], ...] = ()
    """See `Source.options`."""

    @property
    def storage(self) -> Storage:
        """Where its shards go."""
        return at(self.out).child(self.spec.split)

    @property
    def claim(self) -> dict[str, Any]:
        """All that the bytes of its shards depend on."""
        # As int64 whatever the platform's integers are, so that every machine gets the same hash.
        places = hashlib.sha256(self.places.astype(np.int64).tobytes()).hexdigest()[:16]
        # The images themselves stand for the source's address, which may change. How corrupt images
        # are met is left out: no byte of a shard hangs on it.
        about = {"images": self.images, "count": len(self.places), "places": places}
        return self.spec.fields | about

    def tasks(self) -> Iterator["ShardTask"]:
        """Its shards."""
        rows = self.spec.rows_per_shard
        claim_hash = hashlib.sha256(_json(self.claim)).hexdigest()
        for number, first in enumerate(range(0, len(self.places), rows)):
            # Corrupt images are left out of their shard, and none moves up: a shard's rows follow
            # from its own places alone, whoever makes it.
            places = self.places[first : first + rows]
            yield ShardTask(
                self.source, self.out, self.spec, self.stored_split, places, number,
                self.on_corrupt, claim_hash, self.options,
            )  # fmt: skip


@dataclass(frozen=True)
class ShardTask:
    """One shard to make, for a worker anywhere."""

    source: str
    out: str
    spec: ShardSpec
    stored_split: str
    places: np.ndarray
    number: int
    on_corrupt: str
    claim_hash: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ShardResult:
    """A shard that is in place."""

    split: str
    info: ShardInfo
    reused: bool
    corrupt: list[str]
    contents: dict[int, str]
    """Of each image's pixels, as the source has them: the same picture, the same text."""
    content: str
    """Of the shard's rows (see `shards.content_of`)."""


def _json(value: Any) -> bytes:
    # Sorted, since claims are compared by a hash of this text.
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def plan(config: StageConfig, source: Source) -> list[SplitPlan]:
    """Every split, with addresses that mean the same to every process.

    Raises:
        SourceError: the source has too few images.
    """
    # Absolute, since workers run in folders of their own.
    out, parts = at(config.out).uri, []
    for split, (stored, places) in source.splits(config.validation).items():
        spec = ShardSpec(
            source=source.name,
            split=split,
            size=config.size,
            known=config.known,
            target=config.target,
            mask_seed=config.mask_seed,
            # Held-out images are scored whole.
            full_images=config.full_images or split != "train",
            rows_per_shard=config.rows_per_shard,
            reduce=config.reduce,
        )
        # The held-out splits stay as they are.
        if split == "train" and config.limit:
            places = _limited(places, config.limit)
        parts.append(
            SplitPlan(
                source.address,
                source.fingerprint,
                out,
                spec,
                stored,
                places,
                config.on_corrupt,
                source.options,
            )
        )
    return parts


def _limited(places: Int[np.ndarray, " m"], limit: int) -> Int[np.ndarray, " n"]:
    """Some of the images, drawn from all: the first of them are often of one class."""
    kept = drawn(SPLIT_SEED, "limit", torch.from_numpy(places), limit).numpy()
    return np.sort(places[kept])  # ascending, so that a Parquet file's row groups are read once


def stake_claim(out: str, parts: list[SplitPlan]) -> None:
    """Make the place this staging's own, or find it so.

    Raises:
        ValueError: something else is staged there; nothing was written.
    """
    for part in parts:
        try:
            # A published split without its claim, which somebody deleted, is in the way too.
            theirs = read_manifest(part.storage).spec.fields
        except ShardError as error:
            log.debug("no manifest that could be in the way: %s", error)
        else:
            _refuse(out, part.spec.split, theirs, part.claim)
    require_free(at(out), CLAIM, f"out (={out})", "give another --out")
    # Of many processes one creates the file. The others find it whole, go on where it is their own
    # staging too, and are refused where it is another.
    ours = {part.spec.split: part.claim for part in parts}
    if not at(out).create(CLAIM, _json(ours)):
        for split, claim in _claimed(out, ours).items():
            _refuse(out, split, claim, ours[split])


def _claimed(out: str, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    try:
        theirs = json.loads(at(out).read(CLAIM))
        return {split: dict(theirs[split]) for split in splits}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"out (={out}) holds a {CLAIM} that is damaged ({error!r}); give another --out, or "
            "remove that folder"
        ) from error


def _refuse(out: str, split: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    # Who says nothing of a reduction has reduced nothing.
    theirs, ours = {"reduce": 1} | theirs, {"reduce": 1} | ours
    # Over their fields: a manifest has fewer than a claim.
    changes = [f"{k}: {v} -> {ours.get(k)}" for k, v in theirs.items() if v != ours.get(k)]
    require(
        not changes,
        f"out (={out}) holds another staging of {split} ({'; '.join(changes)})"
        f"{_about_images(theirs, ours)}; give another --out, or remove that folder",
    )


def _about_images(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What other fingerprints mean, where nothing else tells that the images are others."""
    was, now = str(theirs.get("images", "")), str(ours["images"])
    if was in ("", now) or theirs.get("count") != ours["count"]:
        return ""
    if now.startswith(OF_BYTES) and not was.startswith(OF_BYTES):
        return ": an earlier version knew files by names and sizes; whether they changed is unknown"
    return ": the files have changed since"


def as_claimed(out: str, parts: list[SplitPlan]) -> list[SplitPlan]:
    """The same parts, with the name of the source that the place knows where all else is the same:
    a folder that was renamed or moved holds the same images."""
    try:
        theirs = json.loads(at(out).read(CLAIM))
        names = [theirs[part.spec.split]["source"] for part in parts]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return parts  # nothing is staged there; or what is, is met by `stake_claim`
    renamed = [
        replace(part, spec=replace(part.spec, source=name))
        for part, name in zip(parts, names, strict=True)
    ]
    same = all(theirs[part.spec.split] == part.claim for part in renamed)
    return renamed if same else parts


# For the life of a worker process, which makes the shards of one staging.
@lru_cache(maxsize=1)
def _opened(address: str, options: tuple[tuple[str, str], ...]) -> Source:
    """A worker's source: opened once, for all of its shards."""
    return open_source(address, **dict(options))


def opened(config: StageConfig) -> Source:
    """The source that a staging is of.

    Raises:
        SourceError: there is none, or it is not clear what it holds.
    """
    return open_source(
        config.source, image_column=config.image_column, label_column=config.label_column,
        labels=config.labels,
    )  # fmt: skip


def make(task: ShardTask, source: Source | None = None) -> ShardResult:
    """Make one shard, or find it made; the whole of a worker's job.

    Raises:
        SourceError: a corrupt image, with on_corrupt="stop"; one of another size, or that cannot
            be reduced; a label beyond an int8.
        ValueError: a shard of another staging is in the way.
    """
    # It is found made where a staging goes on, and where Ray repeats a task whose worker died.
    made = _made(task)
    if made is not None:
        return made
    split, name = at(task.out).child(task.spec.split), shard_name(task.number)
    images, labels, ids, corrupt, contents = _read(
        source or _opened(task.source, task.options), task
    )
    rows = encode(images, labels, ids, task.spec)
    data, content = to_bytes(rows, task.spec), content_of(rows)
    info = ShardInfo(name, len(ids), len(data), hashlib.sha256(data).hexdigest())
    # The shard, then its note: where a note is, the shard is whole. Two that make the same shard at
    # once write the same bytes.
    split.write(name, data)
    about = {"decoder": VERSION, "corrupt": corrupt, "contents": contents, "content": content}
    note = {"claim": task.claim_hash, "info": asdict(info), **about}
    split.write(f"{NOTES}/{name}.json", _json(note))
    return ShardResult(task.spec.split, info, False, corrupt, contents, content)


def _made(task: ShardTask) -> ShardResult | None:
    """The finished shard, if it is there and whole."""
    split, name = at(task.out).child(task.spec.split), shard_name(task.number)
    try:
        # The note first: without one the shard's bytes need not be fetched.
        note = json.loads(split.read(f"{NOTES}/{name}.json"))
        data = split.read(name)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    require(
        # By the note, since a claim may have been deleted and another made in its place.
        note.get("claim") == task.claim_hash,
        f"out (={task.out}) holds a shard of another staging ({task.spec.split}/{name}); "
        "give another --out, or remove that folder",
    )
    # Of an earlier version, to which the same files had other pixels.
    if note.get("decoder") != VERSION:
        return None
    # By its bytes, not by being there: what was damaged since is made again.
    info = ShardInfo(**note["info"])
    if len(data) != info.bytes or hashlib.sha256(data).hexdigest() != info.sha256:
        log.warning("%s/%s was damaged since it was made: making it again", split.uri, name)
        return None
    # A kept shard remembers what it lacks: a staging that stops at corrupt images also stops at
    # those that an earlier one counted.
    _stop_at(note["corrupt"], task.on_corrupt)
    contents = {int(id): text for id, text in note["contents"].items()}
    # A note of an earlier version has none.
    content = note.get("content") or content_of(from_bytes(data, name)[0])
    return ShardResult(task.spec.split, info, True, note["corrupt"], contents, content)


def _read(
    source: Source, task: ShardTask
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], dict[int, str]]:
    """Images, labels and ids of a shard's whole images, the faults of the others, and contents."""
    kept, labels, ids, corrupt, contents = [], [], [], [], {}
    for item in source.items(task.stored_split, task.places):
        if item.pixels is None:
            corrupt.append(item.fault)
            _stop_at(corrupt, task.on_corrupt)
        else:
            kept.append(_checked(item, task.spec))
            labels.append(item.label)
            ids.append(item.id)
            contents[item.id] = _content(item.pixels)
    # A shard of corrupt images alone is a shard without rows; np.stack takes no empty list.
    images = np.stack(kept) if kept else np.empty((0, *[task.spec.size] * 2, 3), np.uint8)
    return images, np.array(labels, np.int64), np.array(ids, np.int64), corrupt, contents


def _content(pixels: Pixels) -> str:
    # Of the pixels and not of the file: a picture saved anew is the same picture.
    data = np.ascontiguousarray(pixels).tobytes()
    return hashlib.blake2b(data, digest_size=12, salt=str(pixels.shape).encode()[:16]).hexdigest()


def _stop_at(corrupt: list[str], on_corrupt: str) -> None:
    # The first is enough: the rest of the shard is not read.
    if corrupt and on_corrupt == "stop":
        raise SourceError(f"corrupt image {corrupt[0]}; mend it, or use --on-corrupt count")


def _checked(item: Item, spec: ShardSpec) -> Pixels:
    """The pixels, reduced as the spec says, of an image that fits the shards."""
    pixels, size = _reduced(item, spec.reduce), spec.size
    height, width, _ = pixels.shape
    if (height, width) != (size, size):
        cure = f"it, or use --size {width} for all" if width == height else "all to that square"
        again = f", reduced {spec.reduce} times," if spec.reduce > 1 else ""
        raise SourceError(
            f"image {item.where}{again} is {width} x {height} pixels, and size (={size}) says "
            f"{size} x {size}; crop or reduce {cure}"
        )
    _check_label(item)
    return pixels


def _check_label(item: Item) -> None:
    if item.label not in LABELS:
        raise SourceError(
            f"image {item.where} has label {item.label}; labels must be in [-1, 127], an int8; no "
            "training uses them: leave them out by --labels ignore"
        )


def _check_labels(part: SplitPlan, source: Source) -> None:
    """Refuse a label beyond the format before anything is written."""
    labels = source.labels(part.stored_split)
    if labels is None:
        return
    found = labels[part.places]
    beyond = part.places[(found < LABELS.start) | (found >= LABELS.stop)]
    for item in source.items(part.stored_split, beyond[:1]):
        # Whether its pixels can be read or not, which is not what is asked here.
        _check_label(item)


def _reduced(item: Item, reduce: int) -> Pixels:
    # Callers looked: one without pixels was counted as corrupt.
    assert item.pixels is not None
    try:
        return reduced(item.pixels, reduce)
    except ValueError as error:
        raise SourceError(f"image {item.where}: {error}") from error


Run = Callable[[list[ShardTask]], Iterable[ShardResult]]


def in_process(source: Source) -> Run:
    """One shard after the other, on one core: small operations only lose by being shared."""

    def run(tasks: list[ShardTask]) -> Iterator[ShardResult]:
        # Put back at the end, even where the caller stops half-way: the process may go on to train.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for task in tasks:
                yield make(task, source)
        finally:
            torch.set_num_threads(threads)

    return run


def stage(config: StageConfig, source: Source, run: Run) -> dict[str, int]:
    """Make every shard, then publish the manifests; returns what was done.

    Args:
        run: makes the shards of some tasks, in any order.

    Raises:
        SourceError, ValueError: see `make` and `stake_claim`; no manifest is written then.
        StorageError: shards that were made are not at `out`.
    """
    parts = as_claimed(config.out, plan(config, source))
    for item in source.items("train", parts[0].places[:1]):  # an obvious mistake claims nothing
        if item.pixels is not None:
            _checked(item, parts[0].spec)
    for part in parts:
        _check_labels(part, source)
    stake_claim(config.out, parts)
    done: dict[str, list[ShardResult]] = {part.spec.split: [] for part in parts}
    # Shards come in any order. Their notes, not this list, are what a staging goes on from.
    for shard in run([task for part in parts for task in part.tasks()]):
        done[shard.split].append(shard)
        for fault in shard.corrupt:
            log.warning("left out corrupt image %s", fault)
    for part in parts:
        _check_whole(part, done[part.spec.split])
    shared = _in_two_splits(parts, done)
    for line in told_twice(source, shared):
        log.warning("%s", line)
    # All splits are whole before the first is published. "test" is the last of them.
    for part in parts:
        # By name: a row's number follows from the manifest, not from who was first.
        shards = sorted(done[part.spec.split], key=lambda shard: shard.info.name)
        contents = {shard.info.sha256: shard.content for shard in shards}
        write_manifest(part.storage, Manifest(part.spec, [s.info for s in shards], contents))
    every = [s for shards in done.values() for s in shards]
    return {
        **{split: sum(s.info.rows for s in shards) for split, shards in done.items()},
        "shards": len(every),
        "reused": sum(s.reused for s in every),
        "corrupt": sum(len(s.corrupt) for s in every),
        # Where there is none there is nothing to say.
        **({"in two splits": len(shared)} if shared else {}),
    }


Place = tuple[SplitPlan, int]


def _in_two_splits(
    parts: list[SplitPlan], done: dict[str, list[ShardResult]]
) -> list[tuple[Place, Place]]:
    """Images whose pixels an earlier split has too, each with one of these."""
    first: dict[str, Place] = {}
    shared = []
    for part in parts:
        mine: dict[str, Place] = {}
        for shard in done[part.spec.split]:
            for id, content in shard.contents.items():
                if content in first:
                    shared.append((first[content], (part, id)))
                else:
                    mine[content] = part, id
        first |= mine
    return shared


def told_twice(source: Source, shared: list[tuple[Place, Place]]) -> list[str]:
    """How many images are in two splits, for each two, and a few of them by name."""
    pairs: dict[tuple[str, str], list[tuple[Place, Place]]] = defaultdict(list)
    for one, other in shared:
        pairs[one[0].spec.split, other[0].spec.split].append((one, other))
    return [
        f"{len(found)} image(s) of {b} have the pixels of an image of {a}, such as "
        + "; ".join(f"{_where(source, y)} = {_where(source, x)}" for x, y in found[:TOLD])
        + ": scores on them are of what was trained on" * (a == "train")
        for (a, b), found in pairs.items()
    ]


def _where(source: Source, place: Place) -> str:
    part, id = place
    (item,) = source.items(part.stored_split, np.array([id]))
    return item.where


def _check_whole(part: SplitPlan, done: list[ShardResult]) -> None:
    """Whatever the workers said, is it here?"""
    # Read from `out` as this process sees it. A worker whose folder of that name is another wrote
    # its shards where nobody will look for them.
    rows = sum(shard.info.rows for shard in done) + sum(len(shard.corrupt) for shard in done)
    there = set(part.storage.list("shard-"))
    gone = sorted(s.info.name for s in done if s.info.name not in there)
    if gone or rows != len(part.places):
        raise StorageError(
            f"{len(gone)} shard(s) such as {gone[:1]} and {len(part.places) - rows} image(s) of "
            f"{part.spec.split} are not at out (={part.out}); it must be a folder that all "
            "nodes share, or s3://bucket/prefix"
        )
    if not any(shard.info.rows for shard in done):
        raise SourceError(f"every image of split {part.spec.split} is corrupt; mend the source")


def stage_once(name: str, root: Path = Path("data")) -> str:
    """The folder of an embedded data set, staged in this process if it is not yet.

    Raises:
        ValueError: something else is staged there.
    """
    config = StageConfig(source=name, out=str(root / name), full_images=True)
    # The manifest that is published last: where it is, the others are.
    if not at(config.out).child("test").exists(MANIFEST):
        source = open_source(name)
        log.info("staged %s: %s", config.out, stage(config, source, in_process(source)))
    else:
        _require_embedded(config)
    return config.out


# What may be otherwise where an embedded data set was staged by hand: no image nor mask hangs on
# these. A split of one is counted by what its source has.
OF_NO_MATTER = ("full_images", "rows_per_shard")


def _require_embedded(config: StageConfig) -> None:
    """Refuse what only has the place of an embedded data set."""
    try:
        parts = plan(config, embedded(config.source))
    except SourceError as error:  # its photographs are not installed here, and need not be
        log.warning("%s is taken for %s as it is: %s", config.out, config.source, error)
        return
    there = at(config.out).exists(CLAIM)
    claims = json.loads(at(config.out).read(CLAIM)) if there else {}
    if not there:
        words = "%s has no %s: its images are taken for those of %s"
        log.warning(words, config.out, CLAIM, config.source)
    for part in parts:
        spec = read_manifest(part.storage).spec
        theirs = {"reduce": 1} | spec.fields | claims.get(part.spec.split, {})
        ours = {"reduce": 1} | part.claim
        changes = [
            f"{name}: {theirs[name]} -> {ours[name]}"
            for name in sorted(ours.keys() & theirs.keys() - set(OF_NO_MATTER))
            if theirs[name] != ours[name]
        ]
        require(
            not changes,
            f"data (={config.source!r}) is looked for in {config.out}, which holds another "
            f"{part.spec.split} split ({'; '.join(changes)}); use --data {config.out} for what is "
            "there, or remove that folder to have it staged anew",
        )
