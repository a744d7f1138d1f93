"""The numbers of a sweep that never ran, worked out by hand."""

import json
import math

import pytest
from made_up import SHARES, Teller, at_share, run, sweep, twenty
from scipy import stats

from mambaflow.search.board import Board
from mambaflow.search.config import SweepConfig
from mambaflow.search.findings import Findings, front, plain
from mambaflow.search.sweep_report import read_findings
from mambaflow.search.trial_figures import flops, rate, told


def found(tmp_path, events, **search) -> Findings:
    return read_findings(sweep(tmp_path, events, **search))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Findings:
    return found(tmp_path_factory.mktemp("sweep"), twenty())


def test_the_fields_are_those_in_which_proposed_trials_differ(whole):
    assert whole.fields == ["model.d_model", "model.num_layers", "train.lr"]
    assert [whole.short(name) for name in whole.fields] == ["d_model", "num_layers", "lr"]


def test_a_field_without_a_value_has_that_of_the_base(whole):
    seed = whole.board.trials["base-1"]
    assert [whole.value(seed, name) for name in whole.fields] == [64, 4, 2e-3]


def test_a_whole_number_where_a_run_has_a_float_is_that_float():
    teller = Teller().trial("a", {"train.weight_decay": 0}).trial("b", {"train.weight_decay": 0.0})
    assert Findings(SweepConfig(), Board.of(teller.events)).fields == []


def test_the_noise_is_of_the_base_with_its_own_seed_and_with_others(whole):
    assert {trial.name for trial in whole.base_runs} == {"0008", "base-1", "base-2"}
    assert whole.noise is not None and whole.noise.deviation == pytest.approx(0.1)
    assert whole.base == pytest.approx(23.0) and whole.gain == pytest.approx(0.6)
    assert whole.rivals == 17, "all but the base; stopped and failed ones might have been lucky"


def test_a_configuration_that_is_proposed_twice_counts_once_as_noise(tmp_path):
    """It has the same seed, and so the same score, which tells nothing of seeds."""
    teller = Teller()
    for name in ("a", "b"):
        run(teller.trial(name, {"model.d_model": 64}), name, 23.0)
    findings = found(tmp_path, teller.events)
    assert len(findings.base_runs) == 1 and findings.noise is None


def test_the_base_gains_nothing_on_itself(tmp_path):
    teller = Teller()
    run(teller.trial("a", {"model.d_model": 64}), "a", 24.0)
    run(teller.trial("seed", {"train.seed": 1}, "seed"), "seed", 22.0)
    assert found(tmp_path, teller.events).gain == 0.0


def test_effects_are_those_that_the_scores_were_made_with(whole):
    means = {f.name: [e.mean for e in f.effects] for f in whole.effects.fields}
    assert means["model.d_model"] == pytest.approx([-0.5, 0.0, 0.5], abs=1e-9)
    assert means["model.num_layers"] == pytest.approx([-0.1, 0.0, 0.1], abs=1e-9)
    assert means["train.lr"] == pytest.approx([0.15, -0.15], abs=1e-9)
    assert whole.effects.trials == 14, "of 18 three were stopped, and one failed"


def test_a_list_is_known_by_the_names_of_its_runs(tmp_path, whole):
    teller = Teller().trial("0000", {"model.windows": False}, label="V1")
    listed = found(tmp_path, teller.events)
    assert listed.is_listed and not whole.is_listed
    assert listed.called(listed.board.trials["0000"]) == "0000 V1"
    assert whole.called(whole.board.trials["0000"]) == "0000"


def test_a_stage_is_compared_with_the_one_before_in_the_order_of_the_list(tmp_path):
    stages = [({}, 22.0), ({"model.windows": False}, 21.7),
              ({"model.windows": False, "model.start": "gaussian"}, 21.9), ({}, 22.0)]  # fmt: skip
    teller = Teller()
    for number, (values, final) in enumerate(stages):
        run(teller.trial(f"{number}", values, label=f"stage {number}"), f"{number}", final,
            cause="it broke" if number == 2 else "")  # fmt: skip
    first, second, failed, last = found(tmp_path, teller.events).stages
    assert [one.label for one in (first, last)] == ["stage 0", "stage 3"]
    assert first.change == "the first" and math.isnan(first.difference)
    assert second.change == "windows on → off" and second.difference == pytest.approx(-0.3)
    assert failed.change == "start process → gaussian"
    assert math.isnan(failed.psnr) and math.isnan(last.difference)


def test_rungs_are_those_of_the_scheduler(tmp_path, whole):
    assert whole.rung_shares == pytest.approx([1 / 9, 1 / 3])
    shares = found(tmp_path, [], grace=2, validations=9, reduction_factor=2).rung_shares
    assert shares == pytest.approx([2 / 9, 4 / 9, 8 / 9])
    assert found(tmp_path / "none", [], scheduler="none").rung_shares == []


def test_what_stopping_may_have_cost(whole):
    first, second = whole.rungs
    assert (first.number, first.reached, first.stopped) == (1, 20, 2)
    assert (second.number, second.reached, second.stopped) == (2, 17, 1)
    # All learn alike: of those that were stopped the best would have come to 22.4.
    assert first.best_stopped == pytest.approx(at_share(22.4, 1 / 9))
    assert first.need == pytest.approx(23.6 - first.best_stopped)
    assert first.most == pytest.approx(-1.5 * math.log10(1 / 9))
    assert first.possible == second.possible == 0 and first.agreement == pytest.approx(1.0)


def test_a_stopped_trial_that_a_late_riser_could_have_overtaken_is_told(tmp_path):
    """The winner was behind at the rung, and gained 3 dB; who was stopped there lacked 2.5 dB."""
    teller = Teller()
    finals = {"late": (21.0, 24.0), "early": (22.5, 23.0), "even": (21.5, 22.2)}
    for name, (there, end) in finals.items():
        teller.trial(name, {"model.d_model": 32}).start(name)
        teller.report(name, 1 / 9, there, 10, after=10).report(name, 1.0, end, 90, after=80)
        teller.end(name)
    teller.trial("cut", {"model.d_model": 64}).start("cut")
    teller.report("cut", 1 / 9, 21.5, 10, after=10, decision="stop").end("cut", "stopped")
    (rung,) = found(tmp_path, teller.events).rungs
    assert (rung.need, rung.most, rung.possible) == (2.5, 3.0, 1)
    pairs = list(zip(*finals.values(), strict=True))
    assert rung.agreement == pytest.approx(stats.spearmanr(*pairs).statistic)


def test_a_trial_that_somebody_stopped_fell_at_no_rung(tmp_path):
    teller = Teller().trial("a", {"model.d_model": 32}).start("a")
    teller.report("a", 1 / 9, 20.0, 10).end("a", "stopped", "asked for by a request")
    findings = found(tmp_path, teller.events)
    trial = findings.board.trials["a"]
    assert findings.rungs == [] and findings.status(trial) == "stopped: asked for by a request"


def test_where_the_time_went(whole):
    """20 trials begin for 20 s; 16 train for 90 s, three and the one that failed for less."""
    time, events = whole.time, twenty()
    training = 16 * 90 + 3 * 10 + 30
    assert time.training == pytest.approx(training) and time.beginning == pytest.approx(20 * 20)
    assert time.besides == pytest.approx(2 * (16 * 2 + 1))
    assert time.wall == pytest.approx(events[-1]["time"] - events[0]["time"])
    assert time.rest == pytest.approx(0, abs=1e-6)
    assert time.share(time.training) == pytest.approx(training / time.wall)


def test_what_a_trial_has_trained_so_far(whole):
    """A ninth of 9 TFLOPs, of 900 steps of 16, of 90 s."""
    stopped = whole.board.trials["0000"]
    assert flops(stopped) == pytest.approx(1e12) and rate(stopped) == pytest.approx(160)
    assert [report.share for report in told(whole.board.trials["0016"])] == list(SHARES)


def test_a_front_holds_what_nothing_beats_for_less():
    points = [(2.0, 5.0, "b"), (1.0, 3.0, "a"), (1.0, 2.0, "worse"), (3.0, 5.0, "dearer"),
              (4.0, 6.0, "c"), (5.0, 4.0, "both")]  # fmt: skip
    assert [name for *_, name in front(points)] == ["a", "b", "c"]
    assert front([]) == []


def test_every_number_is_there_for_programs_and_nothing_that_json_does_not_know(whole):
    numbers = json.loads(json.dumps(whole.json(), allow_nan=False))
    assert numbers["best"] == "0016" and numbers["gain"] == pytest.approx(0.6)
    assert [trial["name"] for trial in numbers["trials"]][:2] == ["0016", "0014"]
    assert len(numbers["trials"]) == 20 and numbers["timing"] is None
    assert plain({"a": [math.nan, (1.0, math.inf)]}) == {"a": [None, [1.0, None]]}
