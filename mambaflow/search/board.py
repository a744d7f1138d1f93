"""Where every trial of a sweep stands: what its ledger comes to."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mambaflow.search.ledger import Event
from mambaflow.search.space import Values

METRIC, ERROR = "val/psnr", "val/psnr_se"
# Ends after which a trial is not taken up again.
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Report:
    """What a trial said at one of its checkpoints."""

    step: int
    samples: int
    share: float
    """Of the trial's budget that is spent, in (0, 1]."""
    seconds: float
    """That this start of the trial had trained and validated for."""
    start: int
    """Of which of the trial's starts, from 1."""
    scores: dict[str, float]
    decision: str
    """"continue" or "stop"."""
    besides: float = 0.0
    """Seconds since this start that went into neither: beginning, saving, telling."""

    @property
    def psnr(self) -> float:
        """dB, of the posterior mean on the validation images."""
        return self.scores.get(METRIC, math.nan)

    @property
    def error(self) -> float:
        """Standard error of `psnr` over the images."""
        return self.scores.get(ERROR, math.nan)


@dataclass
class Trial:
    """One configuration, and how it went."""

    name: str
    values: Values
    kind: str
    """"search"; or "seed", the base configuration with another seed, which is never stopped."""
    parameters: int
    steps: int
    """In all, if it is not stopped; 0 until it is known."""
    flops: float
    """Of the training, forward and backward, if it is not stopped."""
    label: str = ""
    """What a listed run is called; "" in a product."""
    status: str = "waiting"
    """waiting, running, interrupted, or an end: finished, stopped (early), failed."""
    cause: str = ""
    starts: int = 0
    reports: list[Report] = field(default_factory=list)
    began: float = 0.0
    """When it was last started."""

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self.reports[-1] if self.reports else None

    @property
    def seconds(self) -> float:
        """That it has trained and validated for, over all of its starts, as far as it said."""
        # A start that was lost between two reports has told of its last one alone.
        longest: dict[int, float] = {}
        for report in self.reports:
            longest[report.start] = max(longest.get(report.start, 0.0), report.seconds)
        return sum(longest.values(), 0.0)

    @property
    def share(self) -> float:
        """Of the budget that is spent."""
        return self.last.share if self.last else 0.0

    @property
    def beginnings(self) -> list[float]:
        """Seconds besides training and validation before each start's first report."""
        first: dict[int, float] = {}
        for report in self.clocked:
            first.setdefault(report.start, report.besides)
        return list(first.values())

    @property
    def clocked(self) -> list[Report]:
        """Reports that say how long they took: one that a start before had not told has no time."""
        return [report for report in self.reports if report.seconds > 0]


@dataclass
class Board:
    """The trials of a sweep by name, in the order in which they were proposed."""

    trials: dict[str, Trial] = field(default_factory=dict)
    wanted: int = 0
    """Trials that were asked for."""
    starts: int = 0
    """Drivers that there have been."""
    seconds: float = 0.0
    """Between the first and the last event of each driver, added up."""
    ended: str = "running"
    """How the last driver ended; "running" while it has not said."""
    cause: str = ""
    commands: list[str] = field(default_factory=list)
    days: list[str] = field(default_factory=list)
    concurrent: int = 1
    served: set[str] = field(default_factory=set)
    """Requests that were answered."""
    places: float = 0.0
    """`seconds` times the trials that could run at once, driver by driver."""
    _since: float = 0.0

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Board":
        """What some events come to."""
        board = cls()
        for event in events:
            board.add(event)
        return board

    def add(self, event: Event) -> None:
        """Go on by one event.

        Raises:
            ValueError: an event of another kind.
        """
        what = event["event"]
        handle = getattr(self, f"_{what}", None)
        if handle is None:
            raise ValueError(f"unknown event {what!r}; use the version of mambaflow that wrote it")
        handle(event)
        if self._since:
            self.seconds += event["time"] - self._since
            self.places += self.concurrent * (event["time"] - self._since)
        self._since = event["time"]

    def _begin(self, event: Event) -> None:
        # What ran under a driver that was killed is not running any more.
        for trial in self.trials.values():
            if trial.status == "running":
                _finish(trial, "interrupted", "its driver was lost")
        self.starts, self.ended, self.cause, self._since = self.starts + 1, "running", "", 0.0
        self.wanted, self.concurrent = event["wanted"], event["concurrent"]
        self.commands.append(event["command"])
        self.days.append(event["day"])

    def _trial(self, event: Event) -> None:
        named = ("values", "kind", "parameters", "steps", "flops")
        told = {name: event[name] for name in named}
        self.trials[event["trial"]] = Trial(event["trial"], **told, label=event.get("label", ""))

    def _start(self, event: Event) -> None:
        trial = self.trials[event["trial"]]
        trial.status, trial.cause, trial.began = "running", "", event["time"]
        trial.starts += 1

    def _steps(self, event: Event) -> None:
        trial = self.trials[event["trial"]]
        trial.steps, trial.flops = event["steps"], event["flops"]

    def _report(self, event: Event) -> None:
        trial = self.trials[event["trial"]]
        told = {name: event[name] for name in ("step", "samples", "share", "seconds", "scores")}
        # Two clocks, of the driver and of the trial, may differ by a little.
        besides = max(event["time"] - trial.began - event["seconds"], 0.0)
        report = Report(**told, start=trial.starts, decision=event["decision"], besides=besides)
        trial.reports.append(report)

    def _end(self, event: Event) -> None:
        _finish(self.trials[event["trial"]], event["status"], event["cause"])

    def _more(self, event: Event) -> None:
        self.wanted += event["count"]
        self.served.add(event["request"])

    def _asked(self, event: Event) -> None:
        self.served.add(event["request"])

    def _done(self, event: Event) -> None:
        self.ended, self.cause = event["status"], event["cause"]

    @property
    def when(self) -> time.struct_time:
        """The last event's time of day."""
        return time.localtime(self._since)

    def with_status(self, *statuses: str) -> list[Trial]:
        """Trials of some statuses."""
        return [trial for trial in self.trials.values() if trial.status in statuses]

    @property
    def ranked(self) -> list[Trial]:
        """Trials with a number, the best first: those that went on longest, by PSNR.

        A trial that was stopped early stands below all that spent more of their budget: numbers
        at different shares of it do not compare.
        """
        told = [trial for trial in self.trials.values() if _rank(trial) is not None]
        return sorted(told, key=lambda trial: _rank(trial) or (), reverse=True)

    @property
    def best(self) -> Trial | None:
        """The best of those that were proposed and spent their whole budget."""
        whole = [t for t in self.ranked if t.status == "finished" and t.kind == "search"]
        return whole[0] if whole else None

    def counts(self) -> dict[str, int]:
        """How many trials there are of each status."""
        found: dict[str, int] = {}
        for trial in self.trials.values():
            found[trial.status] = found.get(trial.status, 0) + 1
        return found

    def __str__(self) -> str:
        seeds = sum(trial.kind == "seed" for trial in self.trials.values())
        more = f" and {seeds} of seeds" if seeds else ""
        told = ", ".join(f"{count} {status}" for status, count in sorted(self.counts().items()))
        tried = len(self.trials) - seeds
        return f"{tried} of {self.wanted} configurations{more}: {told or 'none yet'}"


def _finish(trial: Trial, status: str, cause: str) -> None:
    trial.status, trial.cause = status, cause


def _rank(trial: Trial) -> tuple[Any, ...] | None:
    if trial.last is None or not math.isfinite(trial.last.psnr) or trial.status == "failed":
        return None
    # A whole budget of FLOPs or seconds is met to a step, one trial's a little short of another's.
    share = 1.0 if trial.status == "finished" else round(trial.share, 2)
    return (share, trial.last.psnr)
