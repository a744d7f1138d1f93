"""What each field of a search does to a score, and how much a score varies from seed to seed.

The model is additive: score = mean + one number for each field's value + noise, by least squares.
It knows nothing of fields that help one another. Where configurations were drawn by a search that
goes where scores are good, or bad ones were stopped, the values are not balanced, and least squares
accounts for that as far as the model is right.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from mambaflow.checks import require

BINS = 3
# A contrast that the least squares cannot see has a part outside the rows of the design of about
# 1, one that they see of about 1e-15.
UNSEEN = 1e-8


@dataclass(frozen=True)
class Effect:
    """What one value of a field does."""

    value: Any
    label: str
    count: int
    """Trials that had it."""
    mean: float
    """Against the mean of the field's values, in the unit of the score; nan: not identifiable."""
    error: float
    """Standard error of `mean`; nan where no degree of freedom is left to tell the noise by."""


@dataclass(frozen=True)
class Field:
    """What the values of a field do."""

    name: str
    effects: Sequence[Effect]
    range_error: float
    """Standard error of `range`; nan where it is not known."""

    @property
    def identifiable(self) -> bool:
        """Whether the trials tell its values apart from those of other fields."""
        return all(math.isfinite(effect.mean) for effect in self.effects)

    @property
    def range(self) -> float:
        """The best value's effect less the worst's; nan where it is not identifiable.

        Noise adds to it: of a field that does nothing it is above 0 too.
        """
        means = [effect.mean for effect in self.effects]
        return max(means) - min(means) if self.identifiable else math.nan


@dataclass(frozen=True)
class Effects:
    """What all fields do."""

    fields: Sequence[Field]
    trials: int
    freedom: int
    """Degrees of freedom that are left for the noise."""
    residual: float
    """Standard deviation of what the model leaves over; nan without a degree of freedom."""


def additive(rows: Sequence[tuple[Mapping[str, Any], float]]) -> Effects:
    """Fit the additive model.

    A field of numbers nearly all of which are different, as one that is drawn from an interval has,
    is cut into three bins of equal counts: like any field it then needs no shape to be assumed,
    such as a parabola, at the price that differences inside a bin count as noise.

    Args:
        rows: the values and the score of each trial; all have the same fields.

    Raises:
        ValueError: rows of different fields, or a score that is not finite.
    """
    names = list(rows[0][0]) if rows else []
    for values, score in rows:
        require(
            list(values) == names and math.isfinite(score),
            f"trial {dict(values)} (={score}) must have a finite score and the fields {names}",
        )
    columns = {name: _levels([values[name] for values, _ in rows]) for name in names}
    columns = {name: found for name, found in columns.items() if len(found[0]) > 1}
    if not columns:
        return Effects([], len(rows), 0, math.nan)
    fit = _Fit.of(columns, np.array([score for _, score in rows], float))
    fields, first = [], 1
    for name, (levels, place) in columns.items():
        fields.append(_field(fit, name, levels, place, first))
        first += len(levels)
    return Effects(fields, len(rows), fit.freedom, fit.residual)


Level = tuple[Any, str]


def _levels(values: Sequence[Any]) -> tuple[list[Level], Int[ndarray, " n"]]:
    """A field's levels, each a value with its label, and which of them each trial has."""
    if _is_continuous(values):
        return _bins(np.array(values, float))
    found = sorted({repr(v): v for v in values}.values(), key=_order)
    places = {repr(value): place for place, value in enumerate(found)}
    return [(v, label(v)) for v in found], np.array([places[repr(v)] for v in values])


def _is_continuous(values: Sequence[Any]) -> bool:
    distinct = len({repr(value) for value in values})
    return all(type(v) is float for v in values) and distinct > max(BINS, 2 / 3 * len(values))


def _bins(values: Float[ndarray, " n"]) -> tuple[list[Level], Int[ndarray, " n"]]:
    # By rank: of equal counts whatever the law; equal values have one rank, and so one bin.
    ranks = np.searchsorted(np.sort(values), values)
    raw = ranks * BINS // len(values)
    kept, places = np.unique(raw, return_inverse=True)
    parts = [values[raw == one] for one in kept]
    levels = [
        (float(np.median(part)), f"{label(float(part.min()))} to {label(float(part.max()))}")
        for part in parts
    ]
    return levels, places


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then the rest by name."""
    is_number = isinstance(value, int | float)
    return (0, float(value), "") if is_number else (1, 0.0, str(value))


def label(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Fit:
    """Least squares on a mean and all levels of all fields, of which many solutions are equal: what
    is asked of it are contrasts, which may be the same in all of them."""

    solution: Float[ndarray, " p"]
    inverse: Float[ndarray, "p p"]
    """The pseudo-inverse of X'X."""
    seen: Float[ndarray, "p p"]
    """The projection on the rows of X: contrasts that it moves are not identifiable."""
    freedom: int
    residual: float

    @classmethod
    def of(
        cls,
        columns: Mapping[str, tuple[Sequence[Level], Int[ndarray, " n"]]],
        scores: Float[ndarray, " n"],
    ) -> "_Fit":
        parts = [np.eye(len(levels))[place] for levels, place in columns.values()]
        design = np.column_stack([np.ones(len(scores)), *parts])
        inverse = np.linalg.pinv(design.T @ design, hermitian=True)
        solution = np.linalg.pinv(design) @ scores
        freedom = len(scores) - int(np.linalg.matrix_rank(design))
        left = float(((scores - design @ solution) ** 2).sum())
        residual = math.sqrt(left / freedom) if freedom else math.nan
        return cls(solution, inverse, np.linalg.pinv(design) @ design, freedom, residual)

    def contrast(self, weights: Float[ndarray, " p"]) -> tuple[float, float]:
        """A difference of levels and its standard error; nan where it is not known."""
        if np.abs(weights @ self.seen - weights).max() > UNSEEN:
            return math.nan, math.nan
        variance = max(float(weights @ self.inverse @ weights), 0.0)
        return float(weights @ self.solution), self.residual * math.sqrt(variance)


def _field(
    fit: _Fit, name: str, levels: Sequence[Level], place: Int[ndarray, " n"], first: int
) -> Field:
    own = slice(first, first + len(levels))
    effects, unit = [], np.eye(len(fit.solution))
    for number, (value, text) in enumerate(levels):
        weights = unit[first + number].copy()
        weights[own] -= 1 / len(levels)
        count = int((place == number).sum())
        effects.append(Effect(value, text, count, *fit.contrast(weights)))
    means = [effect.mean for effect in effects]
    if not all(map(math.isfinite, means)):
        return Field(name, effects, math.nan)
    ends = unit[first + int(np.argmax(means))] - unit[first + int(np.argmin(means))]
    return Field(name, effects, fit.contrast(ends)[1])


@dataclass(frozen=True)
class Noise:
    """How much the score of one configuration varies from seed to seed."""

    mean: float
    deviation: float
    """Standard deviation between runs."""
    runs: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Noise | None":
        """That of some runs of one configuration; None of fewer than two."""
        found = [score for score in scores if math.isfinite(score)]
        if len(found) < 2:
            return None
        return cls(float(np.mean(found)), float(np.std(found, ddof=1)), len(found))

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the deviation."""
        return self.runs - 1

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the deviation, if runs are normally distributed."""
        low, high = stats.chi2.ppf([0.975, 0.025], self.freedom)
        scale = self.deviation * math.sqrt(self.freedom)
        return scale / math.sqrt(low), scale / math.sqrt(high)

    def luck(self, count: int) -> float:
        """By how much the best of `count` configurations that are no better than the base is above
        it on average: by Blom's approximation (1958) of the largest of normal numbers."""
        return self.deviation * float(stats.norm.ppf((count - 0.375) / (count + 0.25)))

    def bound(self, count: int) -> float:
        """By how much it is above the mean of the base's runs in one search of twenty, at most.

        Of the t distribution, as the deviation is of a few runs, and by Bonferroni's bound, which
        holds however the configurations hang together.
        """
        spread = self.deviation * math.sqrt(1 + 1 / self.runs)
        return spread * float(stats.t.ppf(1 - 0.05 / count, self.freedom))
