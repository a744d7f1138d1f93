"""Sums that merge: one worker or eight give the same numbers.

Each class is a frozen value that starts at zero; `add` returns the sum with a batch counted in,
`+` merges two, `report` reads the numbers, `flat` and `unflat` take the sums through a collective.
Sums are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

S = TypeVar("S", bound="Sums")  # not Self: what checks shapes in tests decorates methods alone


class Sums:
    """Fields that add up, one by one: numbers, or sums themselves."""

    def __add__(self: S, other: S) -> S:
        mine: Any = self  # `fields` wants a dataclass, which subclasses are
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(mine)))

    def flat(self) -> list[float]:
        """Every number, in a fixed order: what a collective adds up over the workers."""
        mine: Any = self
        values = (getattr(self, f.name) for f in fields(mine))
        # By depth, in the order of the fields; `unflat` walks the same way.
        return [x for v in values for x in (v.flat() if isinstance(v, Sums) else [float(v)])]

    def unflat(self: S, numbers: Iterator[float]) -> S:
        """Sums of this kind, of the next numbers that `flat` gave."""
        mine: Any = self
        values = (getattr(self, f.name) for f in fields(mine))
        # Counts travel as floats, exact up to 2^53, and become int again.
        return type(self)(
            *(v.unflat(numbers) if isinstance(v, Sums) else type(v)(next(numbers)) for v in values)
        )


@dataclass(frozen=True)
class Moments(Sums):
    """Mean, variance and standard error of numbers, such as one per image."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Float[Tensor, " b"]) -> "Moments":
        """With these numbers counted in."""
        # A variance is the difference of two large sums: float32 would leave little of it.
        wide = values.double()
        return self + Moments(len(values), wide.sum().item(), wide.square().sum().item())

    @property
    def mean(self) -> float:
        """nan of nothing."""
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Of the sample; nan below two values."""
        if self.count < 2:
            return math.nan
        # Rounding may leave a variance of equal values just below zero.
        return max(self.squares - self.total**2 / self.count, 0.0) / (self.count - 1)

    @property
    def standard_error(self) -> float:
        """Of the mean; nan below two values."""
        return math.sqrt(self.variance / self.count) if self.count else math.nan
