"""Known effects are found again, with errors that are right, or are said not to be known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mambaflow.search.effects import Effects, Field, Noise, additive

WIDTHS = {64: -0.4, 128: 0.1, 256: 0.3}
KINDS = {"plain": -0.2, "process": 0.2}
SWITCH = {False: 0.05, True: -0.05}


def product(noise: float = 0.0, seed: int = 0, drop: int = 0):
    """Every combination of the three, less some, and what it scores."""
    random, rows = np.random.default_rng(seed), []
    every = itertools.product(WIDTHS.items(), KINDS.items(), SWITCH.items())
    for (width, a), (kind, b), (switch, c) in every:
        score = 20 + a + b + c + noise * random.normal()
        rows.append(({"model.d_model": width, "model.start": kind, "model.on": switch}, score))
    return rows[drop:]


def field(effects: Effects, name: str) -> Field:
    (found,) = (one for one in effects.fields if one.name == name)
    return found


def means(found: Field) -> dict:
    return {effect.value: effect.mean for effect in found.effects}


@pytest.mark.parametrize("drop", [0, 3])
def test_known_effects_are_found_again_balanced_or_not(drop):
    effects = additive(product(drop=drop))
    for name, known in (("model.d_model", WIDTHS), ("model.start", KINDS), ("model.on", SWITCH)):
        assert means(field(effects, name)) == pytest.approx(known, abs=1e-9)
    assert field(effects, "model.d_model").range == pytest.approx(0.7)
    assert effects.residual == pytest.approx(0, abs=1e-9)
    assert (effects.trials, effects.freedom) == (12 - drop, 12 - drop - 5)


def test_of_a_balanced_design_effects_are_differences_of_means_with_the_textbooks_error():
    rows = product(noise=0.1)
    scores = np.array([score for _, score in rows])
    effects = additive(rows)
    for effect in field(effects, "model.d_model").effects:
        own = np.array([values["model.d_model"] == effect.value for values, _ in rows])
        assert effect.mean == pytest.approx(scores[own].mean() - scores.mean())
        # A mean of 4 against that of all 12: sigma^2 (1/4 - 1/12).
        assert effect.error == pytest.approx(effects.residual * math.sqrt(1 / 4 - 1 / 12))
        assert effect.count == 4
    # The largest less the smallest: two means of 4.
    error = field(effects, "model.d_model").range_error
    assert error == pytest.approx(effects.residual * math.sqrt(2 / 4))


def test_errors_are_as_large_as_what_effects_are_off_by():
    """What an effect is off by, in its own errors, is distributed as Student says."""
    off, residuals = [], []
    for seed in range(300):
        effects = additive(product(0.1, seed, drop=2))
        residuals.append(effects.residual)
        widest = field(effects, "model.d_model").effects[-1]
        off.append((widest.mean - WIDTHS[256]) / widest.error)
    assert effects.freedom == 5
    assert np.sqrt(np.mean(np.square(residuals))) == pytest.approx(0.1, rel=0.05)
    assert stats.kstest(off, stats.t(5).cdf).pvalue > 0.05


def test_fields_that_always_change_together_are_not_told_apart_and_others_are():
    rows = [
        ({**values, "train.twin": values["model.start"] == "plain"}, score)
        for values, score in product(0.01)
    ]
    effects = additive(rows)
    for name in ("model.start", "train.twin"):
        assert not field(effects, name).identifiable and math.isnan(field(effects, name).range)
        assert all(math.isnan(one.mean) for one in field(effects, name).effects)
    assert field(effects, "model.d_model").identifiable
    assert means(field(effects, "model.d_model")) == pytest.approx(WIDTHS, abs=0.05)


def test_too_few_trials_are_said_to_be_too_few():
    exact = additive([product()[i] for i in (0, 1, 2, 4, 8)])
    assert exact.freedom == 0 and math.isnan(exact.residual)
    assert all(field.identifiable for field in exact.fields)
    assert means(field(exact, "model.d_model")) == pytest.approx(WIDTHS)
    assert all(math.isnan(one.error) for f in exact.fields for one in f.effects)
    two = additive([product()[0], product()[-1]])
    assert [one.identifiable for one in two.fields] == [False] * 3


def test_a_field_that_did_not_vary_is_left_out_and_without_a_trial_there_is_none():
    rows = [({**values, "train.same": 1}, score) for values, score in product()]
    assert "train.same" not in [one.name for one in additive(rows).fields]
    assert additive([]).fields == [] and additive(rows[:1]).fields == []


def test_a_continuous_field_is_cut_into_three_bins_of_equal_counts():
    random = np.random.default_rng(0)
    rates = np.exp(random.uniform(np.log(1e-4), np.log(1e-2), 60))
    scores = [i % 2 - np.log10(rate / 1e-3) ** 2 for i, rate in enumerate(rates)]
    rows = [
        ({"train.lr": float(rate), "model.on": bool(i % 2)}, float(score))
        for i, (rate, score) in enumerate(zip(rates, scores, strict=True))
    ]
    lr = field(additive(rows), "train.lr")
    assert [one.count for one in lr.effects] == [20, 20, 20]
    low, middle, high = lr.effects
    assert middle.mean > 0 > max(low.mean, high.mean), "the best rate is in the middle"
    ends = [float(end) for one in lr.effects for end in one.label.split(" to ")]
    assert ends == sorted(ends) and ends[0] == pytest.approx(rates.min(), rel=1e-3)
    assert means(field(additive(rows), "model.on")) == pytest.approx(
        {True: 0.5, False: -0.5}, abs=0.2
    )


def test_few_rates_that_are_listed_stay_as_they_are():
    rows = [({"train.lr": (1e-3, 2e-3, 4e-3)[i % 3]}, float(i % 3)) for i in range(9)]
    assert [one.label for one in field(additive(rows), "train.lr").effects] == [
        "0.001", "0.002", "0.004"
    ]  # fmt: skip


def test_values_stand_by_size_and_switches_are_on_or_off():
    rows = [({"n": n, "on": n == 8}, float(n)) for n in (128, 8, 64)]
    labels = {one.name: [e.label for e in one.effects] for one in additive(rows).fields}
    assert labels == {"n": ["8", "64", "128"], "on": ["off", "on"]}


@pytest.mark.parametrize("rows", [
    [({"a": 1}, 1.0), ({"b": 1}, 1.0)],
    [({"a": 1}, math.nan)],
])  # fmt: skip
def test_rows_that_do_not_go_together_are_refused(rows):
    with pytest.raises(ValueError, match="must have a finite score and the fields"):
        additive(rows)


# --- The noise of seeds -------------------------------------------------------------------------


def test_the_noise_is_the_deviation_between_runs():
    noise = Noise.of([23.0, 22.9, 23.1, math.nan])
    assert noise is not None
    assert (noise.mean, noise.deviation) == (pytest.approx(23.0), pytest.approx(0.1))
    assert (noise.runs, noise.freedom) == (3, 2)
    assert Noise.of([23.0]) is None and Noise.of([23.0, math.nan]) is None


def test_the_interval_of_the_deviation_holds_the_true_one_in_nineteen_of_twenty():
    random, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        noise = Noise.of(random.normal(23, 0.1, 3).tolist())
        low, high = noise.interval
        inside += low < 0.1 < high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_luck_is_what_the_best_of_many_equals_gains_on_average():
    best = np.random.default_rng(0).normal(0, 0.1, (20000, 16)).max(1).mean()
    assert Noise(0.0, 0.1, 9).luck(16) == pytest.approx(best, rel=0.02)
    assert Noise(0.0, 0.1, 9).luck(1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("runs", [3, 6])
def test_the_best_of_equals_is_beyond_the_bound_in_one_sweep_of_twenty_at_most(runs):
    random, beyond = np.random.default_rng(0), 0
    for _ in range(3000):
        noise = Noise.of(random.normal(23, 0.1, runs).tolist())
        beyond += random.normal(23, 0.1, 16).max() - noise.mean > noise.bound(16)
    assert 0.005 < beyond / 3000 < 0.06


def test_the_bound_of_one_rival_is_that_of_the_t_test():
    base, rival = np.array([22.9, 23.0, 23.15]), 23.4
    noise = Noise.of(base.tolist())
    # Against a single run: the pooled deviation is that of the base's runs alone.
    t = (rival - base.mean()) / (base.std(ddof=1) * math.sqrt(1 + 1 / 3))
    level = stats.t.sf(t, 2)
    assert (rival - base.mean() > noise.bound(1)) == (level < 0.05)
    assert noise.bound(1) == pytest.approx(
        stats.t.ppf(0.95, 2) * base.std(ddof=1) * math.sqrt(4 / 3)
    )
