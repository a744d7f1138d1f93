"""Predicted against observed error: equal of samples of the truth's own law, and of no others.

Each value has a variance V of its own, with a density proportional to V^-2 between two ends. Given
a sample variance s^2 of a normal law, V then is inverse-gamma with the mean s^2 (Gelman et al.
2013, section 2.6): predicted and observed agree in each bin that is away from the ends, in
expectation and without any correction for how values came into it.
"""

import math

import pytest
import torch
from torch import Tensor

from mambaflow.evaluation.reliability import EDGES, Reliability

DRAWS, SIDE, IMAGES, ERRORS = 64, 32, 48, 4.0
# Ends of the deviations, and the bins (from, to) that lie well within them.
RANGES = [((0.005, 0.1), (0.01, 0.08)), ((0.05, 0.4), (0.08, 0.24))]
NOTHING_KNOWN = torch.zeros(SIDE, SIDE, dtype=torch.bool)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(seed: int, ends: tuple[float, float], width: float = 1.0, draws: int = DRAWS):
    """Samples `width` times as wide as their law, and a truth of the law."""
    low, high = (1 / end**2 for end in reversed(ends))
    # 1 / V is uniform where V has a density of V^-2.
    draw = torch.Generator().manual_seed(seed)
    share = torch.rand(SIDE, SIDE, 3, generator=draw, dtype=torch.float64)
    deviation = (low + (high - low) * share).rsqrt()
    numbers = normal(1000 + seed, draws + 1, SIDE, SIDE, 3)
    around = deviation * numbers
    return 0.5 + width * around[1:], 0.5 + around[0]


def counted(ends: tuple[float, float], width: float = 1.0, draws: int = DRAWS) -> Reliability:
    found = Reliability()
    for seed in range(IMAGES):
        found = found.add(*image(seed, ends, width, draws), NOTHING_KNOWN)
    return found


def within(found: Reliability, low: float, high: float) -> list[tuple[float, float, int]]:
    """The bins between two edges."""
    return [one for one in found.report() if low < one[0] < high]


@pytest.mark.parametrize(("ends", "inside"), RANGES)
def test_of_samples_of_the_truths_law_predicted_equals_observed_in_every_bin(ends, inside):
    bins = within(counted(ends), *inside)
    assert len(bins) == EDGES.index(inside[1]) - EDGES.index(inside[0])
    for predicted, observed, values in bins:
        # The square of a normal number has a variance of 2 in units of its mean; that V is known
        # to 18 % alone makes it 2.1.
        error = math.sqrt(2.1 / values)
        assert abs(observed**2 / predicted**2 - 1) < ERRORS * error
        assert error < 0.1, "the error says something"


@pytest.mark.parametrize(("ends", "inside"), RANGES)
def test_samples_half_as_wide_err_twice_what_they_say(ends, inside):
    half = (inside[0], inside[1] / 2)
    bins = within(counted(ends, width=0.5), *half)
    assert bins
    # The truth lies V from the law's mean, and the samples' mean V / 4 / draws.
    right = 4 * (1 + 1 / (4 * DRAWS)) / (1 + 1 / DRAWS)
    for predicted, observed, values in bins:
        error = right * math.sqrt(2.1 / values)
        assert abs(observed**2 / predicted**2 - right) < ERRORS * error
        assert predicted**2 * 2 < observed**2


@pytest.mark.parametrize("draws", [2, 3, 8])
def test_over_all_bins_they_are_equal_however_few_the_samples(draws):
    """Bins of few samples are of those that came out wide or narrow by luck; their sum is not."""
    found = counted((0.09, 0.1), draws=draws).report()
    values = sum(count for _, _, count in found)
    predicted = sum(count * p**2 for p, _, count in found) / values
    observed = sum(count * o**2 for _, o, count in found) / values
    assert values == IMAGES * SIDE**2 * 3
    # A sample variance has a variance of 2 / (draws - 1) in units of its mean.
    error = math.sqrt((2 + 2 / (draws - 1)) / values)
    assert abs(observed / predicted - 1) < ERRORS * error
    assert error < 0.02, "to leave out 1 + 1 / draws would be seen"


def test_bins_are_by_the_deviation_of_a_value():
    """Two samples d apart deviate by d / sqrt(2)."""
    apart = torch.tensor([0.005, 0.03, 0.5], dtype=torch.float64) * math.sqrt(2)
    samples = torch.stack((torch.zeros(1, 1, 3).double(), apart.view(1, 1, 3)))
    truth = torch.full((1, 1, 3), 0.25, dtype=torch.float64)
    found = Reliability().add(samples, truth, torch.zeros(1, 1, dtype=torch.bool)).report()
    assert [count for _, _, count in found] == [1, 1, 1]
    for (predicted, observed, _), d in zip(found, apart.tolist(), strict=True):
        assert predicted == pytest.approx(d / math.sqrt(2))
        assert observed == pytest.approx(abs(0.25 - d / 2) / math.sqrt(1.5))


def test_two_halves_merge_to_the_whole_also_as_flat_numbers():
    ends = RANGES[0][0]
    images = [image(seed, ends, draws=8) for seed in range(6)]
    whole, halves = Reliability(), [Reliability(), Reliability()]
    for number, one in enumerate(images):
        whole = whole.add(*one, NOTHING_KNOWN)
        halves[number % 2] = halves[number % 2].add(*one, NOTHING_KNOWN)
    merged = halves[0] + halves[1]
    assert merged.flat() == pytest.approx(whole.flat(), rel=1e-12)
    sums = [a + b for a, b in zip(*(half.flat() for half in halves), strict=True)]
    assert Reliability().unflat(iter(sums)) == merged
    assert all(isinstance(count, int) for _, _, count in merged.report())


def test_known_pixels_do_not_count_whatever_stands_there():
    samples, truth = image(0, (0.05, 0.4), draws=8)
    known = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(1)) < 0.2
    found = Reliability().add(samples, truth, known)
    assert sum(count for _, _, count in found.report()) == 3 * int((~known).sum())
    samples[:, known], truth[known] = math.nan, 7.0
    assert Reliability().add(samples, truth, known) == found
    assert Reliability().report() == []


def test_one_sample_has_no_deviation_and_is_refused():
    samples, truth = image(0, (0.05, 0.4), draws=1)
    with pytest.raises(ValueError, match=r"samples \(=1\) must be at least 2 to deviate; use 8"):
        Reliability().add(samples, truth, NOTHING_KNOWN)
