"""One field at several sizes: what is painted at one is what is painted at another."""

from dataclasses import replace

import pytest
import small
import torch
from small import LAYOUT, MODEL
from torch import nn

from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.complete import EvalSet
from mambaflow.evaluation.enlarge import enlarge
from mambaflow.flow.samplers import SOLVERS
from mambaflow.models.velocity_field import VelocityField

ONE = SOLVERS["exponential"]  # in one interval a draw of the law itself


@pytest.fixture(scope="module")
def eval_set(tmp_path_factory) -> EvalSet:
    data = small.staged(tmp_path_factory.mktemp("data"))
    return EvalSet.read(ShardSet(str(data), "test"), LAYOUT, 3)


@pytest.fixture(scope="module")
def model() -> VelocityField:
    torch.manual_seed(3)
    field = VelocityField(replace(MODEL, start="process"))
    nn.init.normal_(field.head.weight, std=0.3)  # so that x and t matter
    return field.eval()


def test_pixel_centres_that_coincide_have_the_same_colour_in_the_law_s_own_draw(model, eval_set):
    """Every third centre of a grid three times as fine, from its second on, is one of the grid."""
    size = LAYOUT.size
    painted = enlarge(model, eval_set, [size, 3 * size], ONE)
    fine = painted[3 * size][:, 1::3, 1::3]
    torch.testing.assert_close(painted[size], fine, rtol=0, atol=1e-4)
    means = enlarge(model, eval_set, [size], SOLVERS["mean"])[size]
    assert (painted[size] - means).abs().mean() > 0.01, "a draw is not the mean"


def test_neighbours_grow_alike_as_the_grid_grows_finer(model, eval_set):
    """One continuous field seen finer, not new noise at every point: steps between neighbours
    shrink with the pixels."""
    # Both finer than the field: its length is that of 2.5 pixels of 32.
    painted = enlarge(model, eval_set, [32, 64], ONE)
    coarse, fine = (painted[size].diff(dim=1).abs().mean() for size in (32, 64))
    assert fine < 0.7 * coarse, "half the way, a correlation of .94 in place of .81"


def test_an_image_is_enlarged_the_same_beside_others_and_alone(model, eval_set):
    together = enlarge(model, eval_set, [LAYOUT.size], SOLVERS["sde"], 8)[LAYOUT.size]
    alone = enlarge(model, eval_set[1:2], [LAYOUT.size], SOLVERS["sde"], 8)[LAYOUT.size]
    assert torch.equal(together[1:2], alone)


def test_the_posterior_mean_of_a_place_is_one_at_any_size(model, eval_set):
    size = LAYOUT.size
    painted = enlarge(model, eval_set, [size, 3 * size], SOLVERS["mean"])
    fine = painted[3 * size][:, 1::3, 1::3]
    torch.testing.assert_close(painted[size], fine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [[], [0], [32, 2048]])
def test_sizes_that_cannot_be_painted_are_refused(model, eval_set, sizes):
    with pytest.raises(ValueError, match=r"sizes \(=.*\) must be one or more, each in \[1, 1024\]"):
        enlarge(model, eval_set, sizes, ONE)
