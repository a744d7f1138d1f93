import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mambaflow.data.pixels import grid
from mambaflow.evaluation.baselines import FILLS, centres, fill_images

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
    known = 0.4 + 0.2 * GRID[masks(1, 9)[0]]
    assert FILLS["thin-plate"](known, affine(known), GRID) == pytest.approx(affine(GRID), abs=1e-9)


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


KNOWN = GRID[in_the_corners(masks(1, 30)[0])]
COLOURS = np.random.default_rng(2).random((len(KNOWN), 3))


def with_value(array, value, at=(3, 1)):
    array = array.copy()
    array[at] = value
    return array


def twice(array):
    return np.concatenate((array, array[:4]))


REFUSED = {
    "no known place": (KNOWN[:0], COLOURS[:0], GRID, r"known_xy \(=0 points\) must hold at least"),
    "more colours than places": (KNOWN[:5], COLOURS[:6], GRID, r"known_rgb \(of shape \(6, 3\)\)"),
    "fewer colours than places": (KNOWN, COLOURS[:1], GRID, r"known_rgb \(of shape \(1, 3\)\)"),
    "grey": (KNOWN, COLOURS[:, :1], GRID, r"known_rgb \(of shape \(\d+, 1\)\) must be \(\d+, 3\)"),
    "known in space": (GRID[:, [0, 1, 1]], COLOURS, GRID, r"known_xy \(of shape \(144, 3\)\)"),
    "one number asked": (KNOWN, COLOURS, GRID[0], r"query_xy \(of shape \(2,\)\) must be"),
    "two colours at one place": (
        twice(KNOWN),
        np.concatenate((COLOURS, COLOURS[1:5])),
        GRID,
        r"known_xy \(=\[\[.*\]\], 4 pairs\) must have one colour at each place",
    ),
    "two colours at nearly one place": (
        np.concatenate((KNOWN, KNOWN[4:5] + 5e-7)),
        np.concatenate((COLOURS, COLOURS[5:6])),
        GRID,
        "must have one colour at each place",
    ),
    **{
        f"known_xy {value}": (
            with_value(KNOWN, value),
            COLOURS,
            GRID,
            rf"known_xy .*{value}.* must",
        )
        for value in (np.nan, np.inf, -np.inf, -0.01, 1.01)
    },
    **{
        f"query_xy {value}": (
            KNOWN,
            COLOURS,
            with_value(GRID, value),
            rf"query_xy .*{value}.* must",
        )
        for value in (np.nan, np.inf, -np.inf, -0.01, 1.01)
    },
    **{
        f"known_rgb {value}": (
            KNOWN,
            with_value(COLOURS, value),
            GRID,
            rf"known_rgb .*{value}.*1 of \d+\) must be finite",
        )
        for value in (np.nan, np.inf, -np.inf)
    },
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", FILLS)
def test_no_fill_takes_what_none_can_answer(name, what, without_shape_checks):
    *given_to_fill, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        FILLS[name](*given_to_fill)


@pytest.mark.parametrize("name", FILLS)
def test_a_query_of_no_places_has_no_colours(name):
    assert FILLS[name](KNOWN, COLOURS, GRID[:0]).shape == (0, 3)


@pytest.mark.parametrize("name", FILLS)
def test_a_place_given_twice_in_one_colour_counts_once(name):
    once = FILLS[name](KNOWN, COLOURS, GRID)
    assert np.array_equal(FILLS[name](twice(KNOWN), twice(COLOURS), GRID), once)


@pytest.mark.parametrize("name", FILLS)
def test_a_fill_of_float32_is_that_of_the_same_numbers_in_float64(name):
    known, colours, asked = (v.astype(np.float32) for v in (KNOWN, COLOURS, GRID))
    found = FILLS[name](known, colours, asked)
    wide = FILLS[name](known.astype(float), colours.astype(float), asked.astype(float))
    assert found.dtype == np.float64 and np.array_equal(found, wide)


@pytest.mark.parametrize(
    ("name", "size"),
    [("nearest", 1), ("biharmonic", 1), *((name, size) for name in FILLS for size in (2, 3))],
)
def test_an_image_of_known_pixels_alone_stays_as_it_is(name, size):
    xy, colours = centres(size), np.random.default_rng(0).random((size * size, 3))
    assert FILLS[name](xy, colours, xy) == pytest.approx(colours, abs=1e-12)


def test_biharmonic_knows_colours_at_pixel_centres_alone():
    """Between them it would move a colour to the pixel around it, and at the edge to none."""
    for place in ([0.5, 0.5], [1.0, 1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="must lie on pixel centres; use another fill"):
            FILLS["biharmonic"](np.array([place]), COLOURS[:1], GRID)


@pytest.mark.parametrize("name", ["linear", "thin-plate"])
@pytest.mark.parametrize("off", [0.0, 1e-10])
def test_places_on_any_line_are_refused(name, off):
    along = np.linspace(0.1, 0.9, 20)
    line = np.stack((along, 0.2 + 0.7 * along + off * np.cos(9 * along)), -1)
    with pytest.raises(ValueError, match="three points off one line; use the fill 'nearest'"):
        FILLS[name](line, COLOURS[:20], GRID)


@pytest.mark.parametrize(
    ("index", "rgb", "message"),
    [
        ([[0, -1]], [2, 3], r"index must hold whole numbers in \[0, 144\)"),
        ([[0, 144]], [2, 3], r"index must hold whole numbers in \[0, 144\)"),
        ([[0.0, 1.0]], [2, 3], "index must hold whole numbers"),
        ([[0, 1], [2, 3]], [2, 3], r"rgb \(of shape \(1, 2, 3\)\) must be \(2, 2, 3\)"),
        ([[0, 1]], [3, 3], r"rgb \(of shape \(1, 3, 3\)\) must be \(1, 2, 3\)"),
        ([[]], [0, 3], "index must hold whole numbers"),
    ],
)
def test_pixels_that_are_not_of_the_image_are_refused(index, rgb, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        fill_images("nearest", np.array(index), np.full((1, *rgb), 0.5), SIZE)


def test_colours_outside_the_range_are_refused_and_no_images_are_none():
    for value in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"rgb must hold values in \[0, 1\]"):
            fill_images("nearest", np.array([[1]]), np.full((1, 1, 3), value), SIZE)
    nothing = fill_images("nearest", np.zeros((0, 5), int), np.zeros((0, 5, 3)), SIZE)
    assert nothing.shape == (0, SIZE, SIZE, 3)
