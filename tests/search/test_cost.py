"""What an answer takes: of real checkpoints, side by side, and never at the price of the report."""

from dataclasses import replace

import pytest
import small
import torch
from made_up import Teller, run, sweep

from mambaflow.models.weights import CheckpointInfo
from mambaflow.search import cost
from mambaflow.search.cost import MOST, time_answers
from mambaflow.search.sweep_report import read_findings, write_report
from mambaflow.training import checkpoint
from mambaflow.training.loop import TrainState


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sweep of two trials with a checkpoint each, of another width, and one without."""
    root = tmp_path_factory.mktemp("timed")
    data, teller = small.staged(root), Teller()
    for name in ("narrow", "wide", "gone"):
        run(teller.trial(name, {"model.d_model": 16}), name, 23.0)
    paths = sweep(root, teller.events)
    for name, width in (("narrow", 16), ("wide", 64)):
        config = small.run_config(data, root, name)
        config = replace(config, model=replace(config.model, d_model=width))
        state = TrainState(config.model, config.train, small.CPU)
        checkpoint.save(state, CheckpointInfo(step=1, config=config), paths.trial(name))
    return paths


def test_seconds_are_of_each_trial_with_a_checkpoint_and_of_the_others_it_is_told_why(trained):
    timing = time_answers(trained, ["narrow", "gone", "wide"], images=2, rounds=2)
    assert list(timing.seconds) == ["narrow", "wide"]
    assert all(0 < seconds < 10 for seconds in timing.seconds.values())
    assert (timing.images, timing.size) == (2, small.SIZE)
    assert "holds no complete checkpoint" in timing.left_out["gone"]


def test_models_take_turns_with_one_thread_and_the_least_time_counts(monkeypatch):
    clock, turns, threads = [0.0], [], torch.get_num_threads()
    takes = {"a": iter((5.0, 1.0, 3.0)), "b": iter((4.0, 6.0, 2.0))}
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def work(name: str):
        assert torch.get_num_threads() == 1
        turns.append(name)
        clock[0] += next(takes[name])

    found = cost._least({name: lambda name=name: work(name) for name in takes}, 3)
    assert turns == ["a", "b"] * 3 and found == {"a": 1.0, "b": 2.0}
    assert torch.get_num_threads() == threads


def test_no_further_round_begins_when_the_time_is_up(monkeypatch):
    clock, rounds = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def slow() -> None:
        rounds.append(1)
        clock[0] += cost.ROUNDS_S

    cost._least({"slow": slow}, 9)
    assert len(rounds) == 2, "one to warm up, and one that counts"


def test_no_more_than_twenty_are_timed(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "_work", lambda _, trial, __: (asked.append(trial) or print, 12))
    monkeypatch.setattr(cost, "_least", lambda works, _: dict.fromkeys(works, 1.0))
    names = [f"{n:02d}" for n in range(50)]
    assert list(time_answers(trained, names).seconds) == asked == names[:MOST]


def test_data_that_are_gone_cost_the_number_and_not_the_report(trained, tmp_path):
    config = small.run_config(tmp_path / "nowhere", tmp_path, "gone")
    state = TrainState(config.model, config.train, small.CPU)
    checkpoint.save(state, CheckpointInfo(step=1, config=config), trained.trial("lost"))
    timing = time_answers(trained, ["lost"])
    assert not timing.seconds and "nowhere" in timing.left_out["lost"]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"rounds": 0}])
def test_nothing_to_time_is_refused(trained, wrong):
    with pytest.raises(ValueError, match=r"must be positive; use 1 or more"):
        time_answers(trained, ["narrow"], **wrong)


def test_more_images_than_there_are_are_refused_for_each_trial(trained):
    timing = time_answers(trained, ["narrow"], images=small.VALIDATION + 1)
    assert "must be 9 or more" in timing.left_out["narrow"]


def test_a_report_has_seconds_per_image_and_can_do_without(trained):
    write_report(trained)
    page = trained.folder.read(trained.PAGE).decode()
    assert "PSNR by seconds per image" in page and "12 x 12 pixels at a time" in page
    assert "Of 1 others no checkpoint could be loaded" in page
    write_report(trained, timed=False)
    page = trained.folder.read(trained.PAGE).decode()
    assert "PSNR by seconds per image" not in page
    assert "Seconds per image were not measured for this report" in page
    assert read_findings(trained).timing is None
