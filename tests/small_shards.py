"""A small split of shards, for tests."""

import hashlib

import numpy as np

from mambaflow.data.shards import (
    Manifest,
    ShardInfo,
    ShardSpec,
    encode,
    shard_name,
    to_bytes,
    write_manifest,
)
from mambaflow.storage import at

SPEC = ShardSpec(
    source="test", split="train", size=6, known=7, target=7, mask_seed=3, full_images=True,
    rows_per_shard=10,
)  # fmt: skip


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def rows_of(spec, first=0, count=10):
    ids = np.arange(first, first + count)
    images = pictures(first + count, spec.size)[first:]
    return encode(images, ids % 128, ids, spec)


def published(root, spec=SPEC, counts=(10, 10, 4)):
    """A split in shards of so many rows."""
    split, infos, first = at(root).child(spec.split), [], 0
    for number, count in enumerate(counts):
        data = to_bytes(rows_of(spec, first, count), spec)
        split.write(shard_name(number), data)
        infos.append(ShardInfo(shard_name(number), count, len(data), digest(data)))
        first += count
    write_manifest(split, Manifest(spec, infos))
    return root


def digest(data):
    return hashlib.sha256(data).hexdigest()


def same(one, other):
    for name in ("ids", "labels", "index", "rgb", "images"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a, b), name


def opened(shards) -> list[int]:
    """The shards that are open."""
    return np.flatnonzero(shards._slots >= 0).tolist()
