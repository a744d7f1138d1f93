"""Staging: from a source's images to a split's shards, in parallel and restartable.

A shard's name in a split says its place, and a small note beside it what it holds, so that a
staging that stopped half-way goes on where it was, and one with another recipe is refused.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mambaflow.config import require
from mambaflow.shards import (
    MANIFEST,
    Manifest,
    Recipe,
    ShardInfo,
    encode,
    shard_name,
    to_bytes,
    write_manifest,
)
from mambaflow.sources import Source, SourceError, open_source
from mambaflow.storage import Storage, at

NOTES = "staging"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What to stage, how, and where."""

    source: str = "sample"
    """sample, cifar10, a .parquet file, a folder of them, or a folder of images by class."""
    out: str = "data/sample"
    """Where to: a folder or s3://bucket/prefix."""
    known_ratio: float = 0.2
    """Share of the pixels that are known."""
    target_ratio: float = 0.2
    """Share of the pixels, disjoint from the known, that training asks for."""
    mask_seed: int = 42
    """Seed of the masks."""
    validation: int = 256
    """Training images held out for validation."""
    full_images: bool = False
    """Keep whole training images too, for training with fresh masks."""
    rows_per_shard: int = 1024
    """Images in a shard."""
    on_corrupt: str = "stop"
    """A corrupt image: stop, or count it and leave it out."""
    limit: int = 0
    """Stage only as many training images as this; 0: all."""
    ray: bool = True
    """Fan out over Ray; --no-ray: one shard after the other in this process."""

    def __post_init__(self) -> None:
        for name in ("known_ratio", "target_ratio"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} (={value}) must be in (0, 1); use 0.2")
        total = self.known_ratio + self.target_ratio
        require(
            total <= 1,
            f"known_ratio + target_ratio (={total:g}) must be at most 1: the two are disjoint; "
            "use 0.2 and 0.2",
        )
        require(
            self.on_corrupt in ("stop", "count"),
            f"unknown on_corrupt {self.on_corrupt!r}; valid: stop, count",
        )
        require(0 <= self.mask_seed < 2**32, f"mask_seed (={self.mask_seed}) must be in [0, 2^32)")
        for name in ("rows_per_shard", "validation"):
            value = getattr(self, name)
            require(value > 0, f"{name} (={value}) must be positive; use 1 or more")
        require(self.limit >= 0, f"limit (={self.limit}) must not be negative; use 0 for all")


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    source: str
    out: str
    recipe: Recipe
    stored_split: str
    places: tuple[int, ...]
    number: int
    on_corrupt: str


@dataclass(frozen=True)
class Done:
    """A shard that is in place."""

    split: str
    info: ShardInfo
    reused: bool
    corrupt: list[str]


def plan(config: StageConfig, source: Source) -> list[Task]:
    """Every shard of every split.

    Raises:
        SourceError: the first image is corrupt, or not square.
    """
    size = _size(source)
    pixels = size * size
    tasks = []
    for split, (stored, places) in source.splits(config.validation).items():
        if split == "train" and config.limit:
            places = places[: config.limit]
        recipe = Recipe(
            source=source.name,
            split=split,
            size=size,
            known=int(config.known_ratio * pixels),
            target=int(config.target_ratio * pixels),
            mask_seed=config.mask_seed,
            full_images=config.full_images or split != "train",
            rows_per_shard=config.rows_per_shard,
        )
        for number, first in enumerate(range(0, len(places), config.rows_per_shard)):
            chosen = tuple(places[first : first + config.rows_per_shard].tolist())
            tasks.append(
                Task(config.source, config.out, recipe, stored, chosen, number, config.on_corrupt)
            )
    return tasks


def _size(source: Source) -> int:
    first = source.item("train", 0)
    if first.pixels is None:
        raise SourceError(f"corrupt image {first.fault}; mend or remove it")
    height, width, _ = first.pixels.shape
    if height != width:
        raise SourceError(
            f"{source.name} has images of {width} x {height}; they must be square, crop them first"
        )
    return height


def make(task: Task, source: Source | None = None) -> Done:
    """Make one shard, or find it made; the whole of a worker's job.

    Raises:
        SourceError: a corrupt image, with on_corrupt="stop".
        ValueError: a shard of another recipe is in the way.
    """
    split = at(task.out).child(task.recipe.split)
    made = _made(split, task)
    if made is not None:
        return made
    images, labels, ids, corrupt = _read(source or open_source(task.source), task)
    data = to_bytes(encode(images, labels, ids, task.recipe), task.recipe)
    name = shard_name(task.number)
    info = ShardInfo(name, len(ids), len(data), hashlib.sha256(data).hexdigest())
    split.write(name, data)
    note = {"key": _key(task), "info": asdict(info), "corrupt": corrupt}
    split.write(f"{NOTES}/{name}.json", json.dumps(note).encode())
    return Done(task.recipe.split, info, False, corrupt)


def _key(task: Task) -> str:
    """What a shard depends on: its recipe and which images are in it."""
    places = hashlib.sha256(np.asarray(task.places, np.int64).tobytes()).hexdigest()[:16]
    return f"{task.recipe.hash}/{places}"


def _made(split: Storage, task: Task) -> Done | None:
    name = shard_name(task.number)
    note_name = f"{NOTES}/{name}.json"
    if not (split.exists(note_name) and split.exists(name)):
        return None
    note = json.loads(split.read(note_name))
    if note["key"] != _key(task):
        raise ValueError(
            f"out (={task.out}) holds shards of another recipe ({task.recipe.split}/{name}); "
            "give another --out, or remove that folder"
        )
    return Done(task.recipe.split, ShardInfo(**note["info"]), True, note["corrupt"])


def _read(source: Source, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    kept, corrupt = [], []
    for place in task.places:
        item = source.item(task.stored_split, place)
        fault = item.fault
        if item.pixels is not None and item.pixels.shape != (task.recipe.size,) * 2 + (3,):
            fault = f"{source.name}, split {task.stored_split}, image {place}: shape " + str(
                item.pixels.shape
            )
        if not fault:
            kept.append(item)
        elif task.on_corrupt == "stop":
            raise SourceError(f"corrupt image {fault}; mend it, or use --on-corrupt count")
        else:
            log.warning("left out corrupt image %s", fault)
            corrupt.append(fault)
    size = task.recipe.size
    images = np.empty((len(kept), size, size, 3), np.uint8)
    for i, item in enumerate(kept):
        images[i] = item.pixels
    labels = np.array([item.label for item in kept], np.int64)
    return images, labels, np.array([item.id for item in kept], np.int64), corrupt


Run = Callable[[list[Task]], Iterable[Done]]


def in_process(source: Source) -> Run:
    """One shard after the other."""

    def run(tasks: list[Task]) -> Iterator[Done]:
        for task in tasks:
            yield make(task, source)

    return run


def stage(config: StageConfig, source: Source, run: Run) -> dict[str, int]:
    """Make every shard, then publish the manifests; returns what was done.

    Args:
        run: makes the shards of some tasks, in any order.
    """
    tasks = plan(config, source)
    done: dict[str, list[Done]] = {task.recipe.split: [] for task in tasks}
    for shard in run(tasks):
        done[shard.split].append(shard)
    recipes = {task.recipe.split: task.recipe for task in tasks}
    for split, shards in done.items():
        infos = sorted((s.info for s in shards), key=lambda info: info.name)
        write_manifest(at(config.out).child(split), Manifest(recipes[split], infos))
    every = [s for shards in done.values() for s in shards]
    return {
        **{split: sum(s.info.rows for s in shards) for split, shards in done.items()},
        "shards": len(every),
        "reused": sum(s.reused for s in every),
        "corrupt": sum(len(s.corrupt) for s in every),
    }


def stage_once(name: str, root: Path = Path("data")) -> str:
    """The folder of an embedded data set, staged in this process if it is not yet."""
    config = StageConfig(source=name, out=str(root / name), full_images=True)
    if not at(config.out).child("test").exists(MANIFEST):
        source = open_source(name)
        log.info("staged %s: %s", config.out, stage(config, source, in_process(source)))
    return config.out
