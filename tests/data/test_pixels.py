"""Masks and orders by their properties, colours and places by arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mambaflow.data.pixels import (
    _ranked,
    choose,
    coordinates,
    copy_known,
    grid,
    reduced,
    to_rgb,
    unknown,
)
from mambaflow.data.random_bits import bits
from mambaflow.kernels import random_cpu
from mambaflow.kernels.build import library
from mambaflow.models.curves import CURVES, curve_key

SEED = st.integers(0, 2**32 - 1)
SPLIT = st.sampled_from(["train", "validation", "test"])


@st.composite
def counts(draw):
    """Size, known and asked pixels that fit."""
    size = draw(st.integers(1, 24))
    known = draw(st.integers(1, size * size))
    return size, known, draw(st.integers(0, size * size - known))


@given(seed=SEED, split=SPLIT, sizes=counts(), ids=st.lists(st.integers(0, 2**50), max_size=6))
def test_masks_hold_the_right_number_of_different_pixels(seed, split, sizes, ids):
    size, known, target = sizes
    chosen = choose(seed, split, torch.tensor(ids, dtype=torch.int64), size, known, target)
    assert chosen.shape == (len(ids), known + target)
    for row in chosen.tolist():
        assert len(set(row)) == known + target  # known and asked are disjoint too
        assert all(0 <= pixel < size * size for pixel in row)


@given(seed=SEED, split=SPLIT, sizes=counts(), ids=st.lists(st.integers(0, 2**50), min_size=1,
       max_size=6), draw=st.integers(0, 2**20))  # fmt: skip
@settings(max_examples=50)
def test_a_mask_depends_on_seed_split_id_and_draw_alone(seed, split, sizes, ids, draw):
    size, known, target = sizes
    together = choose(seed, split, torch.tensor(ids), size, known, target, draw=draw)
    for place, id in enumerate(ids):
        alone = choose(seed, split, torch.tensor([id]), size, known, target, draw=draw)
        assert torch.equal(alone[0], together[place])
    # More targets leave the known pixels, and the targets before them, where they are.
    fewer = choose(seed, split, torch.tensor(ids), size, known, 0, draw=draw)
    assert torch.equal(fewer, together[:, :known])


def test_another_seed_split_id_or_draw_gives_another_mask():
    ways = [(1, "train", 7, 0), (2, "train", 7, 0), (1, "test", 7, 0), (1, "train", 8, 0),
            (1, "train", 7, 1)]  # fmt: skip
    masks = {
        tuple(choose(s, split, torch.tensor([id]), 32, 204, 204, draw=d)[0].tolist())
        for s, split, id, d in ways
    }
    assert len(masks) == len(ways)


@given(seed=SEED, id=st.integers(0, 2**50), size=st.integers(1, 32))
@settings(max_examples=50)
def test_a_mask_is_the_stable_argsort_of_the_words_of_its_image(seed, id, size):
    pixels = size * size
    drawn = bits(seed, "mask/train", 0, torch.tensor([id]), pixels).numpy()
    chosen = choose(seed, "train", torch.tensor([id]), size, 1, pixels - 1)
    assert (chosen.numpy() == drawn.argsort(-1, kind="stable")).all()


@pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
@given(seed=SEED, sizes=counts(), ids=st.lists(st.integers(0, 2**50), max_size=40))
@example(seed=1, sizes=(256, 13107, 13107), ids=[0, 5])
@example(seed=1, sizes=(256, 1, 2**16 - 1), ids=[0, 5])
def test_compiled_ranks_are_those_of_a_stable_sort(seed, sizes, ids):
    size, known, target = sizes
    item, wanted = torch.tensor(ids, dtype=torch.int64), known + target
    compiled = random_cpu.ranked(seed, "mask", 3, item, size * size, wanted)
    drawn = bits(seed, "mask", 3, item, size * size)
    assert torch.equal(compiled, drawn.argsort(dim=-1, stable=True)[:, :wanted])
    assert torch.equal(compiled, _ranked(drawn)[:, :wanted])


@pytest.mark.skipif(library() is None, reason="no C++ compiler: no native kernels")
def test_compiled_ranks_are_right_where_fewer_words_than_usual_are_small():
    """The limit that sorts out large words is three deviations off: some of many cross it."""
    item, pixels, wanted = torch.arange(20_000), 64, 26
    drawn = bits(0, "mask", 0, item, pixels)
    share = (wanted + 3 * (wanted * (pixels - wanted) / pixels) ** 0.5) / pixels
    assert ((drawn < share * 2**32).sum(1) < wanted).any()
    compiled = random_cpu.ranked(0, "mask", 0, item, pixels, wanted)
    assert torch.equal(compiled, _ranked(drawn)[:, :wanted])


def test_every_pixel_is_known_equally_often():
    images, size, known = 20_000, 8, 13
    chosen = choose(5, "train", torch.arange(images), size, known, 13)[:, :known]
    times = np.bincount(chosen.flatten().numpy(), minlength=size * size)
    share = known / size**2
    chi2 = ((times - images * share) ** 2 / (images * share * (1 - share))).sum()
    assert chi2 < 63 + 4 * np.sqrt(2 * 63)
    # Nor do two pixels go together: the pair (0, 1) is as frequent as its share.
    both = ((chosen == 0).any(1) & (chosen == 1).any(1)).double().mean().item()
    expected = share * (known - 1) / (size**2 - 1)
    assert abs(both - expected) < 4 * np.sqrt(expected / images)


@pytest.mark.parametrize(
    ("size", "known", "target", "message"),
    [
        (4, 0, 3, r"known \(=0\) \+ target \(=3\) must be in \[1, 16\]"),
        (4, 9, 8, r"known \(=9\) \+ target \(=8\) must be in \[1, 16\]"),
        (4, 9, -1, r"target \(=-1\)"),
        (257, 5, 5, r"size \(=257\) must be at most 256"),
    ],
)
def test_masks_that_cannot_be_are_refused(size, known, target, message):
    with pytest.raises(ValueError, match=message):
        choose(0, "train", torch.arange(2), size, known, target)


@pytest.mark.parametrize(("name", "value"), [("seed", 2**32), ("seed", -1), ("draw", 2**32)])
def test_a_seed_or_draw_beyond_32_bits_is_refused_by_name(name, value):
    given = {"seed": 0, "draw": 0} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} \(={value}\) must be in \[0, 2\^32\)"):
        choose(given["seed"], "train", torch.arange(2), 4, 2, 2, draw=given["draw"])


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64])
def test_hilbert_steps_from_neighbour_to_neighbour_over_every_pixel_once(size):
    order = curve_key(grid(size)[None], "hilbert")[0].argsort()
    assert sorted(order.tolist()) == list(range(size * size))
    y, x = order // size, order % size
    steps = (y[1:] - y[:-1]).abs() + (x[1:] - x[:-1]).abs()
    assert (steps == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 32, 100, 256])
def test_raster_is_row_by_row(size):
    assert curve_key(grid(size)[None], "raster")[0].argsort().tolist() == list(range(size * size))


@given(size=st.integers(1, 64), curve=st.sampled_from(list(CURVES)))
@settings(max_examples=30)
def test_no_two_pixels_have_one_key(size, curve):
    assert len(curve_key(grid(size)[None], curve).unique()) == size * size


@given(
    size=st.sampled_from([8, 20, 32]),
    curve=st.sampled_from(list(CURVES)),
    subset=st.sets(st.integers(0, 63), min_size=2, max_size=30),
)
@settings(max_examples=40)
def test_a_subset_keeps_the_order_of_the_whole(size, curve, subset):
    pixels = torch.tensor(sorted(subset))
    whole = curve_key(grid(size)[None], curve)[0].argsort()
    some = curve_key(coordinates(pixels, size)[None], curve)[0].argsort()
    assert pixels[some].tolist() == [p for p in whole.tolist() if p in subset]


def test_a_finer_grid_follows_the_same_hilbert_curve():
    """All four quarters of a pixel come before any quarter of the next one."""
    coarse = curve_key(grid(16)[None], "hilbert")[0].argsort()
    fine = curve_key(grid(32)[None], "hilbert")[0].view(16, 2, 16, 2).permute(0, 2, 1, 3)
    quarters = fine.reshape(256, 4)[coarse]
    assert (quarters.max(1).values[:-1] < quarters.min(1).values[1:]).all()


def test_an_unknown_curve_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="unknown curve 'morton'; valid: raster, hilbert"):
        curve_key(grid(2)[None], "morton")


def test_the_corners_of_the_square_have_keys():
    corners = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    for curve in CURVES:
        assert len(curve_key(corners, curve).unique()) == 4


def test_bytes_survive_the_way_to_colours_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    colours = to_rgb(every)
    assert colours[0] == -1 and colours[255] == 1
    assert torch.equal(((colours + 1) * 127.5).round().to(torch.uint8), every)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_coordinates_are_pixel_centres_x_first(size):
    places = grid(size)
    for pixel, (x, y) in enumerate(places.tolist()):
        assert x * size == pytest.approx(pixel % size + 0.5)
        assert y * size == pytest.approx(pixel // size + 0.5)


@given(sizes=counts(), id=st.integers(0, 10**6))
@settings(max_examples=30)
def test_known_and_unknown_pixels_are_the_image(sizes, id):
    size, count, _ = sizes
    index = choose(0, "test", torch.tensor([id]), size, count, 0)
    rest = unknown(index, size)
    assert sorted(index[0].tolist() + rest[0].tolist()) == list(range(size * size))
    assert rest[0].tolist() == sorted(rest[0].tolist())
    painted = copy_known(torch.zeros(1, size**2, 3), index, torch.ones(1, count, 3))
    assert (painted[0, index[0]] == 1).all() and (painted[0, rest[0]] == 0).all()


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 12])
def test_a_reduced_image_is_the_mean_of_its_blocks_with_halves_rounded_up(factor):
    image = np.random.default_rng(0).integers(0, 256, (12, 24, 3), np.uint8)
    found = reduced(image, factor)
    assert found.shape == (12 // factor, 24 // factor, 3) and found.dtype == np.uint8
    for i, j, channel in np.ndindex(found.shape):
        block = image[factor * i :, factor * j :, channel][:factor, :factor]
        mean = Fraction(int(block.astype(int).sum()), factor**2)
        assert found[i, j, channel] == math.floor(mean + Fraction(1, 2))


def test_a_half_is_rounded_up_and_white_stays_white():
    # To even, as numpy rounds, 2.5 would be 2.
    image = np.repeat(np.array([[2, 3], [3, 2]], np.uint8)[..., None], 3, -1)
    assert reduced(image, 2).tolist() == [[[3, 3, 3]]]
    assert (reduced(np.full((256, 256, 3), 255, np.uint8), 256) == 255).all()


@pytest.mark.parametrize("reduce", [-2, 0, 3, 8])
def test_a_reduction_that_leaves_pixels_over_is_refused(reduce):
    message = rf"reduce \(={reduce}\) must divide height \(=4\) and width \(=8\); .* of 4"
    with pytest.raises(ValueError, match=message):
        reduced(np.zeros((4, 8, 3), np.uint8), reduce)
