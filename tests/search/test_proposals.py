"""What is proposed is of the space, was not tried before, and follows from the board alone."""

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from mambaflow.search.board import Board, Report, Trial
from mambaflow.search.proposals import identity, optuna_log, propose, study_of
from mambaflow.search.space import Choice, Listed, LogUniform, Product

SMALL = Product({"model.d_model": Choice([8, 16]), "model.num_layers": Choice([2, 4, 6])})
WIDE = Product({"train.lr": LogUniform(1e-5, 1e-1), "model.num_layers": Choice([2, 4, 6])})


def tried(values, psnr=20.0, status="finished", number=0):
    trial = Trial(f"{number:04d}", values, "search", 1, 10, 1.0, status=status)
    report = Report(10, 100, 1.0, 1.0, 1, {"val/psnr": psnr}, "stop")
    trial.reports.append(report)
    return trial


def board_of(trials):
    return Board(trials={trial.name: trial for trial in trials}, wanted=100)


def walk(space, search, count, score=lambda values: 20.0):
    trials = []
    for number in range(count):
        values = propose(space, board_of(trials), search, 7)
        if values is None:
            break
        trials.append(tried(values, score(values), number=number))
    return trials


@pytest.mark.parametrize("search", ["optuna", "random", "grid"])
def test_a_small_space_is_tried_whole_each_configuration_once(search):
    trials = walk(SMALL, search, 100)
    assert len({identity(trial.values) for trial in trials}) == len(trials) == 6 == SMALL.size


def test_some_of_a_grid_are_of_all_of_it_and_fewer_begin_more():
    digits = {f"model.{name}": Choice([1, 2, 3]) for name in ("d_model", "num_layers", "d_state")}
    some = walk(Product(digits), "grid", 9)
    for name in digits:
        assert len({trial.values[name] for trial in some}) == 3, f"of {name} not all values"
    assert [t.values for t in walk(Product(digits), "grid", 4)] == [t.values for t in some[:4]]


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_a_wide_space_gives_values_within_it_and_never_one_twice(search):
    trials = walk(WIDE, search, 20)
    assert len({identity(trial.values) for trial in trials}) == 20
    for trial in trials:
        assert 1e-5 <= trial.values["train.lr"] <= 1e-1
        assert trial.values["model.num_layers"] in (2, 4, 6)


@pytest.mark.parametrize("search", ["optuna", "random", "grid"])
def test_the_same_board_gives_the_same_proposal(search):
    space = SMALL if search == "grid" else WIDE
    trials = [trial for trial in walk(space, search, 5)]
    one, other = (propose(space, board_of(list(trials)), search, 7) for _ in range(2))
    assert one == other
    if search != "grid":
        assert propose(space, board_of(trials), search, 8) != one


def test_runs_that_are_listed_come_in_their_order():
    space = Listed({"one": {"model.d_model": 8}, "two": {"model.d_model": 24}})
    assert [trial.values for trial in walk(space, "optuna", 9)] == list(space.runs.values())


def test_a_grid_of_a_continuous_field_is_refused():
    with pytest.raises(ValueError, match="train.lr is continuous"):
        propose(WIDE, board_of([]), "grid", 0)


def test_optuna_finds_a_peak_that_chance_finds_less_well():
    def score(values):
        return 30 - (np.log10(values["train.lr"]) + 3) ** 2

    found = {
        search: np.mean(
            sorted(score(t.values) for t in walk(WIDE, search, 40, score))[-10:]
        )
        for search in ("optuna", "random")
    }  # fmt: skip
    assert found["optuna"] > found["random"]


def test_the_journal_for_optunas_dashboard_holds_the_trials(tmp_path):
    trials = walk(WIDE, "random", 5)
    trials[3].status = "failed"
    (tmp_path / "optuna.log").write_bytes(optuna_log(WIDE, board_of(trials)))
    backend = JournalFileBackend(str(tmp_path / "optuna.log"))
    study = optuna.load_study(study_name="sweep", storage=JournalStorage(backend))
    assert [trial.params for trial in study.trials] == [trial.values for trial in trials]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3 + ["FAIL", "COMPLETE"]
    assert [trial.user_attrs["trial"] for trial in study.trials] == [t.name for t in trials]


def test_optuna_is_told_what_became_of_every_trial():
    ends = {
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
        "interrupted": TrialState.RUNNING,
        "running": TrialState.RUNNING,
    }
    trials = [
        tried({"train.lr": 1e-3, "model.num_layers": 2}, 20.0 + i, status, i)
        for i, status in enumerate(ends)
    ]
    study = study_of(WIDE, board_of(trials), 0)
    assert [trial.state for trial in study.trials] == list(ends.values())
    # A stopped trial has no value of its own: its last report is one of a part of the budget.
    assert [t.value for t in study.trials] == [20.0, None, None, None, None]
    assert [t.intermediate_values for t in study.trials] == [{1000: 20.0 + i} for i in range(5)]
