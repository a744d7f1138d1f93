"""What a search may choose: a few fields of a run, each with its values, or a list of runs.

A field is named as in a run's config.json: `model.d_model`, `train.lr`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from mambaflow.checks import require
from mambaflow.config import RunConfig

Values = dict[str, Any]
"""Field -> the value that a trial has of it."""


@dataclass(frozen=True)
class Choice:
    """One of a few values.

    Raises:
        ValueError: no value, or one that is there twice.
    """

    values: Sequence[Any]

    def __post_init__(self) -> None:
        distinct = {repr(value) for value in self.values}
        require(
            len(distinct) == len(self.values) > 0,
            f"values (={list(self.values)}) must be one or more, each of them once",
        )

    def draw(self, random: np.random.Generator) -> Any:
        """One of them, each as likely as the others."""
        return self.values[int(random.integers(len(self.values)))]


@dataclass(frozen=True)
class LogUniform:
    """A number whose logarithm is uniform in [log low, log high].

    Raises:
        ValueError: the ends are not above 0 and in order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        require(
            0 < self.low < self.high < math.inf,
            f"low (={self.low}) must be above 0 and below high (={self.high}); exchange them",
        )

    def draw(self, random: np.random.Generator) -> float:
        """A number of that law."""
        # Four digits: a person can type what was found, and gets the same run.
        drawn = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        return float(f"{drawn:.4g}")


Dimension = Choice | LogUniform


@dataclass(frozen=True)
class Product:
    """Every combination of the values of some fields.

    Raises:
        ValueError: no field.
    """

    dimensions: Mapping[str, Dimension]

    def __post_init__(self) -> None:
        require(bool(self.dimensions), "a space (={}) must have a field to choose; add one")

    @property
    def size(self) -> float:
        """How many combinations there are; infinite where one of the fields is continuous."""
        counts = [
            len(d.values) if isinstance(d, Choice) else math.inf for d in self.dimensions.values()
        ]
        return float(math.prod(counts))

    def draw(self, random: np.random.Generator) -> Values:
        """A combination, each field by itself."""
        return {name: d.draw(random) for name, d in self.dimensions.items()}

    def all(self) -> Iterator[Values]:
        """Every combination, the last field changing fastest.

        Raises:
            ValueError: a field is continuous.
        """
        listed = {}
        for name, d in self.dimensions.items():
            require(
                isinstance(d, Choice),
                f"{name} is continuous and has no grid; use --search random or optuna",
            )
            listed[name] = d.values if isinstance(d, Choice) else ()
        for values in itertools.product(*listed.values()):
            yield dict(zip(listed, values, strict=True))


@dataclass(frozen=True)
class Listed:
    """Runs that are listed one by one, under the names of what they show.

    Raises:
        ValueError: no run.
    """

    runs: Mapping[str, Values]

    def __post_init__(self) -> None:
        require(bool(self.runs), "a space (={}) must list a run; add one")

    @property
    def size(self) -> float:
        """How many runs there are."""
        return float(len(self.runs))

    def all(self) -> Iterator[Values]:
        """Every run, in order."""
        yield from self.runs.values()


Space = Product | Listed


def with_values(run: RunConfig, values: Values) -> RunConfig:
    """The run with these values in its fields.

    Raises:
        ValueError: a field that no run has, by name, or values that do not go together.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, dot, field = name.partition(".")
        known = getattr(run, part, None) if dot else None
        require(
            is_dataclass(known) and field in {f.name for f in fields(known)},
            f"unknown field {name!r} in a space; write it as model.d_model or train.lr",
        )
        parts.setdefault(part, {})[field] = value
    # All fields of a part at once: one by one they may not go together on the way.
    return replace(run, **{part: replace(getattr(run, part), **given)
                           for part, given in parts.items()})  # fmt: skip


def values_of(run: RunConfig, names: Sequence[str]) -> Values:
    """What a run has in some fields."""
    return {name: getattr(getattr(run, name.split(".")[0]), name.split(".")[1]) for name in names}


def check_space(space: Space, run: RunConfig) -> None:
    """Refuse a space of which a corner is no run.

    Every listed run is made; of a product each value beside the run's own others, and a hundred
    combinations.

    Raises:
        ValueError: naming the field and the rule.
    """
    for values in _samples(space):
        try:
            with_values(run, values)
        except ValueError as error:
            raise ValueError(f"the space can draw {values}, which is no run: {error}") from error


def _samples(space: Space) -> Iterator[Values]:
    if isinstance(space, Listed) or space.size <= 1000:
        yield from space.all()
        return
    random = np.random.default_rng(0)
    yield from (space.draw(random) for _ in range(100))
