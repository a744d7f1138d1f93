"""What an evaluation asks: every way of answering an image (a cell), and of which images."""

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from mambaflow.checks import lookup, require, require_positive
from mambaflow.data.random_bits import bits
from mambaflow.data.shards import ShardSpec
from mambaflow.evaluation.baselines import FILLS
from mambaflow.flow.samplers import GRIDS, SOLVERS

ORDER_SEED = 0
# Pixels that are answered together. The images of a group follow from this and from their size
# alone: what else is computed beside an image may move its last bits.
GROUP_PIXELS = 32 * 32 * 32
NO_CHECKPOINT = "classical"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what, and where the rows go."""

    checkpoint: tuple[str, ...] = ()
    """Runs, or checkpoints of runs: folders or s3://…; NAME=URI gives one a name in the report."""
    data: str = "sample"
    """Staged shards (a folder or s3://…), or anything that jobs/stage.py takes as its source."""
    out: str = "results"
    """Where rows and report go: a folder or s3://bucket/prefix. What is there already is kept."""
    split: Literal["test", "validation"] = "test"
    """Which held-out images."""
    limit: int = 512
    """How many of them: the first of one seeded order over all, so that more add to fewer."""
    samplers: tuple[str, ...] = ("mean", "heun")
    """Of mean, exponential, ddim, sde, midpoint, heun."""
    nfe: tuple[int, ...] = (10,)
    """Calls of the network for an answer, the same for every sampler but mean, which takes one."""
    resolutions: tuple[int, ...] = ()
    """Pixels on a side; none: as staged. Larger ones are painted anew at their pixel centres."""
    known_shares: tuple[float, ...] = ()
    """Shares of the pixels that are known; none: as staged. Masks are nested."""
    asked: tuple[int, ...] = ()
    """Also ask only as many of the unknown pixels (samples keep their law, or do not)."""
    samples: int = 1
    """Samples of each image and sampler; from 2 on their mean and deviation are rows too."""
    fills: tuple[str, ...] = ("nearest", "linear", "thin-plate")
    """Classical fills of the same masks; biharmonic too, which takes seconds an image."""
    at_nfe: int = 10
    """Calls where resolutions, shares and numbers asked vary; each varies alone."""
    cross: bool = False
    """Combine all of nfe, resolutions, shares and numbers asked instead."""
    temperature: float = 0.5
    """Of sde: 0 is Heun."""
    eta: float = 0.0
    """Of ddim: 0 is Euler's method, 1 draws most noise."""
    grid: str = "uniform"
    """Of the times."""
    lpips: str = "torchvision"
    """Weights of LPIPS: torchvision's, a file of them (AlexNet's features), or none."""
    truth: str = ""
    """Staged shards of the same images at a higher resolution, of which `data` are the reduced
    ones: answers of that resolution are scored against them."""
    pictures: int = 48
    """Images whose pictures are kept; best, median and worst are found among them."""
    num_workers: int = 0
    """Actors that answer; 0: one for each core, or GPU, of the cluster."""
    use_gpu: bool = False
    """Answer on GPUs."""
    gpus_per_worker: float = 1.0
    """Share of a GPU that an actor takes: 0.5 puts two on each."""
    retry_errors: bool = False
    """Do failed rows again."""
    ray: bool = True
    """--no-ray: in this process."""
    status: bool = False
    """Only say how far the evaluation at --out is."""
    report_only: bool = False
    """Only make the report of the rows at --out."""

    def __post_init__(self) -> None:
        require_positive(self, "limit", "samples", "at_nfe", "gpus_per_worker")
        for name in ("pictures", "num_workers"):
            value = getattr(self, name)
            require(value >= 0, f"{name} (={value}) must not be negative; use 0 or more")
        for name, registry, what in (
            ("samplers", SOLVERS, "sampler"), ("fills", FILLS, "fill"),
        ):  # fmt: skip
            for value in getattr(self, name):
                lookup(registry, value, what)
        lookup(GRIDS, self.grid, "grid")
        for name in ("nfe", "resolutions", "asked"):
            bad = [value for value in getattr(self, name) if value < 1]
            require(not bad, f"{name} (={bad}) must be positive; use 1 or more")
        bad_shares = [share for share in self.known_shares if not 0 < share < 1]
        require(not bad_shares, f"known_shares (={bad_shares}) must be in (0, 1); use 0.2")
        require(0 <= self.eta <= 1, f"eta (={self.eta}) must be in [0, 1]; use 0, 0.3 or 1")
        require(
            0 <= self.temperature <= 10,
            f"temperature (={self.temperature}) must be in [0, 10]; use 0.5",
        )
        require(
            not (self.status and self.report_only),
            "status and report_only (both given) are two things to do; use one",
        )
        if self.status or self.report_only:
            return  # nothing is answered: what would be does not matter
        require(
            bool(self.samplers) or bool(self.fills),
            "samplers and fills (both empty) leave nothing to do; use --samplers mean",
        )
        require(
            not self.samplers or bool(self.checkpoint),
            "checkpoint (none given) must name a run for the samplers; use --checkpoint RUN, or "
            "--samplers without a name for the classical fills alone",
        )
        self._require_use_of_settings()

    def _require_use_of_settings(self) -> None:
        for name, usual, sampler in (("temperature", 0.5, "sde"), ("eta", 0.0, "ddim")):
            value = getattr(self, name)
            require(
                value == usual or sampler in self.samplers,
                f"{name} (={value:g}) is of {sampler}, which is none of samplers "
                f"(={' '.join(self.samplers)}); add it, or leave --{name} out",
            )
        require(
            self.grid == "uniform" or bool({*self.samplers} - {"mean"}),
            f"grid (={self.grid!r}) is of times, which none of samplers "
            f"(={' '.join(self.samplers)}) takes; add one, or leave --grid out",
        )


@dataclass(frozen=True, order=True)
class Cell:
    """One way of answering an image: what the rows of a table differ in."""

    checkpoint: str
    """Its name in the report; NO_CHECKPOINT of a classical fill."""
    sampler: str
    """Of SOLVERS, or of FILLS."""
    settings: str
    """Of the sampler, such as "eta=0.3"; empty where it has none."""
    nfe: int
    """Calls of the network that an answer takes; 0 of a fill."""
    resolution: int
    known: int
    """Known pixels of an image."""
    asked: int
    """Unknown pixels asked; 0: all."""

    @property
    def is_fill(self) -> bool:
        """Whether this is a classical fill."""
        return self.checkpoint == NO_CHECKPOINT

    @property
    def is_sample(self) -> bool:
        """Whether each answer is one of many."""
        return not self.is_fill and self.sampler != "mean"

    @property
    def options(self) -> tuple[str, dict[str, float | int]]:
        """The grid of times, and the sampler's own settings."""
        pairs = dict(part.split("=") for part in self.settings.split(",") if part)
        grid = pairs.pop("grid", "uniform")
        settings: dict[str, float | int] = {name: float(value) for name, value in pairs.items()}
        if self.sampler == "sde":
            # A tenth of the steps draw no noise: its own default is that of fifty steps, and with
            # five of them it would be Heun's method.
            settings["noiseless_steps"] = max(1, self.steps // 10)
        return grid, settings

    @property
    def steps(self) -> int:
        """Intervals of the grid of times."""
        return SOLVERS[self.sampler].steps_for(self.nfe)


class Key(NamedTuple):
    """What a row is a function of."""

    cell: Cell
    image: int
    """Its id in the data set."""
    sample: int
    """Which of several, from 0 on; -K: the mean of the first K."""

    @property
    def flat(self) -> tuple[object, ...]:
        """In the order of the columns KEY of evaluation.rows."""
        return (*astuple(self.cell), self.image, self.sample)


CELL_FIELDS = [f.name for f in fields(Cell)]


def cells(config: EvaluateConfig, names: list[str], spec: ShardSpec) -> list[Cell]:
    """Every cell that the flags ask for, each once.

    Args:
        names: of the checkpoints.
        spec: how the data were staged.

    Raises:
        ValueError: a resolution, a share or a number of pixels that these images do not have.
    """
    found = list(_fills(config, spec))
    axes = not config.cross and (config.resolutions or config.known_shares or config.asked)
    for name, sampler in itertools.product(names, config.samplers):
        _require_an_answer(sampler, "nfe", config.nfe)
        if axes:
            _require_an_answer(sampler, "at_nfe", (config.at_nfe,))
        found += _of_sampler(config, name, sampler, spec)
    return list(dict.fromkeys(found))


def _require_an_answer(sampler: str, name: str, budgets: tuple[int, ...]) -> None:
    least = SOLVERS[sampler].calls_per_step
    require(
        any(_calls(sampler, nfe) for nfe in budgets),
        f"{name} (={' '.join(map(str, budgets))}) is too little for {sampler}, a step of which "
        f"takes {least} calls; use {least} or more, or leave {sampler} out",
    )


def _fills(config: EvaluateConfig, spec: ShardSpec) -> Iterator[Cell]:
    shares = dict.fromkeys((spec.known, *known_counts(config, spec)))
    for fill, known in itertools.product(config.fills, shares):
        yield Cell(NO_CHECKPOINT, fill, "", 0, spec.size, known, 0)


def _of_sampler(config: EvaluateConfig, name: str, sampler: str, spec: ShardSpec) -> Iterator[Cell]:
    for nfe, *point in _points(config, spec):
        calls = _calls(sampler, nfe)
        if calls:  # a sampler that takes two calls a step has no answer of one
            yield Cell(name, sampler, _settings(config, sampler), calls, *point)


def _points(config: EvaluateConfig, spec: ShardSpec) -> Iterator[tuple[int, int, int, int]]:
    """Calls, resolution, known pixels and pixels asked, of every answer of a sampler."""
    size, known, nfe = spec.size, spec.known, config.at_nfe
    sizes, shares = _resolutions(config, spec), known_counts(config, spec)
    asked = _asked(config, spec)
    if config.cross:
        every = itertools.product(config.nfe, sizes or (size,), shares, asked or (0,))
        yield from (p for p in every if p[1] == size or not p[3])  # a part of no finer grid
        return
    yield from ((calls, size, known, 0) for calls in config.nfe)
    # One axis at a time: all combinations are hundreds, which nobody reads.
    yield from ((nfe, resolution, known, 0) for resolution in sizes)
    yield from ((nfe, size, count, 0) for count in shares if config.known_shares)
    yield from ((nfe, size, known, count) for count in asked)


def _calls(sampler: str, nfe: int) -> int:
    """The calls that a budget comes to; 0 where it is too small for the sampler."""
    solver = SOLVERS[sampler]
    return solver.calls(solver.steps_for(nfe)) if nfe >= solver.calls_per_step else 0


def _settings(config: EvaluateConfig, sampler: str) -> str:
    own = {"sde": f"temperature={config.temperature:g}", "ddim": f"eta={config.eta:g}"}
    grid = f"grid={config.grid}" if config.grid != "uniform" and sampler != "mean" else ""
    return ",".join(part for part in (own.get(sampler, ""), grid) if part)


def _resolutions(config: EvaluateConfig, spec: ShardSpec) -> tuple[int, ...]:
    small = [r for r in config.resolutions if r < spec.size]
    require(
        not small,
        f"resolutions (={small}) must be at least {spec.size}, that of the data; leave them out",
    )
    return config.resolutions


def known_counts(config: EvaluateConfig, spec: ShardSpec) -> tuple[int, ...]:
    """Known pixels of an image, for each share asked for."""
    # Rounded down, as in staging: 204 of 1,024 for a fifth.
    counts = tuple(int(share * spec.size**2) for share in config.known_shares)
    bad = [s for s, n in zip(config.known_shares, counts, strict=True) if n < 1]
    require(not bad, f"known_shares (={bad}) keep no pixel of {spec.size} x {spec.size}; use more")
    return counts or (spec.known,)


def _asked(config: EvaluateConfig, spec: ShardSpec) -> tuple[int, ...]:
    most = spec.size**2 - spec.known
    bad = [n for n in config.asked if n > most]
    require(not bad, f"asked (={bad}) must be at most {most}, the unknown pixels; use fewer")
    return tuple(n if n < most else 0 for n in config.asked)  # all of them is 0


def order(rows: int) -> Int[np.ndarray, " rows"]:
    """The order in which held-out images are taken: seeded, over all of them."""
    # The first of the shards' own order are often of one class.
    words = bits(ORDER_SEED, "evaluation/order", 0, torch.arange(rows), 1)[:, 0]
    return words.argsort(stable=True).numpy()


def group_size(resolution: int, size: int) -> int:
    """Images that are answered together, of data with `size` pixels on a side."""
    # A larger one is painted by itself: alone it fills a core.
    return 1 if resolution > size else max(1, GROUP_PIXELS // size**2)


@dataclass(frozen=True)
class Unit:
    """What an actor does at a time: samples of a group of images by one cell."""

    cell: Cell
    group: int
    """Of the images in their order, each group as many as `group_size`."""
    images: tuple[int, ...]
    """Ids of those whose rows are asked for: the others are computed and dropped."""
    samples: tuple[int, ...]
    """As in a Key; what is asked for of each image."""

    @property
    def keys(self) -> list[Key]:
        """Of the rows that it makes."""
        return [Key(self.cell, i, s) for s in self.samples for i in self.images]
