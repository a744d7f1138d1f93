"""Which configuration is tried next: a function of the space, of what was tried, and of a seed.

Nothing is kept between two proposals: Optuna's study is made anew of the board each time, so that
a sweep that goes on after a kill proposes what an unbroken one with the same board would.
"""

import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from mambaflow.search.board import Board, Trial
from mambaflow.search.space import Choice, Listed, LogUniform, Product, Space, Values

# Draws after which chance and Optuna are taken to have run out of what was not tried.
DRAWS = 64
# What Optuna calls a trial of each status. One that was stopped early has no value of its own: its
# sampler goes by the reports.
STATES = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
Proposer = Callable[[Product, Board, int], Iterator[Values]]
optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study that is made


def propose(space: Space, board: Board, search: str, seed: int) -> Values | None:
    """The next configuration that was not tried yet; None where there is none left.

    Args:
        search: `optuna`, `random` or `grid`; what a space lists is taken in its order.
        seed: of the sweep.
    """
    tried = {identity(trial.values) for trial in board.trials.values() if trial.kind == "search"}
    if isinstance(space, Listed):
        return next((v for v in space.all() if identity(v) not in tried), None)
    drawn = PROPOSERS[search](space, board, seed)
    # All that are left, where there are few of them: chance would look for the last ones for long.
    rest = space.all() if space.size <= 10_000 else iter(())
    return next((v for v in itertools.chain(drawn, rest) if identity(v) not in tried), None)


def identity(values: Values) -> str:
    """The same text for the same values."""
    return json.dumps(values, sort_keys=True)


def _random(space: Product, board: Board, seed: int) -> Iterator[Values]:
    for draw in range(DRAWS):
        yield space.draw(np.random.default_rng([seed, len(board.trials), draw]))


def _grid(space: Product, board: Board, seed: int) -> Iterator[Values]:
    # Shuffled: the first of the grid's own order differ in its last field alone.
    every = list(space.all())
    yield from (every[i] for i in np.random.default_rng(seed).permutation(len(every)))


def _optuna(space: Product, board: Board, seed: int) -> Iterator[Values]:
    """Optuna's tree-structured Parzen estimator (Watanabe 2023, 2304.11127)."""
    wanted = distributions(space)
    for draw in range(DRAWS):
        # A sampler for each draw, with a seed of its own: it has no state that a kill could lose.
        study = study_of(space, board, _word(seed, len(board.trials), draw))
        yield study.ask(wanted).params


def _word(*numbers: int) -> int:
    """A seed of 32 bits that is a function of some numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


PROPOSERS: dict[str, Proposer] = {"optuna": _optuna, "random": _random, "grid": _grid}


def distributions(space: Product) -> dict[str, BaseDistribution]:
    """The space as Optuna has it."""
    found: dict[str, BaseDistribution] = {}
    for name, dimension in space.dimensions.items():
        if isinstance(dimension, Choice):
            found[name] = CategoricalDistribution(list(dimension.values))
        elif isinstance(dimension, LogUniform):
            found[name] = FloatDistribution(dimension.low, dimension.high, log=True)
    return found


def study_of(
    space: Product, board: Board, seed: int, storage: optuna.storages.BaseStorage | None = None
) -> optuna.Study:
    """Optuna's study of the trials of a board."""
    with warnings.catch_warnings():
        # constant_liar: trials that run count as bad ones, so that the next is elsewhere.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(
        study_name="sweep", direction="maximize", sampler=sampler, storage=storage
    )
    searched = [trial for trial in board.trials.values() if trial.kind == "search"]
    study.add_trials([_frozen(trial, space) for trial in searched])
    return study


def optuna_log(space: Product, board: Board) -> bytes:
    """The trials as a journal of Optuna's, which `optuna-dashboard FILE` shows."""
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as folder:
        path = Path(folder) / "optuna.log"
        backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
        study_of(space, board, 0, JournalStorage(backend))
        return path.read_bytes()


def _frozen(trial: Trial, space: Product) -> FrozenTrial:
    # One that waits or was interrupted goes on: it counts as running.
    state = STATES.get(trial.status, TrialState.RUNNING)
    last = trial.last
    return create_trial(
        state=state,
        params=trial.values,
        distributions=distributions(space),
        value=last.psnr if last and state == TrialState.COMPLETE else None,
        # By thousandths of the budget: Optuna's steps are whole numbers.
        intermediate_values={round(1000 * r.share): r.psnr for r in trial.reports},
        user_attrs={"trial": trial.name, "cause": trial.cause},
    )
