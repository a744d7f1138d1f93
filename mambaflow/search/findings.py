"""What a sweep comes to: the numbers that its report is made of."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from mambaflow.search.board import Board, Trial
from mambaflow.search.config import SweepConfig
from mambaflow.search.cost import Timing
from mambaflow.search.effects import Effects, Noise, additive, label
from mambaflow.search.space import values_of
from mambaflow.search.time_spent import TimeSpent
from mambaflow.search.trial_figures import flops, psnr, rate, told

Point = tuple[float, float, str]
"""A number, the PSNR that was had for it, and the trial."""


@dataclass(frozen=True)
class Stage:
    """A run of a list beside the one before it."""

    trial: str
    label: str
    change: str
    psnr: float
    difference: float
    """dB against the stage before; nan where one of the two has no number."""


@dataclass(frozen=True)
class Rung:
    """A share of the budget after which trials were stopped, and what that may have cost."""

    number: int
    share: float
    reached: int
    stopped: int
    best_stopped: float
    """PSNR there of the best trial that was stopped there."""
    need: float
    """What that one would have had to gain to be the best."""
    most: float
    """What a trial that went to the end gained from there on, at most."""
    possible: int
    """Stopped ones that such a gain would have made the best."""
    agreement: float
    """Spearman's rank correlation of the PSNR there and at the end, of trials that went to the
    end; nan of fewer than three."""


@dataclass(frozen=True)
class Findings:
    """A sweep, asked for its numbers.

    Args:
        timing: what answers take; None where that was not measured.
    """

    config: SweepConfig
    board: Board
    timing: Timing | None = None

    # --- Trials and their fields ---

    @property
    def searched(self) -> list[Trial]:
        """The trials that were proposed, in that order."""
        return [trial for trial in self.board.trials.values() if trial.kind == "search"]

    @cached_property
    def fields(self) -> list[str]:
        """Those in which the proposed trials differ."""
        named = list(dict.fromkeys(name for trial in self.searched for name in trial.values))
        return [n for n in named if len({repr(self.value(t, n)) for t in self.searched}) > 1]

    def value(self, trial: Trial, name: str) -> Any:
        """What a trial has in a field: its own, or that of the base configuration."""
        base = values_of(self.config.run, [name])[name]
        found: Any = trial.values.get(name, base)
        # JSON and a person write 0 for 0.0.
        whole = isinstance(base, float) and type(found) is int
        return float(found) if whole else found

    def short(self, name: str) -> str:
        """A field without the part that it is in, if that is clear."""
        last = name.partition(".")[2]
        alike = [other for other in self.fields if other.partition(".")[2] == last]
        return last if len(alike) < 2 else name

    def called(self, trial: Trial) -> str:
        """A trial's name, with what a listed run is called."""
        return f"{trial.name} {trial.label}".rstrip()

    def status(self, trial: Trial) -> str:
        """How a trial stands, in a few words."""
        if trial.status != "stopped":
            return trial.status if trial.kind == "search" else f"{trial.status} (base)"
        rung = self.rung(trial)
        more = f", rung {rung}" if rung else f": {trial.cause}" if trial.cause else ""
        return f"stopped{more}"

    # --- What is best, and the noise ---

    @property
    def finished(self) -> list[Trial]:
        """Proposed trials that spent their whole budget and have a number, the best first."""
        whole = [t for t in self.board.ranked if t.status == "finished"]
        return [trial for trial in whole if trial.kind == "search"]

    @property
    def to_the_end(self) -> list[Trial]:
        """The same with the base's runs of other seeds."""
        return [trial for trial in self.board.ranked if trial.status == "finished"]

    @property
    def base_runs(self) -> list[Trial]:
        """Finished runs of the base configuration: each has a seed of its own."""
        own = [trial for trial in self.finished if self.is_base(trial)]
        # A configuration that is proposed twice has the same seed twice.
        seeds = [trial for trial in self.to_the_end if trial.kind == "seed"]
        return own[:1] + seeds

    def is_base(self, trial: Trial) -> bool:
        """Whether a trial has the base's own value in every field."""
        base = values_of(self.config.run, list(trial.values))
        return all(self.value(trial, name) == value for name, value in base.items())

    @cached_property
    def noise(self) -> Noise | None:
        """Of the base's runs, from seed to seed; None of fewer than two."""
        return Noise.of([psnr(trial) for trial in self.base_runs])

    @property
    def base(self) -> float:
        """Mean PSNR of the base's runs; nan where there is none."""
        found = [psnr(trial) for trial in self.base_runs]
        return float(np.mean(found)) if found else math.nan

    @property
    def gain(self) -> float:
        """dB of the best trial over the base's mean; 0 of the base itself, however lucky that run
        was; nan where one of them is not there."""
        best = self.board.best
        if best is None:
            return math.nan
        return 0.0 if self.is_base(best) else psnr(best) - self.base

    @property
    def rivals(self) -> int:
        """Proposed trials that might have been the best by luck: all with a number, but for the
        base; those that were stopped early too, which with luck had gone on."""
        told = [trial for trial in self.searched if math.isfinite(psnr(trial))]
        return max(sum(not self.is_base(trial) for trial in told), 1)

    @property
    def luck(self) -> float:
        """dB that the best of as many equals of the base would gain on average."""
        return self.noise.luck(self.rivals) if self.noise else math.nan

    @property
    def bound(self) -> float:
        """dB that it would gain in one sweep of twenty, at most."""
        return self.noise.bound(self.rivals) if self.noise else math.nan

    # --- What fields do ---

    @cached_property
    def effects(self) -> Effects:
        """By the additive model, of proposed trials where `compared_at` of the budget was spent."""
        return self._effects_at(self.compared_at)

    @cached_property
    def compared_at(self) -> float:
        """The share of the budget at which fields are compared: all of it, where the trials that
        spent it tell the values of every field apart and leave something to tell the noise by; else
        the first rung, which all came to, those too that were stopped there."""
        whole = self._effects_at(1.0)
        if whole.freedom and len(whole.fields) == len(self.fields):
            if all(field.identifiable for field in whole.fields):
                return 1.0
        first = min(self.rung_shares, default=1.0)
        return first if self._effects_at(first).trials > whole.trials else 1.0

    def _effects_at(self, share: float) -> Effects:
        rows = [
            ({name: self.value(trial, name) for name in self.fields}, self._at(trial, share))
            for trial in self._that_spent(share, self.searched)
        ]
        return additive(rows)

    @property
    def compared_noise(self) -> Noise | None:
        """From seed to seed where fields are compared."""
        share = self.compared_at
        own = [trial for trial in self.searched if self.is_base(trial)][:1]
        seeds = [trial for trial in self.board.trials.values() if trial.kind == "seed"]
        return Noise.of([self._at(t, share) for t in self._that_spent(share, [*own, *seeds])])

    def _that_spent(self, share: float, trials: Sequence[Trial]) -> list[Trial]:
        """Those with a number there; of all of it, only those that came to their end."""
        if share == 1.0:
            return [t for t in trials if t.status == "finished" and math.isfinite(psnr(t))]
        known = [(trial, told(trial)) for trial in trials]
        return [t for t, reports in known if reports and reports[-1].share >= share - self._slack]

    @property
    def is_listed(self) -> bool:
        """Whether the runs were listed under names, instead of being combinations."""
        return any(trial.label for trial in self.searched)

    @property
    def stages(self) -> list[Stage]:
        """The listed runs in their order."""
        found: list[Stage] = []
        before: Trial | None = None
        for trial in self.searched:
            own = psnr(trial) if trial.status == "finished" else math.nan
            last = found[-1].psnr if found else math.nan
            change = self._change(before, trial)
            found.append(Stage(trial.name, trial.label, change, own, own - last))
            before = trial
        return found

    def _change(self, before: Trial | None, trial: Trial) -> str:
        if before is None:
            return "the first"
        pairs = [(n, self.value(before, n), self.value(trial, n)) for n in self.fields]
        told = [f"{self.short(n)} {label(a)} → {label(b)}" for n, a, b in pairs if a != b]
        return ", ".join(told) or "nothing"

    # --- What size costs ---

    def points(self, of: dict[str, float]) -> list[Point]:
        """Finished trials by a cost of each, those without one left out."""
        known = [t for t in self.to_the_end if of.get(t.name, 0) > 0]
        return [(of[trial.name], psnr(trial), trial.name) for trial in known]

    @property
    def parameters(self) -> dict[str, float]:
        """Millions of parameters, by trial."""
        return {t.name: t.parameters / 1e6 for t in self.board.trials.values()}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per image, by trial."""
        return dict(self.timing.seconds) if self.timing else {}

    # --- What was stopped early ---

    @property
    def rung_shares(self) -> list[float]:
        """The shares of the budget after which trials may be stopped."""
        search = self.config.search
        if search.scheduler == "none":
            return []
        found, reports = [], search.grace
        while reports < search.validations:
            found.append(reports / search.validations)
            reports *= search.reduction_factor
        return found

    @property
    def _slack(self) -> float:
        # Shares are met to a step: nearer than half the way between two validations is the same.
        return 0.5 / self.config.search.validations

    def rung(self, trial: Trial) -> int:
        """The rung at which a trial was stopped, from 1; 0 where it was not by its score."""
        if trial.status != "stopped" or trial.last is None or trial.last.decision != "stop":
            return 0
        near = [abs(share - trial.share) for share in self.rung_shares]
        return near.index(min(near)) + 1 if near and min(near) <= self._slack else 0

    @property
    def rungs(self) -> list[Rung]:
        """Those at which a trial was stopped."""
        found = [self._rung(n, share) for n, share in enumerate(self.rung_shares, 1)]
        return [rung for rung in found if rung.stopped]

    def _rung(self, number: int, share: float) -> Rung:
        trials = self.board.trials.values()
        reached = sum(trial.share >= share - self._slack for trial in trials)
        stopped = [psnr(trial) for trial in trials if self.rung(trial) == number]
        pairs = [(self._at(trial, share), psnr(trial)) for trial in self.to_the_end]
        most = max((end - there for there, end in pairs), default=math.nan)
        top = psnr(self.board.best) if self.board.best else math.nan
        best = max((score for score in stopped if math.isfinite(score)), default=math.nan)
        possible = sum(score + most > top for score in stopped)
        return Rung(number, share, reached, len(stopped), best, top - best, most, possible,
                    _agreement(pairs))  # fmt: skip

    def _at(self, trial: Trial, share: float) -> float:
        """PSNR at a share of the budget, between two reports on the line that joins them."""
        known = told(trial)
        return float(np.interp(share, [r.share for r in known], [r.psnr for r in known]))

    # --- Where the time went ---

    @cached_property
    def time(self) -> TimeSpent:
        """The sweep's time."""
        return TimeSpent.of(self.board)

    # --- For programs ---

    def json(self) -> dict[str, Any]:
        """Every number, with None for what is not known."""
        time = self.time
        found = {
            "space": self.config.search.space,
            "wanted": self.board.wanted,
            "counts": self.board.counts(),
            "ended": self.board.ended,
            "best": self.board.best.name if self.board.best else None,
            "base": {
                "psnr": self.base,
                "trials": [trial.name for trial in self.base_runs],
                "noise": self.noise and asdict(self.noise),
            },
            "gain": self.gain,
            "rivals": self.rivals,
            "luck": self.luck,
            "bound": self.bound,
            "trials": [self._trial_json(trial) for trial in self._listed()],
            "compared_at": None if self.is_listed else self.compared_at,
            "effects": None if self.is_listed else _effects_json(self.effects),
            "stages": [asdict(stage) for stage in self.stages] if self.is_listed else None,
            "rungs": [asdict(rung) for rung in self.rungs],
            "time": {**asdict(time), "rest": time.rest},
            "timing": self.timing and asdict(self.timing),
        }
        return plain(found)

    def _listed(self) -> list[Trial]:
        """Every trial: first those that have a rank, in its order."""
        ranked = self.board.ranked
        places = {trial.name for trial in ranked}
        return ranked + [t for t in self.board.trials.values() if t.name not in places]

    def _trial_json(self, trial: Trial) -> dict[str, Any]:
        known = ("name", "label", "kind", "values", "status", "cause", "parameters", "steps",
                 "starts", "share", "seconds", "beginnings")  # fmt: skip
        return {
            **{name: getattr(trial, name) for name in known},
            "rung": self.rung(trial),
            "flops_spent": flops(trial),
            "samples_per_second": rate(trial),
            "seconds_per_image": self.seconds.get(trial.name),
            "reports": [asdict(report) for report in trial.reports],
        }


def front(points: Sequence[Point]) -> list[Point]:
    """The points for which none costs as little or less and is better, by ascending cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found


def plain(value: Any) -> Any:
    """Numbers that are not finite as None: JSON has no other word for them."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _effects_json(effects: Effects) -> dict[str, Any]:
    fields = [
        {**asdict(one), "identifiable": one.identifiable, "range": one.range}
        for one in effects.fields
    ]
    return {**asdict(effects), "fields": fields}


def _agreement(pairs: Sequence[tuple[float, float]]) -> float:
    if len(pairs) < 3 or any(len(set(one)) < 2 for one in zip(*pairs, strict=True)):
        return math.nan
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
