"""One shard to make, and what comes of it: what goes between a staging and its workers."""

from dataclasses import dataclass

import numpy as np

from mambaflow.data.shards import ShardInfo, ShardSpec


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
