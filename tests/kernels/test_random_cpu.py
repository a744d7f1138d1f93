"""The compiled random words refuse what they would misread.

Their bits are tested beside those of torch, in tests/data.
"""

import pytest
import torch
from scans import unchecked

from mambaflow.kernels import random_cpu
from mambaflow.kernels.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
ITEM = torch.arange(3)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.complex64])
def test_items_that_are_no_whole_numbers_are_not_rounded(kind):
    message = rf"the numbers to draw for \(={kind} on cpu\) must be whole"
    for draw in (
        lambda x: random_cpu.bits(1, "mask", 0, x, 5),
        lambda x: random_cpu.ranked(1, "mask", 0, x, 9, 5),
        lambda x: random_cpu.philox(x[:, None].expand(3, 4), (1, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            unchecked(draw, ITEM.to(kind))


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"\(=torch.int64 on meta\) must be whole, on cpu"):
        random_cpu.bits(1, "mask", 0, ITEM.to("meta"), 5)


@pytest.mark.parametrize("word", [-1, 2**32])
def test_a_seed_or_stream_beyond_a_word_is_refused_and_not_cut(word):
    for seed, stream in ((word, 0), (0, word)):
        with pytest.raises(ValueError, match=rf"seed and stream, or key \(=.*{word}.*2\^32"):
            random_cpu.bits(seed, "mask", stream, ITEM, 5)
    with pytest.raises(ValueError, match=r"must be in \[0, 2\^32\)"):
        random_cpu.philox(torch.zeros(2, 4, dtype=torch.int64), (0, word))


@pytest.mark.parametrize(("pixels", "wanted"), [(9, 10), (9, -1), (0, 0), (2**16 + 1, 5)])
def test_more_pixels_than_there_are_cannot_be_ranked(pixels, wanted):
    with pytest.raises(ValueError, match=rf"wanted \(={wanted}\) of pixels \(={pixels}\) must be"):
        random_cpu.ranked(1, "mask", 0, ITEM, pixels, wanted)


def test_a_counter_is_four_words():
    with pytest.raises(
        ValueError, match=r"counter \(of shape \(2, 3\)\) must have shape \(..., 4\)"
    ):
        unchecked(random_cpu.philox, torch.zeros(2, 3, dtype=torch.int64), (0, 1))


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_drawn_for_nothing(count):
    assert random_cpu.bits(1, "mask", 0, ITEM[:0], count).shape == (0, count)
    assert random_cpu.bits(1, "mask", 0, ITEM, 0).shape == (3, 0)
    assert random_cpu.ranked(1, "mask", 0, ITEM, 9, 0).shape == (3, 0)
    assert random_cpu.philox(torch.zeros(0, 4, dtype=torch.int64), (0, 1)).shape == (0, 4)
