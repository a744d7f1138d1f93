import base64
import io

import numpy as np
import pytest
from PIL import Image

from mambaflow.report.pictures import BLANK
from mambaflow.report.sheets import ImageSheet, Scale, crop, heat

SCALE = Scale("standard deviation", 0, 0.2)


def noise(count, height, width=None):
    shape = (count, height, width or height, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def opened(address):
    head, body = address.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body, validate=True))))


def test_a_sheet_holds_every_byte_of_its_images_row_by_row():
    small, large = noise(2, 8), noise(2, 16, 12)
    cells = ImageSheet(columns={"a": small, "b": large}).cells
    for row, (left, right) in enumerate(cells):
        assert np.array_equal(opened(left[0]), small[row])
        assert np.array_equal(opened(right[0]), large[row])


def test_every_image_says_in_words_what_it_is():
    sheet = ImageSheet(columns={"truth": noise(1, 4), "V2": noise(1, 4)}, rows=["cat"])
    assert [label for _, label, _ in sheet.cells[0]] == ["truth, cat", "V2, cat"]
    assert ImageSheet(columns={"V2": noise(2, 4)}).cells[1][0][1] == "V2, image 2"


@pytest.mark.parametrize(
    "sizes, width", [((32,), 96), ((32, 64), 128), ((32, 64, 128), 128), ((12, 24, 48), 96)]
)
def test_a_tile_is_a_whole_multiple_of_every_image(sizes, width):
    sheet = ImageSheet(columns={str(n): noise(1, n) for n in sizes})
    assert sheet.width == width


def test_sizes_without_a_common_multiple_near_the_tile_are_shown_at_the_tile():
    assert ImageSheet(columns={"a": noise(1, 31), "b": noise(1, 32)}).width == 96


def test_an_image_as_fine_as_its_tile_is_told_from_those_with_squares():
    (row,) = ImageSheet(columns={"a": noise(1, 32), "b": noise(1, 128)}).cells
    assert [fine for _, _, fine in row] == [False, True]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"columns": {}}, r"columns \(=\{\}\)"),
        ({"columns": {"a": noise(1, 4), "b": noise(2, 4)}}, "the same number of images"),
        ({"columns": {"a": noise(0, 4)}}, "at least one"),
        ({"columns": {"a": noise(2, 4)}, "rows": ["one"]}, "must be 2 titles"),
        ({"columns": {"a": noise(1, 4)}, "tile": 0}, r"tile \(=0\)"),
        ({"columns": {"a": noise(1, 4)}, "box": (0.5, 0, 0.2, 1)}, r"box \(=\(0.5, 0, 0.2, 1\)\)"),
    ],
)
def test_a_sheet_that_cannot_be_laid_out_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ImageSheet(**given)


def test_one_box_shows_the_same_part_at_every_resolution():
    coarse = noise(2, 8)
    fine = coarse.repeat(4, 1).repeat(4, 2)
    box = (0.25, 0.5, 0.75, 0.875)
    for small, large in zip(crop(coarse, box), crop(fine, box), strict=True):
        assert small.shape == (3, 4, 3)
        assert np.array_equal(small.repeat(4, 0).repeat(4, 1), large)


def test_a_crop_is_cut_from_its_own_place_and_the_whole_is_the_whole():
    image = noise(1, 8)
    assert np.array_equal(crop(image, (0.25, 0.5, 0.5, 1))[0], image[0, 4:8, 2:4])
    assert np.array_equal(crop(image, (0, 0, 1, 1))[0], image[0])


@pytest.mark.parametrize("box", [(0, 0, 0.01, 0.01), (0.99, 0.99, 1, 1), (0.49, 0.5, 0.51, 0.52)])
def test_a_crop_keeps_a_pixel_at_least(box):
    assert crop(noise(1, 8), box)[0].shape == (1, 1, 3)


@pytest.mark.parametrize("box", [(-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, 0, 0, 1), (0, 0.5, 1, 0.5)])
def test_a_box_outside_the_image_or_without_area_is_refused(box):
    with pytest.raises(ValueError, match="box .* must be left, top, right, bottom"):
        crop(noise(1, 8), box)


def test_more_is_brighter_on_a_map_and_what_is_beyond_has_the_colour_of_the_end():
    ramp = heat(np.linspace(0, 0.2, 32)[None], SCALE)[0].astype(float)
    luma = ramp @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) > 0).all()
    assert np.array_equal(heat(np.array([[-1.0, 9.0]]), SCALE), heat(np.array([[0.0, 0.2]]), SCALE))


def test_what_is_not_known_is_grey_on_a_map():
    shown = heat(np.array([[np.nan, 0.1]], np.float32), SCALE)
    assert (shown[0, 0] == BLANK).all() and len(np.unique(shown[0, 1])) > 1


def test_the_legend_has_the_colours_of_its_map():
    ends = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in heat(np.array([[0.0, 0.2]]), SCALE)[0]]
    assert [SCALE.stops[0], SCALE.stops[-1]] == ends


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_a_scale_that_does_not_rise_is_refused(low, high):
    with pytest.raises(ValueError, match="scale .* must rise"):
        Scale("x", low, high)
