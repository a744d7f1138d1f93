"""A draw of a process has the truth's law on a finer grid too, where no truth is.

The process is that of what fills leave over: it is 0 at known pixels and freer the farther from
them. Its variance at any place is known in closed form (kriging), so that the first tests are of
expectations, without a draw; the others are of draws, with standard errors over images.
"""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from mambaflow.data.pixels import grid
from mambaflow.evaluation.fine_spread import DISTANCES, FineSpread
from mambaflow.models.random_field import PIXEL, Correlation, RandomField
from mambaflow.models.residual_law import kriging, stationary

SIDE, KNOWN, IMAGES, ERRORS = 32, 204, 24, 4.0
FINE = [64, 96]
LAW = Correlation(torch.tensor(2.5 * PIXEL), torch.tensor(1.7))


def known_xy(image: int) -> Tensor:
    """A fifth of the pixels, others for each image."""
    order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(image))
    return grid(SIDE)[order[:KNOWN]]


def distance(side: int, image: int) -> Tensor:
    """Of each place of a grid to the nearest known pixel, in pixels of the coarse grid."""
    return SIDE * torch.cdist(grid(side), known_xy(image)).amin(-1)


def drawn(seed: int, side: int, image: int) -> Tensor:
    """What is left over at each place of a grid: a draw of the process."""
    modes, known = RandomField.modes(side), known_xy(image)[None]
    white = torch.randn(1, modes, modes, 3, generator=torch.Generator().manual_seed(seed))
    prior = stationary(white, LAW, grid(side)[None], known)[0]
    return prior[: side**2] - kriging(LAW, known, grid(side)[None])[0][0] @ prior[side**2 :]


def deviation(law: Correlation, side: int, image: int) -> Tensor:
    """The process' own at each place, for each of three colours: the root of E[squares]."""
    return kriging(law, known_xy(image)[None], grid(side)[None])[1][0].sqrt().expand(-1, 3)


@cache
def of_images(side: int) -> tuple[FineSpread, ...]:
    """Of each image by itself: a sample on the grid of a side, beside a truth at 32."""
    return tuple(
        FineSpread().add(drawn(1000 + i, side, i), distance(side, i), real(i), distance(SIDE, i))
        for i in range(IMAGES)
    )


@cache
def real(image: int) -> Tensor:
    return drawn(100 + image, SIDE, image)


def total(parts) -> FineSpread:
    return sum(parts, start=FineSpread())


def spread(sums: FineSpread) -> float:
    return sums.report()["spread_fine"]


def away(width: Tensor, far: Tensor) -> float:
    """The mean square a pixel or more from known ones: what would be the simplest to compare."""
    return width[far >= 1 - 1e-3].square().mean().item()


@pytest.mark.parametrize("side", FINE)
@pytest.mark.parametrize(("length", "exponent"), [(2.5, 1.7), (2.5, 1.0), (5.0, 1.7)])
def test_in_expectation_the_spread_is_1_within_3_percent_only_by_distance(side, length, exponent):
    """Of the law itself, by its variances: no luck, and what is off is the measure's own. That is
    what a distance leaves open: a pixel is one away from a known one straight to its side, a place
    of a finer grid in any direction, with other known pixels around."""
    law = Correlation(torch.tensor(length * PIXEL), torch.tensor(exponent))
    found, naive = FineSpread(), torch.zeros(2)
    for i in range(12):
        far = [distance(n, i) for n in (side, SIDE)]
        widths = [deviation(law, n, i) for n in (side, SIDE)]
        found = found.add(widths[0], far[0], widths[1], far[1])
        naive += torch.tensor([away(*pair) for pair in zip(widths, far, strict=True)])
    assert spread(found) == pytest.approx(1, abs=0.03)
    if exponent == LAW.exponent:  # a rougher field varies less by distance
        assert naive[0] / naive[1] > 1.1, "a perfect sample would seem too wild"


@pytest.mark.parametrize("side", FINE)
def test_draws_of_the_process_have_the_spread_of_the_truth(side):
    found = of_images(side)
    # Images are independent: the standard error of a ratio over them, leaving out one at a time.
    without = [spread(total(found[:i] + found[i + 1 :])) for i in range(IMAGES)]
    values = torch.tensor(without, dtype=torch.float64)
    error = ((IMAGES - 1) * values.var(correction=0)).sqrt().item()
    assert abs(spread(total(found)) - 1) < ERRORS * error
    assert error < 0.03, "the error says something: of 24 images it is near 2 %"


def test_samples_twice_as_wide_have_a_spread_4_times_as_large():
    parts = [
        FineSpread().add(2 * drawn(1000 + i, 64, i), distance(64, i), real(i), distance(SIDE, i))
        for i in range(3)
    ]
    assert spread(total(parts)) == pytest.approx(4 * spread(total(of_images(64)[:3])), rel=1e-9)
    assert spread(total(parts)) == pytest.approx(4, rel=0.3)


def test_sums_of_images_merge_also_as_flat_numbers():
    found = of_images(64)
    halves = total(found[::2]), total(found[1::2])
    merged = halves[0] + halves[1]
    assert merged.flat() == pytest.approx(total(found).flat(), rel=1e-9)
    flat = [a + b for a, b in zip(*(half.flat() for half in halves), strict=True)]
    assert FineSpread().unflat(iter(flat)) == merged


def test_on_the_truths_own_grid_it_is_the_ratio_of_squares_at_those_distances():
    """Places at one distance have no slope to go by, and need none."""
    sample, truth, far = drawn(7, SIDE, 0), real(0), distance(SIDE, 0)
    at = torch.stack([(far - target).abs() < 1e-3 for target in DISTANCES]).any(0)
    assert at.sum() > 0.9 * (SIDE**2 - KNOWN)
    expected = sample[at].double().square().sum() / truth[at].double().square().sum()
    found = FineSpread().add(sample, far, truth, far)
    assert spread(found) == pytest.approx(expected.item(), rel=1e-6)


def test_what_lies_on_known_pixels_or_far_from_all_is_in_no_number():
    far = distance(SIDE, 0)
    found = FineSpread().add(drawn(7, SIDE, 0), far, real(0), far)
    off = torch.tensor([0.0, 0.7, 9.0])
    more = found.add(torch.full((3, 3), 50.0), off, torch.full((3, 3), 50.0), off)
    assert more == found


def test_of_no_image_there_is_no_spread():
    assert math.isnan(spread(FineSpread()))
