"""Staging: from a source's images to a split's shards, in parallel and restartable.

    <root>/train/staging/shard-00000.parquet.json a note: this shard is whole, and its checksum

A staging that stopped goes on where it was: a shard is kept if it has its note and its checksum.
Two stagings of the same images write the same bytes; another one finds the claim (`data.claim`),
and is refused.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from mambaflow.checks import require
from mambaflow.data.claim import CLAIM, as_claimed, stake_claim
from mambaflow.data.decode import VERSION, Pixels
from mambaflow.data.duplicates import in_two_splits, told_twice
from mambaflow.data.pixels import reduced
from mambaflow.data.remote import SourceError
from mambaflow.data.shard_task import ShardResult, ShardTask
from mambaflow.data.shards import (
    MANIFEST,
    Manifest,
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
from mambaflow.data.source import Item, Source
from mambaflow.data.sources import embedded, open_source
from mambaflow.data.split_plan import SplitPlan, json_of, plan
from mambaflow.data.stage_config import StageConfig
from mambaflow.storage import at
from mambaflow.storage_base import StorageError

NOTES = "staging"  # beside the shards' own names: a listing of "shard-" does not see it
LABELS = range(-1, 128)  # an int8; -1 where there is none
log = logging.getLogger(__name__)


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
    split.write(f"{NOTES}/{name}.json", json_of(note))
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
    shared = in_two_splits(parts, done)
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
