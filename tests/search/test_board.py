"""What a ledger comes to: where each trial stands, whichever drivers there were."""

import math

import pytest
from made_up import COMMAND, DAY, Teller

from mambaflow.search.board import Board


def told(share, psnr, **more):
    return {"share": share, "psnr": psnr, "seconds": 90 * share, "after": 90 * share, **more}


def begun(*names: str, **begin) -> Teller:
    """A driver that has proposed and started some trials."""
    teller = Teller(**begin)
    for name in names:
        teller.trial(name, {"model.d_model": 32}).start(name)
    return teller


def test_a_driver_that_was_killed_leaves_its_running_trials_interrupted():
    first = begun("a", "b", "c").end("a").end("b", "failed", "it broke")
    board = Board.of(first.events)
    assert board.counts() == {"finished": 1, "failed": 1, "running": 1}
    board.add(Teller(wanted=5, concurrent=4, begin=9000.0).events[0])
    assert board.counts() == {"finished": 1, "failed": 1, "interrupted": 1}
    assert board.trials["c"].cause == "its driver was lost" and board.starts == 2
    assert (board.wanted, board.concurrent, board.commands) == (5, 4, [COMMAND] * 2)
    assert board.days == [DAY, DAY]
    board.add({"event": "start", "time": 9010.0, "trial": "c"})
    assert board.trials["c"].status == "running" and board.trials["c"].starts == 2
    assert not board.trials["c"].cause


def test_time_without_a_driver_counts_neither_as_time_nor_as_places():
    teller = begun("a", concurrent=2).report("a", **told(1 / 3, 20.0))
    gap = Teller(concurrent=4, begin=teller.clock + 10**6).tell("asked", 5.0, request="x")
    board = Board.of(teller.events + gap.events)
    assert (board.seconds, board.places) == (30 + 5, 2 * 30 + 4 * 5)


def test_a_trial_has_trained_for_what_each_of_its_starts_told_last():
    teller = begun("a").report("a", 1 / 3, 20.0, 30.0, after=40).report("a", 2 / 3, 21.0, 60.0, 35)
    teller.end("a", "interrupted", "stopped").start("a")
    trial = Board.of(teller.report("a", 1.0, 22.0, 30.0, after=37).events).trials["a"]
    assert trial.seconds == 60 + 30 and trial.share == 1.0
    assert trial.beginnings == [10, 7], "until the first report of each start, less the training"
    assert [report.besides for report in trial.reports] == [10, 15, 7]


def test_what_a_lost_start_had_not_told_has_no_time_of_its_own():
    """It is told from the run's log when the next start begins, without seconds."""
    teller = begun("a").report("a", 1 / 3, 20.0, 30.0, after=40).start("a")
    teller.report("a", 2 / 3, 21.0, 0.0, after=1).report("a", 1.0, 22.0, 30.0, after=39)
    trial = Board.of(teller.events).trials["a"]
    assert trial.seconds == 60 and trial.beginnings == [10, 10]


def test_steps_that_were_not_known_at_first_are_told_later():
    teller = begun("a").tell("steps", trial="a", steps=77, flops=1e9)
    trial = Board.of(teller.events).trials["a"]
    assert (trial.steps, trial.flops) == (77, 1e9)


def test_who_went_on_longer_stands_above_and_of_those_the_better_one():
    teller = begun(*"abcdef")
    scores = {"a": (1 / 9, 29.0), "b": (1 / 3, 22.0), "c": (1.0, 23.0), "d": (1.0, 24.0),
              "e": (1.0, 99.0), "f": (1 / 3, math.nan)}  # fmt: skip
    for name, (share, psnr) in scores.items():
        teller.report(name, **told(share, psnr))
    for name, end in {"a": "stopped", "c": "finished", "d": "finished", "e": "failed"}.items():
        teller.end(name, end)
    board = Board.of(teller.events)
    assert [trial.name for trial in board.ranked] == ["d", "c", "b", "a"]
    assert board.best is not None and board.best.name == "d"


def test_finished_trials_compare_by_their_number_however_near_they_came_to_their_budget():
    """A budget of FLOPs is met to a step, and a step of a large model is a larger share."""
    teller = begun("large", "small")
    teller.report("large", **told(0.97, 24.0)).end("large")
    teller.report("small", **told(1.0, 23.0)).end("small")
    board = Board.of(teller.events)
    assert board.best is not None and board.best.name == "large"
    assert [trial.name for trial in board.ranked] == ["large", "small"]


def test_stopped_trials_of_one_rung_compare_by_their_number():
    """Steps that are no multiple of nine: the rung is met to a step."""
    teller = begun("a", "b")
    teller.report("a", **told(0.1111, 20.0)).end("a", "stopped")
    teller.report("b", **told(0.1114, 19.0)).end("b", "stopped")
    assert [trial.name for trial in Board.of(teller.events).ranked] == ["a", "b"]


def test_the_best_was_proposed_and_spent_its_whole_budget():
    teller = begun("a", "b")
    teller.trial("seed", {"train.seed": 1}, "seed").start("seed")
    for name, share, psnr in (("a", 1.0, 23.0), ("b", 1 / 3, 24.0), ("seed", 1.0, 25.0)):
        teller.report(name, **told(share, psnr))
    board = Board.of(teller.events)
    assert board.best is None, "nothing has ended yet"
    for event in teller.end("a").end("b", "stopped").end("seed").events[-3:]:
        board.add(event)
    assert board.best is not None and board.best.name == "a"


def test_requests_are_served_once_and_more_trials_are_wanted():
    teller = (
        Teller(wanted=3).tell("more", count=4, request="more-1").tell("asked", request="stop-a")
    )
    board = Board.of(teller.events)
    assert board.wanted == 7 and board.served == {"more-1", "stop-a"}


def test_a_driver_that_ends_says_how():
    assert Board.of(Teller().events).ended == "running"
    board = Board.of(Teller().tell("done", status="stopped", cause="time is up").events)
    assert (board.ended, board.cause) == ("stopped", "time is up")


def test_a_board_counts_in_words():
    assert str(Board()) == "0 of 0 configurations: none yet"
    teller = begun(*"abc").end("a").end("b").end("c", "failed", "x")
    assert str(Board.of(teller.events)) == "3 of 3 configurations: 1 failed, 2 finished"


def test_an_event_of_another_version_is_refused():
    with pytest.raises(ValueError, match="unknown event 'paused'; use the version"):
        Board.of(Teller().tell("paused").events)
