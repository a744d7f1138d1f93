"""Activity is a function of the known pixels alone, to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambaflow.evaluation.activity import activity, sextile_edges, sextiles

SEEDS = st.integers(0, 2**32 - 1)


def of_their_own(active, index):
    return sextiles(active, sextile_edges(active, index))


def pictures(count, height, width, known, seed):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, height, width, 3), np.uint8)
    order = [random.permutation(height * width)[:known] for _ in range(count)]
    return images, np.array(order)


def by_looking_at_all(image, known):
    """Known pixels sorted by distance, then row, then column; the first six of them."""
    height, width, _ = image.shape
    found = np.empty((height, width))
    for row, column in np.ndindex(height, width):
        places = [(k // width, k % width) for k in known]
        near = sorted(places, key=lambda p: ((p[0] - row) ** 2 + (p[1] - column) ** 2, *p))[:6]
        colours = np.array([image[place] for place in near]) / 255
        found[row, column] = np.sqrt(colours.var(0).mean())
    return found


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0)
)
@settings(deadline=None, max_examples=40)
def test_activity_is_the_deviation_of_the_six_nearest_known_colours(height, width, share, seed):
    """Of many that are equally near, the upper ones and then the left ones; of fewer, of all."""
    known = 1 + round(share * (height * width - 1))
    images, index = pictures(2, height, width, known, seed)
    found = activity(images, index)
    expected = [by_looking_at_all(*pair) for pair in zip(images, index, strict=True)]
    assert found == pytest.approx(np.array(expected))


def test_ties_are_broken_alike_in_the_largest_image():
    """All pixels of a ring of 256 x 256 are known: each is as far from the middle as another."""
    size, middle = 256, 128
    offsets = [(15, 20), (20, 15), (7, 24), (24, 7), (25, 0), (0, 25)]
    ring = {(a * y, b * x) for y, x in offsets for a in (-1, 1) for b in (-1, 1)}
    random = np.random.default_rng(0)
    index = random.permutation([(middle + y) * size + middle + x for y, x in ring])
    image = random.integers(0, 256, (size, size, 3), np.uint8)
    six = np.sort(index)[:6]  # the first in raster order
    expected = np.sqrt((image.reshape(-1, 3)[six] / 255).var(0).mean())
    assert activity(image[None], index[None])[0, middle, middle] == pytest.approx(expected)


def test_activity_does_not_depend_on_what_is_unknown_nor_on_the_order_of_what_is_known():
    images, index = pictures(3, 12, 12, 28, 0)
    changed = np.full_like(images, 7).reshape(3, -1, 3)
    given_ = np.take_along_axis(images.reshape(3, -1, 3), index[..., None], 1)
    np.put_along_axis(changed, index[..., None], given_, 1)
    backward = np.ascontiguousarray(index[:, ::-1])
    again = activity(changed.reshape(images.shape), backward)
    assert np.array_equal(again, activity(images, index))


def test_activity_is_of_a_range_of_one_and_zero_where_all_is_equal():
    images, index = pictures(1, 8, 8, 16, 0)
    assert not activity(np.full_like(images, 200), index).any()
    halves = np.where(np.arange(8)[None, :, None, None] % 2, 255, 0) + np.zeros_like(images)
    assert activity(halves.astype(np.uint8), index).max() == 0.5


def test_no_known_pixel_is_refused_and_no_images_have_none():
    images, index = pictures(2, 4, 4, 0, 0)
    with pytest.raises(ValueError, match=r"known \(=0 an image\) must hold a pixel at least"):
        activity(images, index.astype(int))
    images, index = pictures(2, 4, 4, 3, 0)
    nothing = activity(images[:0], index[:0])
    assert nothing.shape == of_their_own(nothing, index[:0]).shape == (0, 4, 4)


def unknown(known, pixels):
    mask = np.ones((len(known), pixels), bool)
    np.put_along_axis(mask, known, False, 1)
    return mask


@given(
    count=st.integers(1, 4), size=st.integers(2, 7), share=st.floats(0, 0.95), seed=st.integers(0)
)
@settings(deadline=None, max_examples=40)
def test_sextiles_are_equal_sixths_of_the_unknown_pixels_in_the_order_of_activity(
    count, size, share, seed
):
    known = 1 + int(share * (size**2 - 1))
    _, index = pictures(count, size, size, known, seed)
    active = np.random.default_rng(seed).permutation(count * size**2) / 100.0
    active = active.reshape(count, size, size)
    mask = unknown(index, size**2)
    found = of_their_own(active, index).reshape(count, -1)[mask]
    sizes = np.bincount(found, minlength=6)
    assert len(sizes) == 6 and sizes.max() - sizes.min() <= 1
    assert np.array_equal(np.sort(found), found[np.argsort(active.reshape(count, -1)[mask])])


def test_pixels_as_active_as_one_another_share_the_calmest_sextile_that_is_theirs():
    _, index = pictures(2, 6, 6, 7, 0)
    assert not of_their_own(np.full((2, 6, 6), 0.3), index).any()
    mask = unknown(index, 36)
    active = np.zeros((2, 36))
    active[mask] = np.arange(mask.sum()) > 0.4 * mask.sum()  # two fifths are equally calm
    found = of_their_own(active.reshape(2, 6, 6), index).reshape(2, -1)[mask]
    assert set(found[active[mask] == 0]) == {0} and set(found[active[mask] == 1]) == {2}


def test_where_all_is_known_no_pixel_is_told_from_another():
    images, index = pictures(2, 4, 4, 16, 0)
    assert not of_their_own(activity(images, index), index).any()


def test_the_sextiles_of_some_images_are_those_that_they_have_among_all():
    images, index = pictures(6, 8, 8, 12, seed=5)
    active = activity(images, index)
    edges = sextile_edges(active, index)
    assert len(edges) == 5 and (np.diff(edges) > 0).all()
    for i in range(6):
        assert np.array_equal(sextiles(active[i : i + 1], edges)[0], of_their_own(active, index)[i])
