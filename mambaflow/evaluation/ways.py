"""The ways of answering that a report has: how they are called, found, and drawn."""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

from mambaflow.evaluation.cells import NO_CHECKPOINT, Cell
from mambaflow.evaluation.summary import Summary, Way
from mambaflow.flow.samplers import SOLVERS
from mambaflow.report.palette import HUES, MARKERS, Look, looks

# Which sampler stands for a model's others, where several are of as many calls.
FIRST = ("heun", "exponential", "midpoint", "ddim", "sde")
CALLS = 10


class Ways:
    """The ways of a summary.

    Args:
        size: pixels on a side of the data.
        known: known pixels of an image, as the data were staged.
    """

    def __init__(self, summary: Summary, size: int, known: int) -> None:
        self.summary, self.size, self.known = summary, size, known

    @cached_property
    def checkpoints(self) -> list[str]:
        """Names of the models, as their rows are sorted: by the alphabet."""
        names = [way.cell.checkpoint for way in self.summary.entries]
        return [name for name in dict.fromkeys(names) if name != NO_CHECKPOINT]

    @cached_property
    def plain(self) -> list[Way]:
        """The ways of the size and share that the data have: fills, then each model's."""
        found = self.summary.find(resolution=self.size, known=self.known, asked=0)
        return sorted(found, key=lambda way: (not way.cell.is_fill, way.cell.checkpoint,
                                              way.cell.is_sample, self.series(way),
                                              way.cell.nfe, way.together))  # fmt: skip

    @cached_property
    def main(self) -> list[Way]:
        """Of the plain ways those that a reader wants first: each sampler with about ten calls,
        and what several samples come to by the one that stands for a model's others."""
        nearest: dict[str, Way] = {}
        for way in (way for way in self.plain if way.cell.is_sample and not way.together):
            best = nearest.setdefault(self.sampler(way.cell), way)
            if _off(way) < _off(best):
                nearest[self.sampler(way.cell)] = way
        single = {*nearest.values(), *(way for way in self.plain if not way.cell.is_sample)}
        stand = {way.cell for way in map(self.sample, self.checkpoints) if way is not None}
        return [w for w in self.plain if w in single or (w.together and w.cell in stand)]

    @property
    def fills(self) -> list[Way]:
        """The classical fills, of the share that the data have."""
        return [way for way in self.plain if way.cell.is_fill]

    @property
    def best_fill(self) -> Way | None:
        """The one of the highest PSNR."""
        return max(self.fills, default=None, key=lambda way: self.number(way, "psnr"))

    def mean(self, name: str, **at: int) -> Way | None:
        """A model's posterior mean, at the data's size and share or another."""
        ways = self._at(name, at)
        return next((way for way in ways if not way.cell.is_sample), None)

    def sample(self, name: str, **at: int) -> Way | None:
        """The sampler of a model that stands for the others: of about ten calls, Heun's first."""
        ways = [way for way in self._at(name, at) if way.cell.is_sample]
        return min(ways, default=None, key=lambda way: (_off(way), _place(way.cell.sampler)))

    def _at(self, name: str, at: dict[str, int]) -> list[Way]:
        point = {"resolution": self.size, "known": self.known, "asked": 0} | at
        return self.summary.find(checkpoint=name, together=0, **point)

    def number(self, way: Way, key: str) -> float:
        """A number of a way; less than any where it has none."""
        found = self.summary.entries[way].numbers.get(key, math.nan)
        return found if math.isfinite(found) else -math.inf

    def sampler(self, cell: Cell) -> str:
        """A model's sampler, whatever its calls."""
        # Such as "eta=0,grid=quadratic"; a table may break a line at a blank.
        told = cell.settings.replace("=", " ").replace(",", ", ")
        settings = f" ({told})" if told else ""
        return f"{cell.checkpoint} {SOLVERS[cell.sampler].title}{settings}"

    def label(self, way: Way) -> str:
        """What tables call a way: another name for each."""
        return ", ".join([self._answer(way), *self._elsewhere(way.cell)])

    def _answer(self, way: Way) -> str:
        cell = way.cell
        if cell.is_fill:
            return cell.sampler
        if not cell.is_sample:
            return f"{cell.checkpoint} posterior mean"
        calls = f"{self.sampler(cell)}, {cell.nfe} calls"
        return f"{calls}, mean of {way.together}" if way.together else calls

    def _elsewhere(self, cell: Cell) -> Iterator[str]:
        """In what a cell differs from what the data have."""
        if cell.resolution != self.size:
            yield f"{cell.resolution} x {cell.resolution}"
        if cell.known != self.known:
            yield f"{cell.known} known"
        if cell.asked:
            yield f"{cell.asked} asked"

    def series(self, way: Way) -> str:
        """The line that a way is a point of: a model, its sampler, or a fill."""
        if way.cell.is_fill:
            return way.cell.sampler
        return self.sampler(way.cell) if way.cell.is_sample else self._answer(way)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """A look for each series, through a whole page: for as many models, and samplers of each,
        as there are looks. The others stand in tables alone."""
        fills = dict.fromkeys(self.series(w) for w in self.summary.entries if w.cell.is_fill)
        models = dict.fromkeys(list(fills)[: len(MARKERS)], "")
        for name in self.checkpoints[: len(HUES)]:
            # A model's mean has the first look, which is the model's own.
            series = [f"{name} posterior mean", *self._samplers(name)]
            models |= dict.fromkeys(series[: len(MARKERS)], name)
        return looks(models)

    def _samplers(self, name: str) -> Iterable[str]:
        """The one that stands for the others first: it must have a look."""
        stands = self.sample(name)
        first = [] if stands is None else [self.sampler(stands.cell)]
        cells = [way.cell for way in self.summary.entries if way.cell.checkpoint == name]
        return dict.fromkeys(first + [self.sampler(cell) for cell in cells if cell.is_sample])

    @property
    def not_drawn(self) -> list[str]:
        """Series that charts leave out for want of looks."""
        every = dict.fromkeys(self.series(way) for way in self.summary.entries)
        return [series for series in every if series not in self.looks]

    def look(self, way: Way) -> Look | None:
        """Of the series that a way belongs to, if it has one."""
        return self.looks.get(self.series(way))


def _off(way: Way) -> float:
    return abs(math.log(way.cell.nfe / CALLS))


def _place(sampler: str) -> int:
    return FIRST.index(sampler) if sampler in FIRST else len(FIRST)
