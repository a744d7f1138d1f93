import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mambaflow.data.pixels import grid
from mambaflow.evaluation.baselines import FILLS, fill_images

SIZE = 12
GRID = grid(SIZE).double().numpy()


def masks(count, known, seed=0):
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(SIZE * SIZE)[:known] for _ in range(count)])


def affine(xy):
    return np.array([0.2, 0.5, 0.7]) + xy @ np.array([[0.3, -0.2, 0.1], [0.2, 0.1, -0.4]])


def in_the_corners(index):
    corners = [0, SIZE - 1, SIZE * (SIZE - 1), SIZE * SIZE - 1]
    return np.concatenate((corners, np.setdiff1d(index, corners)))


@pytest.mark.parametrize("name", ["linear", "thin-plate"])
def test_fill_reproduces_an_affine_field_exactly_inside_the_hull(name):
    known = GRID[in_the_corners(masks(1, 40)[0])]
    assert FILLS[name](known, affine(known), GRID) == pytest.approx(affine(GRID), abs=1e-9)


def test_biharmonic_solves_its_equation_at_every_unknown_pixel_off_the_border():
    index = masks(1, 40)[0]
    colours = np.random.default_rng(0).random((40, 3))
    filled = FILLS["biharmonic"](GRID[index], colours, GRID).reshape(SIZE, SIZE, 3)
    assert filled.reshape(-1, 3)[index] == pytest.approx(colours)
    laplacian = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[..., None]
    twice = ndimage.convolve(ndimage.convolve(filled, laplacian), laplacian).reshape(-1, 3)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[2:-2, 2:-2] = True
    inside.flat[index] = False
    # scikit-image clips to the range of the known colours, where the equation cannot hold.
    low, high = colours.min(0), colours.max(0)
    clipped = ((filled <= low) | (filled >= high)).any(-1)
    near = ndimage.binary_dilation(clipped, iterations=2)
    free = inside & ~near
    assert free.sum() > 5
    assert twice[free.ravel()] == pytest.approx(0, abs=1e-9)


def test_thin_plate_reproduces_an_affine_field_outside_the_hull_too():
    known = GRID[masks(1, 9)[0]]
    away = GRID + 0.5
    assert FILLS["thin-plate"](known, affine(known), away) == pytest.approx(affine(away), abs=1e-9)


def test_linear_takes_the_nearest_colour_outside_the_hull():
    known = np.array([[0.4, 0.4], [0.6, 0.4], [0.5, 0.6]])
    colours = np.random.default_rng(0).random((3, 3))
    outside = np.array([[0.0, 0.0], [1.0, 0.1], [0.5, 1.0]])
    assert np.array_equal(FILLS["linear"](known, colours, outside), colours)


@given(known=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_nearest_is_as_near_as_brute_force(known, seed):
    xy = GRID[masks(1, known, seed)[0]]
    numbered = np.repeat(np.arange(known)[:, None], 3, 1).astype(float)
    chosen = FILLS["nearest"](xy, numbered, GRID)[:, 0].astype(int)
    distances = np.linalg.norm(GRID[:, None] - xy[None], axis=-1)
    assert distances[np.arange(len(GRID)), chosen] == pytest.approx(distances.min(1))


@pytest.mark.parametrize("name", FILLS)
def test_known_pixels_are_copied_exactly_and_all_is_in_range(name):
    index = masks(5, 30)
    colours = np.random.default_rng(1).integers(0, 2, (5, 30, 3)).astype(float)  # overshoots
    images = fill_images(name, index, colours, SIZE)
    assert images.shape == (5, SIZE, SIZE, 3)
    assert images.min() >= 0 and images.max() <= 1
    flat = images.reshape(5, -1, 3)
    assert np.array_equal(np.take_along_axis(flat, index[..., None], 1), colours)


@pytest.mark.parametrize("name", FILLS)
def test_columns_are_x_and_rows_are_y(name):
    """An image that is darker to the right and constant downward stays so."""
    index = in_the_corners(masks(1, 90)[0])[None]
    colours = np.repeat(1 - GRID[index][..., :1], 3, -1)
    image = fill_images(name, index, colours, SIZE)[0]
    assert np.abs(image - image.mean(0)).max() < np.abs(image - image.mean(1)[:, None]).max() / 2


def test_what_cannot_be_filled_is_refused_with_the_cure():
    index, colours = masks(1, 20), np.full((1, 20, 3), 0.5)
    with pytest.raises(ValueError, match="valid: nearest, linear, thin-plate, biharmonic"):
        fill_images("cubic", index, colours, SIZE)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        fill_images("linear", index, colours - 1, SIZE)
    row = np.arange(SIZE)[None]
    for name in ("linear", "thin-plate"):
        with pytest.raises(ValueError, match="three points off one line"):
            fill_images(name, row, np.full((1, SIZE, 3), 0.5), SIZE)
    known = GRID[index[0]]
    with pytest.raises(ValueError, match="pixel centres of a square image"):
        FILLS["biharmonic"](known, colours[0], GRID[::-1])
