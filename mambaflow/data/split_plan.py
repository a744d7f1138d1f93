"""The plan of a split: which images of a source are staged, how, where to, in which shards."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from mambaflow.data.random_bits import drawn
from mambaflow.data.shard_task import ShardTask
from mambaflow.data.shards import ShardSpec
from mambaflow.data.source import SPLIT_SEED, Source
from mambaflow.data.stage_config import StageConfig
from mambaflow.storage import at
from mambaflow.storage_base import Storage


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

    def tasks(self) -> Iterator[ShardTask]:
        """Its shards."""
        rows = self.spec.rows_per_shard
        claim_hash = hashlib.sha256(json_of(self.claim)).hexdigest()
        for number, first in enumerate(range(0, len(self.places), rows)):
            # Corrupt images are left out of their shard, and none moves up: a shard's rows follow
            # from its own places alone, whoever makes it.
            places = self.places[first : first + rows]
            yield ShardTask(
                self.source, self.out, self.spec, self.stored_split, places, number,
                self.on_corrupt, claim_hash, self.options,
            )  # fmt: skip


def json_of(value: Any) -> bytes:
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
