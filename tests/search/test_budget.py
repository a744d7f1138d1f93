"""Every trial gets as much of what the budget is of, whatever its size."""

from dataclasses import replace

import pytest
import small
import torch

from mambaflow.config import RunConfig
from mambaflow.data.shard_reader import ShardSet
from mambaflow.search.budget import (
    flops_of_a_step,
    parameters_of,
    steps_of,
    timed_steps,
    with_steps,
)
from mambaflow.search.config import SearchConfig
from mambaflow.training.loop import TrainState
from mambaflow.training.preflight import total_steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return ShardSet(str(small.staged(tmp_path_factory.mktemp("data"))), "train")


BASE = RunConfig(model=small.MODEL, train=small.FIT)
WIDE = replace(BASE, model=replace(small.MODEL, d_model=64))


def test_a_budget_of_samples_is_the_same_samples_at_any_batch(shards):
    search = SearchConfig()
    assert steps_of(BASE, BASE, search, shards) == small.STEPS == 20
    halved = replace(BASE, train=replace(small.FIT, batch_size=4))
    assert steps_of(halved, BASE, search, shards) * 4 == small.STEPS * 8
    assert steps_of(WIDE, BASE, search, shards) == small.STEPS


def test_a_budget_of_flops_is_the_same_flops_at_any_size(shards):
    search = SearchConfig(budget="flops")
    steps = steps_of(WIDE, BASE, search, shards)
    spent = steps * flops_of_a_step(WIDE, shards)
    given = small.STEPS * flops_of_a_step(BASE, shards)
    # To the nearest whole step.
    assert abs(spent - given) <= flops_of_a_step(WIDE, shards) / 2 and steps < small.STEPS


def test_a_run_of_any_steps_ends_there_and_validates_evenly(shards):
    search = SearchConfig(validations=9)
    for steps in (1, 7, 9, 50, 500):
        run = with_steps(BASE, steps, search, len(shards))
        assert total_steps(run, len(shards)) == steps
        every = run.train.eval_every
        # The k-th validation is where k ninths are spent, or just behind.
        assert (every - 1) * 9 < steps <= every * 9


def test_parameters_are_those_of_the_model_that_is_trained():
    state = TrainState(small.MODEL, small.FIT, torch.device("cpu"))
    assert parameters_of(BASE) == sum(p.numel() for p in state.model.parameters())


@pytest.mark.slow
def test_a_budget_of_seconds_is_asked_of_the_machine(shards):
    assert steps_of(BASE, BASE, SearchConfig(budget="seconds", trial_minutes=1.0), shards) == 0
    run = replace(BASE, data=shards.storage.uri.removesuffix("/train"))
    few, many = (timed_steps(run, minutes, torch.device("cpu")) for minutes in (1e-9, 100.0))
    assert few == 1 < many
