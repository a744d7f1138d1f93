import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from mambaflow.report.figures import (
    Bar,
    Bins,
    Difference,
    Point,
    bars,
    calibration,
    curves,
    differences,
    scatter,
)
from mambaflow.report.palette import GREY, HUES, SHADES, looks, variable

SVG = "{http://www.w3.org/2000/svg}"
BLUE, VERMILION = SHADES["blue"].light, SHADES["vermilion"].light
HOSTILE = ['<script>alert("1")</script>', "a & b", "$x_1^2$", "Größe “κ” 猫", "it's", r"\frac{1}"]


def bins(predicted, observed, counts):
    return Bins(np.array(predicted, float), np.array(observed, float), np.array(counts))


# A chart of each kind; the name stands in each of them.
CHARTS = {
    "curves": lambda name: curves(
        {name: [Point(1, 2.0, 0.1), Point(10, 3.0)], "other": [Point(1, 1.0)]},
        name, name, right={name: 2.5}, behind=[[Point(1, 0), Point(5, 1)]], upright=[5], log_x=True,
    ),
    "scatter": lambda name: scatter(
        {name: [Point(1, 2.0, 0.1), Point(10, 3.0)], "other": [Point(1, 1.0)]},
        name, name, front=[Point(1, 2.0), Point(10, 3.0)], log_x=True,
    ),
    "bars": lambda name: bars(
        {name: [Bar(1.2, 0.1), Bar(0.5)], "other": [Bar(1.0), Bar(-0.2)]},
        [name, "second"], name, x=name, right={name: 1},
    ),
    "differences": lambda name: differences(
        {name: Difference(value=0.3, error=0.1, unit=name)}, name, "other"
    ),
    "calibration": lambda name: calibration(
        {name: bins([0.1, 0.2], [0.1, 0.3], [5, 7]), "other": bins([0.1], [0.2], [3])}, name
    ),
}  # fmt: skip


def words(chart):
    """What one reads, line by line."""
    return ["".join(text.itertext()) for text in ElementTree.fromstring(chart).iter(f"{SVG}text")]


def marks(chart, colour):
    """Places of the marks of one colour inside the axes, in the order of drawing."""
    root = ElementTree.fromstring(chart)
    (axes,) = (group for group in root.iter(f"{SVG}g") if group.get("id") == "axes_1")
    found = [u for u in axes.iter(f"{SVG}use") if f"fill: {colour}" in (u.get("style") or "")]
    return np.array([(float(u.get("x")), float(u.get("y"))) for u in found])


def shapes(chart, style):
    """The corners of each path that is drawn in that style, in the order of drawing."""
    paths = ElementTree.fromstring(chart).iter(f"{SVG}path")
    drawn = [p.get("d") for p in paths if style in (p.get("style") or "")]
    return [np.array(re.findall(r"-?\d+\.?\d*", d), float).reshape(-1, 2) for d in drawn]


@pytest.mark.parametrize("kind", CHARTS)
def test_equal_numbers_give_equal_bytes_and_these_are_an_svg_of_text(kind):
    chart = CHARTS[kind]("V2")
    assert chart == CHARTS[kind]("V2") != CHARTS[kind]("V3")
    assert ElementTree.fromstring(chart).tag == f"{SVG}svg"
    assert "V2" in " ".join(words(chart)) and "<dc:date>" not in chart


def test_another_process_gives_the_same_bytes():
    code = (
        "from mambaflow.report.figures import *; import sys;"
        "chart = curves({'a': [Point(1, 2.0)], 'b': [Point(2, 1.0)]}, 'x', 'y', right={'r': 1});"
        "sys.stdout.write(chart)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = {"a": [Point(1, 2.0)], "b": [Point(2, 1.0)]}
    assert done.stdout == curves(lines, "x", "y", right={"r": 1})


def test_charts_drawn_at_once_are_those_drawn_one_after_another():
    jobs = [(kind, f"V{i}") for i in range(3) for kind in CHARTS]
    alone = [CHARTS[kind](name) for kind, name in jobs]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda job: CHARTS[job[0]](job[1]), jobs)) == alone


@pytest.mark.parametrize("kind", CHARTS)
def test_a_users_settings_are_neither_heard_nor_changed(kind):
    chart = CHARTS[kind]("V2")
    # Some that a chart sets for itself, and some that it must not take over.
    own = {"font.size": 30, "svg.hashsalt": None, "lines.marker": "x", "savefig.bbox": "tight"}
    with mpl.rc_context(own | {"patch.linewidth": 9, "axes.grid.axis": "x"}):
        before = dict(mpl.rcParams)
        assert CHARTS[kind]("V2") == chart
        assert dict(mpl.rcParams) == before


@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font has no such letter, a page's may
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", CHARTS)
def test_a_name_is_shown_as_it_is_whatever_is_in_it(kind, name):
    assert name in " ".join(words(CHARTS[kind](name)))


def test_a_mark_stands_where_its_numbers_say():
    places = marks(curves({"V2": [Point(4, 9), Point(0, 1), Point(1, 3)]}, "x", "y"), BLUE)
    across, up = np.diff(places, axis=0).T
    assert np.isclose(across[1], 3 * across[0]) and across[0] > 0, "by x, whatever their order"
    assert np.isclose(up[1], 3 * up[0]) and up[0] < 0, "SVG counts downward"


def test_decades_are_as_far_apart_as_one_another_on_a_logarithmic_axis():
    points = [Point(x, 0) for x in (1, 10, 100)]
    first, second = np.diff(marks(curves({"V2": points}, "x", "y", log_x=True), BLUE)[:, 0])
    assert np.isclose(first, second)


def lines(chart, style):
    """The corners of each line inside the axes that is drawn in that style."""
    return [corners for corners in shapes(chart, style) if len(corners) > 1]


def test_lines_behind_are_grey_without_a_name_and_end_in_a_mark():
    ahead = {"V2": [Point(0, 0), Point(4, 4)]}
    behind = [[Point(2, 1), Point(0, 0)], [Point(0, 0), Point(1, 3), Point(4, 2)]]
    chart = curves(ahead, "x", "y", behind=behind)
    (first, _), (last, top) = marks(chart, BLUE)
    unit = (last - first) / 4
    (low, bottom), (far, height) = marks(chart, GREY)[-2:]  # after the ticks
    assert np.allclose([low - first, far - first], [2 * unit, 4 * unit], atol=1e-4)
    assert top < height < bottom, "of 4, 2 and 1 dB; SVG counts downward"
    one, other = lines(chart, f"stroke: {GREY}; stroke-opacity: 0.6")
    assert (len(one), len(other)) == (2, 3) and one[0, 0] < one[1, 0], "by x, whatever their order"
    assert not [word for word in words(chart) if word not in "xy" and not word[0].isdigit()]


def test_upright_lines_stand_at_their_x():
    chart = curves({"V2": [Point(0, 0), Point(4, 4)]}, "x", "y", upright=[1, 2])
    first, last = marks(chart, BLUE)[:, 0]
    dashed = lines(
        chart, f"fill: none; stroke-dasharray: 2,3; stroke-dashoffset: 0; stroke: {GREY}"
    )
    assert len(dashed) == 2
    for line, x in zip(dashed, (1, 2), strict=True):
        assert np.allclose(line[:, 0], first + x * (last - first) / 4, atol=1e-4)


def test_points_that_are_not_joined_stand_where_their_numbers_say():
    chart = scatter({"V2": [Point(4, 9), Point(0, 1), Point(1, 3)]}, "x", "y")
    across, up = np.diff(marks(chart, BLUE), axis=0).T
    assert np.isclose(across[0], -4 * across[1]) and np.isclose(up[0], -4 * up[1])
    assert not lines(chart, f"stroke: {BLUE}; stroke-width: 2")


def test_a_front_is_a_staircase_that_rises_where_it_costs_more():
    points = [Point(1, 1), Point(4, 5), Point(2, 3)]
    chart = scatter({"V2": points}, "x", "y", front=points)
    (stairs,) = lines(chart, f"fill: none; stroke: {GREY}; stroke-width: 1.2")
    cheap, dear, middle = marks(chart, BLUE)
    corners = [cheap, (middle[0], cheap[1]), middle, (dear[0], middle[1]), dear]
    assert np.allclose(stairs, corners, atol=1e-4)


@pytest.mark.parametrize("log, xs", [(True, (0.2, 3.7)), (True, (1.1, 1.3)), (False, (0, 7))])
def test_points_that_lie_anyhow_have_ticks_at_round_numbers(log, xs):
    chart = scatter({"V2": [Point(x, 0) for x in xs]}, "x", "y", log_x=log)
    ticks = [float(word) for word in words(chart) if re.fullmatch(r"\d+\.?\d*", word)]
    within = {tick for tick in ticks if xs[0] <= tick <= xs[1]}
    assert len(within) >= 3


def test_names_under_bars_are_broken_only_where_there_is_no_room():
    name = "cross_attention (3)"
    for count, lines in ((2, 1), (6, 2)):
        groups = [name, *"abcde"][:count]
        chart = bars({"V2": [Bar(1.0)] * count}, groups, "y")
        assert (name in words(chart)) == (lines == 1)


def test_figures_of_one_reach_have_one_scale():
    def height(value):
        chart = bars({"V2": [Bar(value)]}, ["a"], "y", reach=(-1, 4))
        (bar,) = shapes(chart, f"fill: {BLUE}")
        return np.ptp(bar[:, 1])

    assert np.isclose(height(3.0), 3 * height(1.0), atol=1e-3)


def test_ticks_stand_where_something_was_measured():
    measured = {"V2": [Point(x, 7) for x in (1, 2, 4, 50, 16384)]}
    ticks = [word for word in words(curves(measured, "x", "y", log_x=True)) if word[0] != "7"]
    # 2 would touch 1 where 16,384 is to be shown too.
    assert ticks[:4] == ["1", "4", "50", "16,384"]


def test_an_error_bar_reaches_one_standard_error_to_either_side():
    chart = curves({"V2": [Point(0, 0), Point(1, 4, 2.0)]}, "x", "y")
    low, high = marks(chart, BLUE)[:, 1]
    (bar,) = shapes(chart, f"stroke: {BLUE}; stroke-width: 1.3")
    unit = (low - high) / 4
    # SVG counts downward; coordinates have six decimals.
    assert np.allclose(np.sort(bar[:, 1]), [high - 2 * unit, high + 2 * unit], atol=1e-4)


def test_names_of_lines_that_are_close_do_not_lie_on_one_another():
    right = {"first of three": 1.0, "the second of them": 1.001, "third": 1.002, "far": 5}
    chart = curves({"V2": [Point(0, 0), Point(1, 5)]}, "x", "y", right=right)
    texts = ElementTree.fromstring(chart).iter(f"{SVG}text")
    places = {"".join(t.itertext()): t for t in texts}
    heights = []
    for name in ("first of three", "the second of them", "third"):
        turned = re.search(r"translate\(\S+ (\S+)\)", places[name].get("transform", ""))
        heights.append(float(turned[1] if turned else places[name].get("y")))
    assert all(above - below >= 12.5 for below, above in itertools.pairwise(heights[::-1]))


def test_a_bar_is_as_high_as_its_number_and_stands_on_zero():
    chart = bars({"V2": [Bar(1.0), Bar(3.0), Bar(-2.0)]}, ["a", "b", "c"], "y")
    one, three, minus = ((s[:, 1].min(), s[:, 1].max()) for s in shapes(chart, f"fill: {BLUE}"))
    assert np.isclose(three[1] - three[0], 3 * (one[1] - one[0]), atol=1e-4)
    assert np.isclose(minus[1] - minus[0], 2 * (one[1] - one[0]), atol=1e-4)
    assert np.isclose(one[1], three[1]) and np.isclose(one[1], minus[0]), "one foot for all"


@pytest.mark.parametrize("higher", [True, False])
def test_the_better_model_is_right_of_the_line_in_its_own_colour(higher):
    gain = {"value": 2.0 if higher else -2.0, "error": 0.1, "higher_is_better": higher}
    loss = gain | {"value": -gain["value"]}
    rows = {"gain": Difference(**gain), "loss": Difference(**loss)}
    chart = differences(rows, "V2", "V1")
    (right,), (left,) = marks(chart, BLUE), marks(chart, VERMILION)
    assert right[0] > left[0] and right[1] < left[1], "the first row is above"
    assert ("+2.00 ± 0.10" if higher else "−2.00 ± 0.10") in words(chart)


@pytest.mark.parametrize("value, is_told_apart", [(0.2, True), (0.19, False), (0.0, False)])
def test_a_difference_within_196_standard_errors_is_no_models(value, is_told_apart):
    row = Difference(value=value, error=0.1)
    chart = differences({"PSNR": row}, "V2", "V1")
    assert len(marks(chart, BLUE)) == is_told_apart
    assert not len(marks(chart, VERMILION))


def test_a_model_that_errs_as_it_says_lies_on_the_diagonal():
    chart = calibration({"V2": bins([0.1, 0.2, 0.4], [0.1, 0.2, 0.4], [1, 1, 1])})
    found = [(s.min(0) + s.max(0)) / 2 for s in shapes(chart, f"fill: {BLUE}; stroke")]
    across, up = np.diff(found[:3], axis=0).T
    assert np.allclose(across, -up, atol=1e-4) and np.isclose(across[1], 2 * across[0])


def test_the_area_of_a_mark_grows_with_its_pixels():
    chart = calibration({"V2": bins([0.1, 0.2, 0.4], [0.1, 0.2, 0.3], [10, 1000, 400])})
    few, most, some = (np.ptp(s[:, 0]) for s in shapes(chart, f"fill: {BLUE}; stroke")[:3])
    assert few < some < most


def test_bins_without_pixels_are_left_out():
    full = bins([0.1, 0.2], [0.1, 0.3], [5, 7])
    empty = bins([0.1, 0.2, np.nan], [0.1, 0.3, np.nan], [5, 7, 0])
    assert calibration({"V2": full}) == calibration({"V2": empty})


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: curves({}, "x", "y"), "lines .* must not be empty"),
        (lambda: curves({"V2": []}, "x", "y"), "'V2' .* must not be empty"),
        (lambda: curves({"V2": [Point(1, np.nan)]}, "x", "y"), r"'V2' \(=nan\) must be finite"),
        (lambda: curves({"V2": [Point(1, 2, -1)]}, "x", "y"), "must not have an error"),
        (lambda: curves({"V2": [Point(1, 2)]}, "x", "y", right={"r": np.inf}), "must be finite"),
        (lambda: curves({"V2": [Point(0, 2)]}, "x", "y", log_x=True), "must have x > 0"),
        (lambda: curves({"V2": [Point(0, 2)]}, "x", "y", styles=looks({"V1": ""})), "valid: V1"),
        (lambda: curves({"V2": [Point(1, 2)]}, "x", "y", behind=[[]]), "behind.* not be empty"),
        (
            lambda: curves({"V2": [Point(1, 2)]}, "x", "y", behind=[[Point(1, np.nan)]]),
            "line behind .* must be finite",
        ),
        (lambda: curves({"V2": [Point(1, 2)]}, "x", "y", upright=[np.inf]), "must be finite"),
        (lambda: scatter({}, "x", "y"), "series .* must not be empty"),
        (lambda: scatter({"V2": []}, "x", "y"), "'V2' .* must not be empty"),
        (lambda: scatter({"V2": [Point(1, np.nan)]}, "x", "y"), "'V2' .* must be finite"),
        (lambda: scatter({"V2": [Point(1, 2, -1)]}, "x", "y"), "must not have an error"),
        (
            lambda: scatter({"V2": [Point(1, 2)]}, "x", "y", front=[Point(np.inf, 1)]),
            "'front' .* must be finite",
        ),
        (lambda: scatter({"V2": [Point(0, 2)]}, "x", "y", log_x=True), "must have x > 0"),
        (lambda: bars({"V2": [Bar(1)]}, ["a"], "y", reach=(1, 1)), r"reach .* must rise"),
        (lambda: bars({"V2": [Bar(1)]}, ["a", "b"], "y"), "must have 2, one for each"),
        (lambda: bars({"V2": []}, [], "y"), "must not be empty"),
        (lambda: differences({}, "V2", "V1"), "must not be empty"),
        (
            lambda: differences({"a": Difference(value=np.inf, error=0)}, "V2", "V1"),
            "'a' .* must be finite",
        ),
        (lambda: calibration({"V2": bins([1], [1], [0])}), "'V2' .* must not be empty"),
        (lambda: calibration({"V2": bins([1], [-1], [2])}), "must not have an error"),
        (lambda: looks({str(i): str(i) for i in range(6)}), "must be 5 or fewer"),
        (lambda: looks({str(i): "V2" for i in range(7)}), "must be 6 or fewer"),
    ],
)
def test_bad_input_is_refused_with_value_and_cure(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_model_has_one_colour_and_each_of_its_series_a_look_of_its_own():
    found = looks({"V2 Heun": "V2", "V1": "V1", "V2 mean": "V2", "linear": "", "nearest": ""})
    assert found["V2 Heun"].colour == found["V2 mean"].colour == BLUE
    assert found["V1"].colour == VERMILION
    assert found["linear"].colour == found["nearest"].colour == GREY
    assert len(set(found.values())) == len(found)


def test_a_chart_wears_the_looks_of_its_page():
    page = looks({"V1": "V1", "V2": "V2"})
    chart = curves({"V2": [Point(0, 1)]}, "x", "y", styles=page)
    assert len(marks(chart, VERMILION)) == 1 and not len(marks(chart, BLUE))


def test_a_shade_is_a_variable_of_the_page_and_other_colours_stay():
    assert variable(BLUE) == "var(--blue)" and variable("#123456") == "#123456"


# Machado, Oliveira, Fernandes (2009), table 1, severity 1: linear colours as such eyes have them.
EYES = {
    "normal": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                  [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                    [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def linear(colour):
    share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def seen(colour, eyes):
    """CIELAB of a colour as those eyes have it."""
    light = (np.array(eyes) @ linear(colour)).clip(0, 1)
    return rgb2lab(np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("side", ["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_models_differ_to_eyes_that_confuse_red_with_green(side, eyes):
    colours = [seen(getattr(SHADES[name], side), EYES[eyes]) for name in (*HUES, "grey")]
    # 2.3 is just noticed (Mahy, 1994), for fields that touch; lines lie apart.
    assert min(deltaE_ciede2000(a, b) for a, b in itertools.combinations(colours, 2)) > 12


@pytest.mark.parametrize("side", ["light", "dark"])
@pytest.mark.parametrize("name, least", [("ink", 7), ("grey", 4.5), *((hue, 3) for hue in HUES)])
def test_words_and_lines_stand_out_from_their_ground(side, name, least):
    # WCAG 2.2: 4.5 to 1 for words (7: enhanced), 3 for what is drawn.
    luminance = [
        float(linear(getattr(SHADES[n], side)) @ [0.2126, 0.7152, 0.0722]) for n in (name, "paper")
    ]
    assert (max(luminance) + 0.05) / (min(luminance) + 0.05) >= least
