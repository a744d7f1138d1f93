"""Where the time of a sweep went."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mambaflow.search.board import Board, Trial


@dataclass(frozen=True)
class TimeSpent:
    """Where the time of a sweep went, in seconds of one place for a trial."""

    wall: float
    """Seconds during which there was a driver."""
    places: float
    """The same times the trials that could run at once."""
    training: float
    """Training and validation."""
    beginning: float
    """From the start of a trial to its first report, less training and validation."""
    besides: float
    """What trials did later besides training and validation: saving, telling."""

    @property
    def rest(self) -> float:
        """Places without a trial, and what trials had not told of."""
        return max(self.places - self.training - self.beginning - self.besides, 0.0)

    def share(self, seconds: float) -> float:
        """Of all places; nan where there was no time yet."""
        return seconds / self.places if self.places > 0 else math.nan

    @classmethod
    def of(cls, board: Board) -> "TimeSpent":
        """That of a sweep so far."""
        trials = board.trials.values()
        return cls(
            board.seconds,
            board.places,
            training=sum((trial.seconds for trial in trials), 0.0),
            beginning=sum((sum(trial.beginnings) for trial in trials), 0.0),
            besides=sum((sum(_later(trial)) for trial in trials), 0.0),
        )


def _later(trial: Trial) -> Iterator[float]:
    """Of each start, what it did besides training and validation after its first report."""
    last = {report.start: report.besides for report in trial.clocked}
    for first, end in zip(trial.beginnings, last.values(), strict=True):
        yield max(end - first, 0.0)
