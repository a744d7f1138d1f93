"""An evaluation from its plan to its last row, whoever makes the rows."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from mambaflow.evaluation.answers import Answerer, Job
from mambaflow.evaluation.cells import Cell, Key, Unit
from mambaflow.evaluation.plan import Plan, keys_of, request, truths
from mambaflow.evaluation.rows import Results, key_of
from mambaflow.storage import at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A unit whose rows are kept."""

    unit: Unit
    failed: int
    seconds: float
    """That its actor took for it."""


Run = Callable[[Job, str, list[Unit]], Iterable[Done]]
"""Makes the rows of some units and keeps them at an address; in any order."""


@dataclass
class Progress:
    """How far an evaluation is, and how long it may take."""

    rows: int
    workers: int
    done: int = 0
    failed: int = 0
    _left: dict[Cell, int] = field(default_factory=dict)
    _took: dict[Cell, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, units: list[Unit], workers: int) -> "Progress":
        """Of units that are all still to do."""
        left: dict[Cell, int] = defaultdict(int)
        for unit in units:
            left[unit.cell] += len(unit.keys)
        return cls(sum(left.values()), workers, _left=dict(left))

    def add(self, done: Done) -> None:
        """A unit is done."""
        rows, cell = len(done.unit.keys), done.unit.cell
        self.done, self.failed = self.done + rows, self.failed + done.failed
        self._left[cell] -= rows
        count, seconds = self._took.get(cell, (0, 0.0))
        self._took[cell] = (count + rows, seconds + done.seconds)

    @property
    def seconds_left(self) -> float | None:
        """By what rows of each cell took so far; None while there is a cell without any."""
        if any(left and cell not in self._took for cell, left in self._left.items()):
            return None
        pace = {cell: seconds / count for cell, (count, seconds) in self._took.items()}
        return sum(left * pace[cell] for cell, left in self._left.items() if left) / self.workers


def evaluate(
    plan: Plan,
    results: Results,
    run: Run,
    *,
    workers: int = 1,
    retry_errors: bool = False,
    command: str = "",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Make every row of the plan that is not there yet.

    Args:
        run: makes the rows.
        workers: that `run` has, for the estimate of time.
        watch: called after every unit.

    Raises:
        ResultsError: the place holds results of something else.
    """
    results.claim(plan.job.fingerprint)
    results.keep_truths(truths(plan))
    results.ask(request(plan, command))
    units = plan.units(finished(results, retry_errors))
    progress = Progress.of(units, workers)
    watch(progress)
    for done in run(plan.job, results.storage.uri, units):
        progress.add(done)
        watch(progress)


def finished(results: Results, retry_errors: bool) -> Iterator[Key]:
    """Rows that are there; without those that failed, if these are to be done again."""
    for found in results.read(columns=()).to_pylist():
        if not (retry_errors and found["error"]):
            yield key_of(found)


def in_process(job: Job, out: str, units: list[Unit]) -> Iterator[Done]:
    """One unit after the other, on one thread: the same bits as an actor's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        answerer, results = Answerer(job), Results(at(out))
        for unit in units:
            yield work(answerer, results, unit)
    finally:
        torch.set_num_threads(threads)


def work(answerer: Answerer, results: Results, unit: Unit) -> Done:
    """Make the rows of a unit, and keep them."""
    start = time.perf_counter()
    rows = answerer.rows(unit)
    results.write(unit, rows)
    failed = sum(bool(row["error"]) for row in rows)
    return Done(unit, failed, time.perf_counter() - start)


@dataclass(frozen=True)
class Status:
    """Rows that were asked for, and what became of them."""

    asked: int
    done: int
    failed: int

    @property
    def whole(self) -> bool:
        """Whether every row that was asked for is there."""
        return self.asked == self.done + self.failed

    def __str__(self) -> str:
        if self.whole:
            return f"{self.asked} rows asked = {self.done} done + {self.failed} failed, all unique"
        missing = self.asked - self.done - self.failed
        return f"{self.asked} rows asked: {self.done} done, {self.failed} failed, {missing} missing"


def status(results: Results, keys: Iterable[Key] | None = None) -> Status:
    """How far the evaluation at an address is, by what is there alone.

    Args:
        keys: of the rows that count; by default all that were ever asked for.

    Raises:
        ResultsError: no evaluation was started there.
    """
    results.manifest()
    table = results.read(columns=())
    errors = {key_of(row): row["error"] for row in table.to_pylist()}
    wanted = set(_asked(results) if keys is None else keys)
    failed = sum(bool(errors[key]) for key in wanted if key in errors)
    return Status(len(wanted), sum(key in errors for key in wanted) - failed, failed)


def _asked(results: Results) -> Iterator[Key]:
    size = int(results.manifest()["data"]["size"])
    for wanted in results.requests():
        for values in wanted["cells"]:
            yield from keys_of(Cell(**values), wanted["images"], wanted["samples"], size)
