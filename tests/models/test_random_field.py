"""Draws of a stationary field: their law, and that they are functions of the place alone.

A draw is linear in its white noise. What it makes of each unit of that noise gives the covariance
of all draws as numbers, with no random one among them.
"""

import math

import pytest
import torch
from torch import Tensor

from mambaflow.data.pixels import grid
from mambaflow.models.random_field import PIXEL, TORUS, Correlation, RandomField


def correlation(length: float = 2.5, exponent: float = 1.7) -> Correlation:
    """Length in pixels of 32."""
    return Correlation(
        torch.tensor(length * PIXEL, dtype=torch.float64),
        torch.tensor(exponent, dtype=torch.float64),
    )


def places(n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(1, n, 2, generator=draw, dtype=torch.float64)


def white(modes: int, b: int = 1, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(b, modes, modes, 3, generator=draw, dtype=torch.float64)


def covariance(of: Correlation, modes: int, xy: Tensor) -> Tensor:
    """Of one colour of the draws at these places, from every unit of white noise."""
    units = torch.eye(modes**2, dtype=torch.float64).view(-1, modes, modes, 1)
    field = RandomField.of(units * torch.tensor([1.0, 0.0, 0.0]), of)
    of_unit = field.at(xy.expand(modes**2, -1, -1))
    assert not of_unit[..., 1:].any(), "a colour is made of its own noise alone"
    return of_unit[..., 0].T @ of_unit[..., 0]


@pytest.mark.parametrize(("length", "exponent"), [(2.5, 1.7), (0.5, 1.0), (6.0, 1.95)])
def test_the_correlation_is_the_powered_exponential_of_the_distance(length, exponent):
    xy, other = places(7), places(5, seed=1)
    found = correlation(length, exponent)(xy, other)
    for i, (x, y) in enumerate(xy[0].tolist()):
        for j, (u, v) in enumerate(other[0].tolist()):
            pixels = 32 * math.hypot(x - u, y - v)
            expected = math.exp(-((pixels / length) ** exponent))
            assert found[0, i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert (correlation(length, exponent)(xy, xy)[0].diagonal() == 1).all()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7, 2.0])
def test_a_correlation_is_positive_definite_for_exponents_up_to_two(exponent):
    xy = places(200)
    assert torch.linalg.eigvalsh(correlation(4, exponent)(xy, xy)).min() > -1e-12


def test_beyond_two_it_is_not():
    """The negative control of the test above."""
    xy = places(200)
    assert torch.linalg.eigvalsh(correlation(4, 3.0)(xy, xy)).min() < -0.01


@pytest.mark.parametrize(("modes", "length"), [(16, 5.0), (15, 5.0), (32, 5.0)])
def test_between_places_of_whole_steps_the_covariance_is_the_correlation_exactly(modes, length):
    step = TORUS / modes
    side = torch.arange(int(1 / step) + 1, dtype=torch.float64) * step  # one image, with its rim
    xy = torch.cartesian_prod(side, side)[None]
    found = covariance(correlation(length), modes, xy)
    torch.testing.assert_close(found, correlation(length)(xy, xy)[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [0.3, 0.5])
def test_between_other_places_it_is_a_band_limited_interpolation(shift):
    """Where a length is 2.5 steps, as it is on a 32 grid: to 0.01 between any places, the nearest
    too, and to 0.001 between those that are as far from the nodes as one another."""
    step = TORUS / 32
    of = correlation(2.5 * step / PIXEL)
    side = (torch.arange(8, dtype=torch.float64) + shift) * step
    for xy in (torch.cartesian_prod(side, side)[None], places(60)):
        found = covariance(of, 32, xy)
        assert (found - of(xy, xy)[0]).abs().max() < 0.01
        assert (found.diagonal() - 1).abs().max() < 0.002


def test_finer_waves_bring_any_places_nearer_to_the_correlation():
    xy, of, errors = places(40), correlation(8.0), []
    for modes in (16, 32, 48):
        errors.append((covariance(of, modes, xy) - of(xy, xy)[0]).abs().max().item())
    assert errors[2] < errors[1] / 1.5 < errors[0] / 3 and errors[2] < 0.01


def test_at_its_own_nodes_a_draw_is_the_inverse_fourier_transform():
    modes = 12
    field = RandomField.of(white(modes), correlation(6.0))
    side = torch.arange(modes, dtype=torch.float64) * TORUS / modes
    xy = torch.cartesian_prod(side, side)[None]  # x the slow one, as in `white`
    expected = torch.fft.irfft2(field.series, s=(modes, modes), norm="forward")
    found = field.at(xy).mT.view(1, 3, modes, modes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_table_of_a_grid_says_what_the_sum_for_each_place_says():
    field = RandomField.of(white(64, 2), correlation())
    xy = grid(32).double()[None].expand(2, -1, -1)
    table = field.at(xy)
    draw = torch.Generator().manual_seed(3)
    # No two in a column or a row: a table of their crossings would be far larger than the sums.
    columns, rows = (torch.randperm(32, generator=draw) for _ in range(2))
    few = 32 * rows + columns
    assert len(xy[0, few, 0].unique()) * len(xy[0, few, 1].unique()) > 4 * len(few)
    torch.testing.assert_close(field.at(xy[:, few]), table[:, few], rtol=0, atol=1e-12)


def test_images_may_be_asked_at_places_of_their_own():
    field = RandomField.of(white(16, 3), correlation())
    xy = torch.cat([places(9, seed) for seed in range(3)])
    together = field.at(xy)
    for i in range(3):
        alone = RandomField(field.series[i : i + 1]).at(xy[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_one_draw_is_one_function_on_a_grid_and_on_one_three_times_as_fine():
    field = RandomField.of(white(RandomField.modes(96)), correlation())
    coarse, fine = (field.at(grid(size).double()[None]) for size in (32, 96))
    middle = fine.view(1, 96, 96, 3)[:, 1::3, 1::3].flatten(1, 2)
    torch.testing.assert_close(coarse, middle, rtol=0, atol=1e-12)


def test_single_precision_is_enough():
    given = white(192)
    one, other = (
        RandomField.of(given.to(kind), correlation()).at(grid(32).to(kind)[None])
        for kind in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4)


def test_draws_are_real_normal_numbers_of_variance_one():
    """Of 40 draws on a 32 grid, some 300 independent places each."""
    field = RandomField.of(white(64, 40), correlation())
    x = field.at(grid(32).double()[None].expand(40, -1, -1))
    assert x.dtype == torch.float64
    of_draw = x.square().mean((1, 2))
    error = of_draw.std() / math.sqrt(len(of_draw))
    assert abs(of_draw.mean() - 1) < 4 * error and error < 0.02
    assert (x.pow(4).mean() / 3 - 1).abs() < 0.1
