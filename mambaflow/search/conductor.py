"""The driver's part of a sweep: what is tried next, what a report means, what is asked of it.

Everything that happens is an event in the ledger before it has an effect, so that whoever reads the
ledger knows what this driver knew. Nothing here knows what runs the trials.
"""

import json
import logging
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from mambaflow.config import RunConfig
from mambaflow.data.shard_reader import ShardSet
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import ENDED, METRIC, Board, Report, Trial
from mambaflow.search.budget import flops_of_a_step, parameters_of, steps_of, with_steps
from mambaflow.search.config import SweepConfig
from mambaflow.search.ledger import Event, Ledger
from mambaflow.search.proposals import propose
from mambaflow.search.space import Listed, Product, Space, values_of, with_values
from mambaflow.search.sweep_paths import SweepPaths

POLL_S = 2.0  # between looks for requests in storage
CONTINUE, STOP = "continue", "stop"
log = logging.getLogger(__name__)


@runtime_checkable
class Rungs(Protocol):
    """Which trials are stopped early: Ray's ASHA, or none."""

    def decide(self, trial: str, validations: float, psnr: float) -> str:
        """Whether a trial goes on after some of its validations: "continue" or "stop"."""


@dataclass(frozen=True)
class Told:
    """What a trial says: at a checkpoint, or at its end."""

    trial: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    scores: dict[str, float] | None = None
    """At a checkpoint."""
    ended: str = ""
    """finished, stopped (a request) or failed."""
    cause: str = ""


class Conductor:
    """One sweep, as its driver leads it. Its methods may be called from any thread.

    Args:
        sweep: what is asked for; its data are staged.
        space: of the base configuration.
        rungs: which have heard nothing yet.
        threads: of each worker of a trial on CPU.
    """

    def __init__(self, sweep: SweepConfig, space: Space, rungs: Rungs, threads: int = 0) -> None:
        self.sweep, self.space, self.rungs, self.threads = sweep, space, rungs, threads
        self.paths = SweepPaths.of(sweep.run)
        self.ledger, self.board = Ledger(self.paths.folder), Board()
        self.shards = ShardSet(sweep.run.data, "train")
        self.stopping = ""
        """Why no trial is begun any more; "" while they are."""
        self.asked_to_stop = ""
        """The name of a signal, put there by its handler."""
        self._to_stop: set[str] = set()
        self.lock = threading.RLock()
        self._began = self._polled = time.monotonic()
        self._spent = 0.0  # by the drivers before

    # What happens, in the order in which it does.

    def begin(self, command: str, concurrent: int) -> None:
        """Take the sweep over from whoever had it, and go through what happened so far.

        Raises:
            ReplacedError: another driver has taken it at the same moment.
            ValueError: a damaged ledger.
        """
        with self.lock:
            before = self.ledger.events()
            self.ledger.open()
            for event in before:
                self.board.add(event)
                self._replay(event)
            self._spent = self.board.seconds
            wanted = max(self.board.wanted, self.sweep.search.num_samples)
            self._append(
                "begin", wanted=wanted, concurrent=concurrent, command=command,
                day=time.strftime("%Y-%m-%d"),
            )  # fmt: skip
            self._finish_what_was_decided()

    def _replay(self, event: Event) -> None:
        """The rungs as they were: they hear every report again, in the order of before."""
        if event["event"] != "report":
            return
        trial = self.board.trials[event["trial"]]
        again = self._decide(trial, trial.reports[-1])
        if again != event["decision"]:
            log.warning(
                "%s after step %d was to %s, and would now %s: another version of Ray decides",
                trial.name, event["step"], event["decision"], again,
            )  # fmt: skip

    def _finish_what_was_decided(self) -> None:
        """End the trials whose last report was answered, and whose end the driver did not see."""
        for trial in self.board.with_status("interrupted"):
            if trial.last and trial.last.decision == STOP:
                self.ended(trial.name, *self._end_of(trial, trial.last))

    def next_trial(self) -> Trial | None:
        """The trial to begin now, waiting in the board; None for none."""
        with self.lock:
            if self.stopping:
                return None
            left = self.board.with_status("waiting", "interrupted")
            return left[0] if left else self._proposed()

    def _proposed(self) -> Trial | None:
        kinds = Counter(trial.kind for trial in self.board.trials.values())
        base, search = self.sweep.run, self.sweep.search
        if kinds["seed"] < self._seeds:
            return self._add("seed", values_of(base, self._names) | {"train.seed":
                             base.train.seed + 1 + kinds["seed"]})  # fmt: skip
        if kinds["search"] >= self.board.wanted:
            return None
        # The base first, where it is in the space: it is what the others are compared with.
        own = values_of(base, self._names)
        if not kinds["search"] and self._holds(own):
            return self._add("search", own)
        values = propose(self.space, self.board, search.search, search.search_seed)
        if values is None:
            log.info("every configuration of the space was tried")
            return None
        return self._add("search", values)

    @property
    def _names(self) -> list[str]:
        space = self.space
        return list(space.dimensions if isinstance(space, Product) else next(space.all()))

    @property
    def _seeds(self) -> int:
        # A space that chooses the seed has no noise of it apart.
        return 0 if "train.seed" in self._names else self.sweep.search.seed_trials

    def _holds(self, values: dict[str, Any]) -> bool:
        space = self.space
        if isinstance(space, Listed):
            return False  # they are taken in their order
        return all(
            values[name] in d.values if hasattr(d, "values") else d.low <= values[name] <= d.high
            for name, d in space.dimensions.items()
        )

    def _add(self, kind: str, values: dict[str, Any]) -> Trial:
        run, name = with_values(self.sweep.run, values), f"{len(self.board.trials):04d}"
        steps = steps_of(run, self.sweep.run, self.sweep.search, self.shards)
        self._append(
            "trial", trial=name, values=values, kind=kind, parameters=parameters_of(run),
            steps=steps, flops=steps * flops_of_a_step(run, self.shards), label=self._label(values),
        )  # fmt: skip
        return self.board.trials[name]

    def _label(self, values: dict[str, Any]) -> str:
        if not isinstance(self.space, Listed):
            return ""
        return next((name for name, v in self.space.runs.items() if v == values), "")

    def run_of(self, trial: Trial) -> RunConfig:
        """The run that a trial is; of a budget in seconds, still without its steps."""
        run = with_values(self.sweep.run, trial.values)
        run = replace(
            run, run_name=trial.name, storage=self.paths.trials, resume=False,
            command=self.sweep.run.command, scale=replace(run.scale, threads=self.threads),
        )  # fmt: skip
        if not trial.steps:
            return run
        return with_steps(run, trial.steps, self.sweep.search, len(self.shards))

    def started(self, name: str) -> None:
        """A trial begins, or goes on."""
        with self.lock:
            self._append("start", trial=name)

    def heard(self, told: Told) -> str:
        """A trial has come to a checkpoint; returns whether it goes on."""
        with self.lock:
            trial, scores = self.board.trials[told.trial], told.scores or {}
            if not trial.steps:
                flops = told.steps * flops_of_a_step(self.run_of(trial), self.shards)
                self._append("steps", trial=told.trial, steps=told.steps, flops=flops)
            if trial.last and told.step <= trial.last.step:
                return trial.last.decision  # told again after a restart
            if not math.isfinite(scores.get(METRIC, math.nan)):
                cause = f"{METRIC} is {scores.get(METRIC)} after step {told.step}"
                self.ended(told.trial, "failed", cause)
                return STOP
            batch = self.run_of(trial).train.batch_size
            report = Report(
                told.step, told.step * batch, told.step / trial.steps, told.seconds,
                max(trial.starts, 1), scores, "",
            )  # fmt: skip
            decision = self._decide(trial, report)
            self._append(
                "report", trial=told.trial, step=told.step, samples=report.samples,
                share=report.share, seconds=told.seconds, scores=scores, decision=decision,
            )  # fmt: skip
            if decision == STOP and trial.last:
                if told.step < trial.steps:
                    # At once: what runs it may be long in asking.
                    self.paths.trial(told.trial).write(RunPaths.STOP, b"behind the others\n")
                self.ended(told.trial, *self._end_of(trial, trial.last))
            return decision

    def _decide(self, trial: Trial, report: Report) -> str:
        """Whether a trial goes on after a report; the rungs hear of it."""
        whole = report.step >= trial.steps
        # Seeds measure noise: of those that were stopped early nothing would be known.
        if trial.kind == "seed" or self.sweep.search.scheduler == "none":
            return STOP if whole else CONTINUE
        # One rounding: at the k-th validation of a budget that they divide this is k, not less.
        validations = report.step * self.sweep.search.validations / trial.steps
        decision = self.rungs.decide(trial.name, validations, report.psnr)
        return STOP if whole else decision

    def _end_of(self, trial: Trial, report: Report) -> tuple[str, str]:
        if report.step >= trial.steps:
            return "finished", ""
        return "stopped", f"behind the others at {100 * report.share:.0f} % of the budget"

    def heard_end(self, told: Told) -> None:
        """A trial says how it ended."""
        with self.lock:
            asked = told.ended == "stopped" and told.trial not in self._to_stop
            # Stopped with the sweep: it goes on with it too.
            status = "interrupted" if asked and self.stopping else told.ended
            self.ended(told.trial, status, told.cause or self.stopping)

    def ended(self, name: str, status: str, cause: str) -> None:
        """A trial has ended, whatever the reason; a second time changes nothing."""
        with self.lock:
            if self.board.trials[name].status in ENDED:
                return
            self._append("end", trial=name, status=status, cause=cause)
            if status == "failed":
                self._look_at_failures()

    def _look_at_failures(self) -> None:
        """Stop a sweep whose trials all fail before they have said anything."""
        row: list[Trial] = []
        for trial in reversed(self.board.with_status("failed", "finished", "stopped")):
            if trial.status != "failed" or trial.reports:
                break
            row.append(trial)
        if len(row) >= self.sweep.search.max_early_failures:
            (cause, count), = Counter(trial.cause for trial in row).most_common(1)  # fmt: skip
            self.stop("failed", f"{len(row)} trials failed at once, {count} with: {cause}")

    # What is asked for while it runs.

    def poll(self) -> None:
        """Answer requests in storage and the limit of hours; cheap to call often."""
        if self.asked_to_stop:
            self.stop("interrupted", self.asked_to_stop)
        now = time.monotonic()
        if now - self._polled < POLL_S:
            return
        self._polled = now
        with self.lock:
            for key in self.paths.folder.list(SweepPaths.REQUESTS):
                if key not in self.board.served:
                    self._serve(key)
            hours = self.sweep.search.max_hours
            if hours and self._spent + now - self._began > 3600 * hours:
                self.stop("hours", f"max_hours (={hours:g}) are over")
            self._repeat_stops()

    def _serve(self, key: str) -> None:
        text = self.paths.folder.read(key)
        try:
            request = json.loads(text)
            more, stop = int(request.get("more", 0)), request.get("stop")
        except (ValueError, TypeError, AttributeError) as error:
            more, stop = 0, f"? ({error!r})"
        if more > 0:
            self._append("more", count=more, request=key)
            return
        # Answered even so: a request that nobody understands must not be read again and again.
        self._append("asked", request=key)
        if stop in self.board.trials:
            self._to_stop.add(stop)
        else:
            log.warning("%s asks for what there is not: %.80r", key, text)

    def _repeat_stops(self) -> None:
        """Have trials stop that are to: again and again, since a run that is just beginning takes
        the file away, as what has stopped it before."""
        for trial in self.board.trials.values():
            if trial.status == "running" and (self.stopping or trial.name in self._to_stop):
                self.paths.trial(trial.name).write(RunPaths.STOP, b"asked to\n")
            elif trial.name in self._to_stop and trial.status in ("waiting", "interrupted"):
                self.ended(trial.name, "stopped", "asked to")

    def stop(self, status: str, cause: str) -> None:
        """Begin no trial any more, and have those that run stop with a checkpoint."""
        with self.lock:
            if self.stopping:
                return
            self.stopping = status
            log.info("stopping: %s", cause)
            self._append("done", status=status, cause=cause)
            self._repeat_stops()

    def close(self) -> None:
        """The end, where nothing has stopped the sweep before."""
        with self.lock:
            self.shards.close()
            for trial in self.board.with_status("running"):
                status = "interrupted" if self.stopping else "failed"
                self.ended(trial.name, status, "ended without a word")
            if not self.stopping:
                self._append("done", status="finished", cause="")

    def _append(self, what: str, **values: Any) -> None:
        self.board.add(self.ledger.append(what, **values))
