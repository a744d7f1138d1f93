"""From flags to work: what an evaluation reads, what its rows depend on, and what is missing."""

import ast
import hashlib
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import mambaflow
from mambaflow.checks import require
from mambaflow.config import ARCHITECTURES
from mambaflow.data.batches import Layout
from mambaflow.data.shard_reader import ShardSet, split_hash
from mambaflow.evaluation.activity import activity, sextile_edges
from mambaflow.evaluation.answers import Job, perceptual, rows_of
from mambaflow.evaluation.cells import (
    NO_CHECKPOINT,
    Cell,
    EvaluateConfig,
    Key,
    Unit,
    cells,
    group_size,
    order,
)
from mambaflow.evaluation.complete import EvalSet
from mambaflow.evaluation.super_resolution import area_reduce
from mambaflow.models.weights import CheckpointInfo, load_model, read_best
from mambaflow.report.pictures import to_png
from mambaflow.storage import at

# The sextiles of activity are of the first images of the order, as many as this, whatever the
# limit: a row must not depend on how many others are asked for.
EDGE_IMAGES = 1024
# Where numbers come from: what changes there makes another number of the same key. What plans,
# keeps and shows them may change.
WINGS = ("kernels", "data", "models", "flow")
ROOMS = (
    "activity", "answers", "baselines", "calibration", "cells", "complete", "cost", "enlarge",
    "fine_spread", "metrics", "perceptual", "quality", "reliability", "scored_images", "speckle",
    "sums", "super_resolution",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is asked for, in the order in which it is done."""

    job: Job
    cells: list[Cell]
    images: list[int]
    """Ids, in their order."""
    samples: int
    held: int
    """Images of the split."""

    @property
    def keys(self) -> list[Key]:
        """Of all rows that are asked for."""
        return [key for cell in self.cells for key in self.keys_of(cell)]

    def keys_of(self, cell: Cell) -> Iterator[Key]:
        """Of a cell's rows."""
        return keys_of(cell, self.images, self.samples, self.size)

    @property
    def size(self) -> int:
        """Pixels on a side of the data."""
        return int(self.job.fingerprint["data"]["size"])

    def units(self, done: Iterable[Key]) -> list[Unit]:
        """What is left to do, first all cells of the first images, then of the next."""
        have, place = set(done), {image: place for place, image in enumerate(self.images)}
        found: list[Unit] = []
        for cell in self.cells:
            wanted: dict[int, list[Key]] = defaultdict(list)
            together = group_size(cell.resolution, self.size)
            for key in self.keys_of(cell):
                if key not in have:
                    wanted[place[key.image] // together].append(key)
            for group, keys in wanted.items():
                found += _units(cell, group, keys)
        # By the place of the first image: samplers of one group follow one another, and have its
        # mean in common; and all kinds of work are timed soon.
        return sorted(found, key=lambda u: u.group * group_size(u.cell.resolution, self.size))


def keys_of(cell: Cell, images: Iterable[int], samples: int, size: int) -> Iterator[Key]:
    """Of a cell's rows, of images whose data have `size` pixels on a side."""
    numbers = [0]
    if cell.is_sample and samples > 1:
        # What samples come to together is compared with a truth of all pixels.
        plain = cell.resolution == size and not cell.asked
        numbers = [*range(samples), *([-samples] if plain else [])]
    for image in images:
        yield from (Key(cell, image, number) for number in numbers)


def _units(cell: Cell, group: int, keys: list[Key]) -> Iterator[Unit]:
    """The work for some missing rows of a group: images that lack the same samples together."""
    lacking: dict[int, list[int]] = defaultdict(list)
    for key in keys:
        lacking[key.image].append(key.sample)
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for image, samples in lacking.items():
        alike[tuple(samples)].append(image)
    for wanted, images in alike.items():
        yield Unit(cell, group, tuple(images), wanted)


def plan(config: EvaluateConfig) -> Plan:
    """What the flags ask for; every address is read, and nothing written.

    Raises:
        ValueError, OSError: an address that cannot be read, or what the flags cannot mean.
    """
    split = ShardSet(config.data, config.split)
    require(len(split) > 0, f"split {config.split!r} of {config.data} is empty; stage some images")
    infos = {name: read_best(uri) for name, uri in named(config.checkpoint).items()}
    for name, info in infos.items():
        load_model(info.uri)  # its bytes are whole, and of this version: better now than in hours
        log.info("%s: %s, step %d", name, info.uri, info.step)
        if name.lower() in {*ARCHITECTURES} - {info.config.arch}:
            log.warning("%s is of architecture %s: exchanged?", name, info.config.arch)
    asked = cells(config, [*infos], split.spec)
    known = sorted({cell.known for cell in asked})
    taken = order(len(split))
    images = split.rows(taken[: config.limit], pixels=False, images=False).ids.tolist()
    truth = at(config.truth).uri if config.truth else ""
    if truth:
        size = ShardSet(truth, config.split).spec.size
        require(
            size in {cell.resolution for cell in asked},
            f"truth (={truth}) is of {size} x {size}, and no answer is: nothing would be scored "
            f"against it; add --resolutions {size}, or leave --truth out",
        )
        _check_truth(split, ShardSet(truth, config.split), taken[: config.limit])
    lpips = config.lpips
    if lpips not in ("none", "torchvision"):
        lpips = str(Path(lpips).expanduser().resolve())  # actors run in folders of their own
    job = Job(
        data=at(config.data).uri,
        split=config.split,
        checkpoints={name: info.uri for name, info in infos.items()},
        edges={count: _edges(split, count, taken[:EDGE_IMAGES]) for count in known},
        lpips=lpips,
        truth=truth,
        pictures=frozenset(images[: config.pictures]),
        device="cuda" if config.use_gpu else "cpu",
    )
    fingerprint = _fingerprint(job, infos, split)
    return Plan(replace(job, fingerprint=fingerprint), asked, images, config.samples, len(split))


def named(checkpoints: Iterable[str]) -> dict[str, str]:
    """Addresses of checkpoints by the names that reports give them.

    Raises:
        ValueError: a name that is taken, or kept for the classical fills.
    """
    found: dict[str, str] = {}
    for given in checkpoints:
        name, equals, uri = given.partition("=")
        if not equals or "/" in name:  # an address may hold one too
            uri = given
            # A run's own name; of one of its checkpoints both.
            name = re.sub(r"/(step_\d+)$", r" \1", at(given).uri).rpartition("/")[2]
        require(
            name not in found and name not in ("", NO_CHECKPOINT),
            f"checkpoint (={given}) would be called {name!r}, which is taken; use NAME={uri}",
        )
        found[name] = uri
    return found


def _check_truth(split: ShardSet, truth: ShardSet, rows: np.ndarray) -> None:
    """Refuse a truth whose images, made smaller, are not those of the data."""
    factor, left = divmod(truth.spec.size, split.spec.size)
    require(
        left == 0 and factor > 1,
        f"truth (of size {truth.spec.size}) must be a whole multiple of data's size "
        f"(={split.spec.size}); stage data with --reduce",
    )
    small = split.rows(rows, pixels=False)
    large = truth.rows(rows_of(truth, small.ids), pixels=False)
    real, given = (_as_images(held.images, len(rows)) for held in (large, small))
    off = (area_reduce(real, factor) - given).abs().amax((1, 2, 3))
    require(
        bool((off <= 0.51).all()),  # bytes are rounded
        f"truth (={truth.storage.uri}) does not hold the images of data (={split.storage.uri}) "
        f"before they were reduced: image {int(small.ids[off.argmax()])} differs by "
        f"{off.max():.0f} of 255; stage both from one source, data with --reduce",
    )


def _as_images(flat: np.ndarray | None, count: int) -> Float[Tensor, "m h w 3"]:
    assert flat is not None  # held-out shards hold whole images: `split.rows` has said so
    size = math.isqrt(flat.size // (3 * count))
    return torch.from_numpy(flat).view(count, size, size, 3).float()


def _edges(split: ShardSet, known: int, rows: np.ndarray) -> tuple[float, ...]:
    layout = Layout(split.spec.size, known, split.spec.target)
    held = EvalSet.of_rows(split, layout, rows, np.zeros(0))
    active = activity(held.images.numpy(), held.known.numpy())
    return tuple(sextile_edges(active, held.known.numpy()).tolist())


def _fingerprint(job: Job, infos: Mapping[str, CheckpointInfo], split: ShardSet) -> dict[str, Any]:
    """What rows depend on besides their keys."""
    measure = perceptual(job.lpips)
    return {
        "format": 1,
        "code": code_version(),
        "data": {
            "split": job.split,
            "size": split.spec.size,
            "known": split.spec.known,
            # Masks of other shares are drawn by it, too.
            "mask seed": split.spec.mask_seed,
            "hash": split_hash(split.storage),
        },
        # By name: another checkpoint beside those that are there is no contradiction.
        "weights": {name: info.files[info.file("ema")][:16] for name, info in infos.items()},
        "sextile edges": {str(known): list(edges) for known, edges in job.edges.items()},
        "lpips": "none" if measure is None else measure.sha256[:16],
        "truth": job.truth and split_hash(at(job.truth).child(job.split)),
        "device": job.device,
    }


def code_version() -> str:
    """The version, and a hash of the code that numbers come from: of what it does, not of how it
    is laid out or commented."""
    digest, root = hashlib.sha256(), Path(mambaflow.__file__).parent
    files = [path for wing in WINGS for path in sorted((root / wing).rglob("*"))]
    files += [root / "evaluation" / f"{room}.py" for room in ROOMS]
    for path in files:
        if path.suffix in (".py", ".cpp"):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(_meaning(path).encode())
    return f"{mambaflow.__version__}-{digest.hexdigest()[:12]}"


def _meaning(path: Path) -> str:
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        # A docstring is an expression that stands first and does nothing.
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                body.pop(0)
    return ast.dump(tree)


def truths(plan: Plan) -> list[dict[str, Any]]:
    """What answers are shown beside (`Results.keep_truths`)."""
    split = ShardSet(plan.job.data, plan.job.split)
    rows = order(len(split))[: len(plan.job.pictures)]  # the first of the order
    layout = Layout(split.spec.size, split.spec.known, split.spec.target)
    held = EvalSet.of_rows(split, layout, rows, np.zeros(0))
    return [
        {"image": int(held.ids[i]), "truth": to_png(held.images[i].numpy()),
         "known": held.known[i].tolist()}
        for i in range(len(held))
    ]  # fmt: skip


def request(plan: Plan, command: str) -> dict[str, Any]:
    """What is asked for, as it is written down for who looks from elsewhere."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "data": plan.job.data,
        "cells": [asdict(cell) for cell in plan.cells],
        "images": plan.images,
        "samples": plan.samples,
    }
