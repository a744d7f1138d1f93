"""What the driver of a sweep decides, and that a kill at any moment changes none of it."""

import json
from dataclasses import replace

import pytest
import small
import small_shards  # noqa: F401

from mambaflow.config import RunConfig
from mambaflow.distributed.asha import Asha
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import Board
from mambaflow.search.conductor import Conductor, Told
from mambaflow.search.config import SearchConfig, SweepConfig
from mambaflow.search.ledger import Ledger, ReplacedError
from mambaflow.search.opening import open_sweep
from mambaflow.search.space import Choice, Listed, Product

SPACE = Product({"model.d_model": Choice([8, 16]), "model.num_layers": Choice([2, 4]),
                 "model.perceiver_iterations": Choice([1, 2, 3])})  # fmt: skip
SEARCH = SearchConfig(num_samples=9, seed_trials=2, validations=9, search="random", search_seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(small.staged(tmp_path_factory.mktemp("data")))


def sweep_in(folder, data, **search) -> SweepConfig:
    run = RunConfig(
        model=small.MODEL, train=replace(small.FIT, epochs=9), storage=str(folder),
        run_name="sweep", data=data,
    )  # fmt: skip
    return SweepConfig(search=replace(SEARCH, **search), run=run)


def conductor_of(sweep, space=SPACE) -> Conductor:
    found = Conductor(sweep, space, Asha(sweep.search), threads=1)
    found.begin("python tune/sweep.py", 2)
    return found


def psnr(name: str, step: int) -> float:
    """What a trial of this name has after a step: some are better, and all get better."""
    return 18 + (int(name) * 7 % 11) / 3 + step / 45


class Killed(Exception):
    """The driver's end."""


def drive(conductor: Conductor, events: int = 10**9) -> None:
    """Run everything, two trials at a time in turn, until so many events are written."""
    live: dict[str, int] = {}
    append, left = conductor.ledger.append, [events]

    def counted(what, **values):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return append(what, **values)

    conductor.ledger.append = counted
    while True:
        while len(live) < 2 and (trial := conductor.next_trial()) is not None:
            conductor.started(trial.name)
            live[trial.name] = trial.last.step if trial.last else 0
        if not live:
            conductor.close()
            return
        for name in list(live):
            trial = conductor.board.trials[name]
            every = conductor.run_of(trial).train.eval_every
            live[name] = min(trial.steps, live[name] + every)
            told = Told(name, live[name], trial.steps, 1.0, {"val/psnr": psnr(name, live[name])})
            if conductor.heard(told) == "stop":
                del live[name]


def decisions(folder) -> dict[tuple[str, int], str]:
    found = {}
    for event in Ledger(folder).events():
        if event["event"] == "report":
            key = event["trial"], event["step"]
            assert key not in found, f"{key} is there twice"
            found[key] = event["decision"]
    return found


def test_asha_stops_those_that_fall_behind_and_everything_is_accounted_for(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data))
    drive(conductor)
    board = Board.of(Ledger(conductor.paths.folder).events())
    assert board.ended == "finished" and len(board.trials) == 11
    counts = board.counts()
    assert counts["stopped"] > 0 and counts["finished"] > 0
    assert counts["stopped"] + counts["finished"] == 11
    # The base is the first that is searched, and seeds are not stopped.
    seeds = [trial for trial in board.trials.values() if trial.kind == "seed"]
    assert [trial.values["train.seed"] for trial in seeds] == [1, 2]
    assert {trial.status for trial in seeds} == {"finished"}
    assert board.trials["0002"].values == {
        "model.d_model": 16, "model.num_layers": 2, "model.perceiver_iterations": 1
    }  # fmt: skip
    best = max((t for t in board.with_status("finished") if t.kind == "search"),
               key=lambda trial: trial.last.psnr)  # fmt: skip
    assert board.best is best


def test_asha_goes_by_the_rule_of_its_paper(tmp_path, data):
    """At a rung a trial goes on unless it is below the best third of what the rung has seen."""
    conductor = conductor_of(sweep_in(tmp_path, data, seed_trials=0))
    drive(conductor)
    rungs: dict[int, list[float]] = {1: [], 3: [], 9: []}
    board = conductor.board
    steps = {trial.steps for trial in board.trials.values()}
    assert steps == {45}
    for event in Ledger(conductor.paths.folder).events():
        if event["event"] != "report" or event["step"] // 5 not in rungs or event["step"] == 45:
            continue
        seen, score = rungs[event["step"] // 5], event["scores"]["val/psnr"]
        import numpy as np

        behind = bool(seen) and score < np.percentile(seen, 100 * 2 / 3)
        assert event["decision"] == ("stop" if behind else "continue")
        seen.append(score)


@pytest.mark.parametrize("events", [1, 2, 3, 5, 8, 13, 21, 34, 45, 50])
def test_killed_after_any_event_it_decides_as_one_that_was_not(tmp_path, data, events):
    whole = conductor_of(sweep_in(tmp_path / "whole", data))
    drive(whole)
    sweep = sweep_in(tmp_path / "broken", data)
    with pytest.raises(Killed):
        drive(conductor_of(sweep), events)
    again = conductor_of(sweep)
    drive(again)
    assert again.board.starts == 2 and again.board.ended == "finished"
    ours, theirs = decisions(again.paths.folder), decisions(whole.paths.folder)
    assert {t.name: t.values for t in again.board.trials.values()} == {
        t.name: t.values for t in whole.board.trials.values()
    }
    assert ours == theirs
    assert {t.name: t.status for t in again.board.trials.values()} == {
        t.name: t.status for t in whole.board.trials.values()
    }


def test_a_driver_that_was_replaced_writes_nothing_more(tmp_path, data):
    sweep = sweep_in(tmp_path, data)
    first = conductor_of(sweep)
    trial = first.next_trial()
    conductor_of(sweep)
    with pytest.raises(ReplacedError):
        first.started(trial.name)


def test_a_number_that_is_none_is_a_failure_with_its_cause(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data))
    trial = conductor.next_trial()
    conductor.started(trial.name)
    told = Told(trial.name, 5, trial.steps, 1.0, {"val/psnr": float("nan")})
    assert conductor.heard(told) == "stop"
    assert trial.status == "failed" and trial.cause == "val/psnr is nan after step 5"
    assert not conductor.stopping  # one is not all


def test_trials_that_all_fail_at_once_end_the_sweep_with_their_cause(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data, max_early_failures=3))
    for _ in range(3):
        assert not conductor.stopping
        trial = conductor.next_trial()
        conductor.started(trial.name)
        conductor.heard_end(Told(trial.name, ended="failed", cause="OutOfMemoryError: CUDA"))
    assert conductor.stopping == "failed" and conductor.next_trial() is None
    assert conductor.board.ended == "failed"
    assert "3 trials failed" in conductor.board.cause and "OutOfMemory" in conductor.board.cause


def test_a_failure_late_or_between_successes_does_not_end_the_sweep(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data, max_early_failures=2, scheduler="none"))
    for number in range(6):
        trial = conductor.next_trial()
        conductor.started(trial.name)
        if number % 2:
            conductor.heard_end(Told(trial.name, ended="failed", cause="RunFailed: lost"))
        else:
            scores = {"val/psnr": 20.0 + number}
            conductor.heard(Told(trial.name, trial.steps, trial.steps, 1.0, scores))
    assert not conductor.stopping and conductor.board.counts() == {"failed": 3, "finished": 3}


def ask(conductor, **what):
    conductor.paths.folder.write(f"requests/{len(what)}-{sorted(what)}.json",
                                 json.dumps(what).encode())  # fmt: skip
    conductor._polled -= 100
    conductor.poll()


def test_more_trials_can_be_asked_for_while_it_runs_and_once(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data, num_samples=2, seed_trials=0))
    ask(conductor, more=3)
    conductor._polled -= 100
    conductor.poll()
    assert conductor.board.wanted == 5
    drive(conductor)
    assert len(conductor.board.trials) == 5
    # A driver that goes on does not answer it again.
    again = conductor_of(sweep_in(tmp_path, data, num_samples=2, seed_trials=0))
    again._polled -= 100
    again.poll()
    assert again.board.wanted == 5


def test_a_trial_that_is_to_stop_is_told_until_it_has(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data))
    trial = conductor.next_trial()
    conductor.started(trial.name)
    ask(conductor, stop=trial.name)
    folder = conductor.paths.trial(trial.name)
    assert folder.exists(RunPaths.STOP)
    folder.delete(RunPaths.STOP)  # as a run that is just beginning does
    conductor._polled -= 100
    conductor.poll()
    assert folder.exists(RunPaths.STOP)
    conductor.heard_end(Told(trial.name, ended="stopped"))
    assert trial.status == "stopped" and not conductor.stopping


def test_a_sweep_that_stops_leaves_its_trials_to_go_on(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data))
    trial = conductor.next_trial()
    conductor.started(trial.name)
    conductor.asked_to_stop = "SIGTERM"
    conductor.poll()
    assert conductor.paths.trial(trial.name).exists(RunPaths.STOP)
    assert conductor.next_trial() is None
    conductor.heard_end(Told(trial.name, ended="stopped"))
    assert trial.status == "interrupted" and conductor.board.ended == "interrupted"
    again = conductor_of(sweep_in(tmp_path, data))
    assert again.next_trial().name == trial.name


def test_the_hours_are_over(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data, max_hours=1.0))
    conductor._began -= 3601
    conductor._polled -= 100
    conductor.poll()
    assert conductor.stopping == "hours" and "max_hours (=1)" in conductor.board.cause


def test_hours_are_counted_over_all_drivers(tmp_path, data):
    first = conductor_of(sweep_in(tmp_path, data, max_hours=1.0))
    path = first.paths.folder.path / "ledger" / "0001.jsonl"
    begun = json.loads(path.read_text())
    late = {"event": "done", "time": begun["time"] + 3000, "status": "interrupted", "cause": ""}
    path.write_text(json.dumps(begun) + "\n" + json.dumps(late) + "\n")
    second = conductor_of(sweep_in(tmp_path, data, max_hours=1.0))
    for seconds, stopping in ((500, ""), (200, "hours")):  # 3,500 s, then 3,700 s
        second._began -= seconds
        second._polled -= 100
        second.poll()
        assert second.stopping == stopping


@pytest.mark.parametrize("text", ["{", "[]", '{"more": "x"}', '{"stop": "0099"}', "{}"])
def test_a_request_that_nobody_understands_is_told_once(tmp_path, data, text, caplog):
    conductor = conductor_of(sweep_in(tmp_path, data))
    conductor.paths.folder.write("requests/odd.json", text.encode())
    for _ in range(2):
        conductor._polled -= 100
        conductor.poll()
    told = [record for record in caplog.records if "what there is not" in record.message]
    assert len(told) == 1 and not conductor.stopping


def test_a_trial_that_ended_without_a_word_is_accounted_for(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data))
    trial = conductor.next_trial()
    conductor.started(trial.name)
    conductor.close()
    assert trial.status == "failed" and trial.cause == "ended without a word"


def test_what_is_told_again_after_a_restart_is_decided_as_before(tmp_path, data):
    conductor = conductor_of(sweep_in(tmp_path, data))
    trial = conductor.next_trial()
    conductor.started(trial.name)
    told = Told(trial.name, 5, trial.steps, 1.0, {"val/psnr": 20.0})
    conductor.heard(told)
    before = len(Ledger(conductor.paths.folder).events())
    assert conductor.heard(told) == "continue"
    assert len(Ledger(conductor.paths.folder).events()) == before


def test_equal_flops_give_a_small_model_more_steps(tmp_path, data):
    space = Listed({"small": {"model.d_model": 8}, "base": {"model.d_model": 16}})
    conductor = conductor_of(sweep_in(tmp_path, data, budget="flops", seed_trials=0), space)
    one, two = conductor.next_trial(), None
    conductor.started(one.name)
    two = conductor.next_trial()
    assert one.label == "small" and two.label == "base"
    assert one.steps > two.steps == 45 and one.parameters < two.parameters
    # As near as whole steps come.
    assert one.flops == pytest.approx(two.flops, rel=0.5 / 45)
    train = conductor.run_of(one).train
    assert train.max_steps == one.steps and train.epochs * small.TRAIN // 8 >= one.steps


def test_a_trial_is_a_run_of_its_own_with_nothing_of_the_test_split(tmp_path, data):
    sweep = sweep_in(tmp_path, data)
    open_sweep(sweep)
    conductor = conductor_of(sweep)
    run = conductor.run_of(conductor.next_trial())
    assert run.storage == str(tmp_path / "sweep" / "trials") and run.run_name == "0000"
    assert run.train.seed == 1 and run.scale.threads == 1 and not run.resume
