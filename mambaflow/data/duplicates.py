"""Images whose pixels are in two splits: found as a staging ends, and told by name."""

from collections import defaultdict

import numpy as np

from mambaflow.data.shard_task import ShardResult
from mambaflow.data.source import Source
from mambaflow.data.split_plan import SplitPlan

TOLD = 3  # images in two splits that are named
Place = tuple[SplitPlan, int]


def in_two_splits(
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
