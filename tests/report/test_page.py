import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mambaflow.report import svg
from mambaflow.report.figures import (
    Bar,
    Bins,
    Difference,
    Point,
    bars,
    calibration,
    curves,
    scatter,
)
from mambaflow.report.figures import differences as gains
from mambaflow.report.page import (
    Drawing,
    KeyNumber,
    Page,
    RankedTable,
    Section,
    render,
)
from mambaflow.report.palette import SHADES, looks
from mambaflow.report.sheets import ImageSheet, Scale, heat
from mambaflow.report.tables import Table

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert('1')>",
    "' style='background:url(http://example.org/x)",
    "</style></svg></title><iframe>",
    "{{ page }} {% raw %} &lt;b&gt; &amp;",
    "Größe “κ” 猫 \u202e",
]
SPACE = "http://www.w3.org/2000/svg"
# Elements that HTML never closes.
VOID = {"meta", "img"}
CHART = re.compile("<svg.*?</svg>", re.DOTALL)


def whole(name="V2"):
    """A page with every kind of block, the name in every place that takes one."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    scale = Scale(name, 0, 1)
    table = Table(["method", name], [[name, "1.0 ± 0.1"], ["other", name]], name)
    bins = Bins(np.array([0.1, 0.2]), np.array([0.1, 0.3]), np.array([5, 7]))
    blocks = [
        Drawing(curves({name: [Point(1, 2.0)], "b": [Point(2, 1.0)]}, name, name), name, name),
        Drawing(bars({name: [Bar(1.0)], "b": [Bar(2.0)]}, [name], name, right={name: 1}), name),
        Drawing(gains({name: Difference(value=1, error=0.1, unit=name)}, name, "b"), name),
        Drawing(calibration({name: bins}, name), name, name),
        Drawing(scatter({name: [Point(1, 2.0)], "b": [Point(2, 1.0)]}, name, name), name, name),
        RankedTable(table, {name: "highest"}),
        table,
        ImageSheet(
            columns={name: images, "map": [heat(i[..., 0] / 255, scale) for i in images]},
            title=name, rows=[name, "b"], caption=name, box=(0.25, 0.25, 0.5, 0.5), scale=scale,
        ),
    ]  # fmt: skip
    return Page(
        name,
        name,
        [Section(name, name, blocks, right=name), Section("b", "b", [])],
        numbers=[KeyNumber(name, name, name)],
        facts={name: name},
        looks=looks({name: "V2"}),
    )


class Read(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and the words."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words, self._open = [], [], []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def tags(self):
        return [tag for tag, _ in self.elements]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font has no such letter, a page's may
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_wherever_it_stands(name):
    html = render(whole(name))
    # A chart's ticks are elements, and as many as have room beside the name.
    outside = [Read(CHART.sub("", page)).tags for page in (html, render(whole()))]
    assert outside[0] == outside[1]
    found = Read(html)
    assert set(found.tags) <= set(outside[1]) | {element.lower() for element in svg.ELEMENTS}
    for _, attributes in found.elements:
        assert not [key for key in attributes if key.startswith("on")]
    text = " ".join(found.words)
    assert text.count(name) >= 15 and {"alt", "aria-label"} <= {
        key
        for _, attributes in found.elements
        for key, value in attributes.items()
        if name in value
    }


def test_a_page_needs_nothing_that_is_not_in_it():
    html = render(whole())
    found = Read(html)
    assert not {"script", "link", "iframe", "object", "base"} & set(found.tags)
    for _, attributes in found.elements:
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            assert re.match(r"#|data:image/png;base64,|$", attributes.get(key) or "")
    for inside in re.findall(r"url\((.{0,8})", html):
        assert inside.startswith(("#", "data:"))
    assert "@import" not in html and "@font-face" not in html
    assert "http:" not in html and "https:" not in html


def test_every_chart_is_well_formed_and_every_image_a_png():
    html = render(whole())
    charts = CHART.findall(html)
    assert len(charts) == 5
    for chart in charts:
        assert ElementTree.fromstring(chart).tag == "svg"
    images = re.findall(r"data:image/png;base64,([^\"]*)", html)
    assert len(images) == 4
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode(image, validate=True))).size == (8, 8)


def test_names_inside_charts_are_the_charts_own():
    html = render(whole())
    names = re.findall(r' id="([^"]+)"', html)
    assert len(set(names)) == len(names)
    aims = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert set(aims) <= set(names) and len(aims) > 10


def test_equal_pages_are_equal_to_the_byte():
    assert render(whole()) == render(whole()) != render(whole("V3"))


def test_a_page_says_all_that_it_was_given():
    page = Page(
        "The title",
        "First sentence. **23.06 dB** here.",
        [
            Section("Question one", "What is seen.", [Table(["a", "b"], [["r", "1"]], "from `x`")],
                    right="what is right"),
            Section("Question two", "More.", []),
        ],
        numbers=[KeyNumber("+2 dB", "PSNR", "a note ± 0.1")],
        facts={"masks": "d5b9"},
    )  # fmt: skip
    html = render(page)
    found = Read(html)
    text = re.sub(r"\s+", " ", " ".join(found.words))
    for words in ("The title", "First sentence.", "Question one", "What is seen.", "what is right",
                  "+2 dB", "PSNR", "a note ± 0.1", "masks", "d5b9", "Question two"):  # fmt: skip
        assert words in text, words
    assert "<strong>23.06 dB</strong>" in html and "<code>x</code>" in html
    contents = [a["href"] for a in found.all("a")]
    assert contents == ["#section-1", "#section-2", "#facts"]
    assert {aim[1:] for aim in contents} <= {a.get("id") for _, a in found.elements}


def test_what_is_marked_as_code_is_left_as_it_is():
    html = render(Page("t", "`a **b** <c>` and 2 ** 3 ** 4, `open", [Section("s", "", [])]))
    assert "<code>a **b** &lt;c&gt;</code> and 2 ** 3 ** 4, `open" in html


def test_an_empty_line_begins_a_paragraph():
    html = render(Page("t", "one\n\ntwo\nthree", [Section("s", "", [])]))
    assert "<p>one</p>\n<p>two\nthree</p>" in html


def shown(table, best, **more):
    block = RankedTable(table, best)
    return render(Page("t", "s", [Section("q", "", [block])], **more))


def marked(html):
    return re.findall(r'<td class="best"><span>(.*?)</span>', html)


@pytest.mark.parametrize(
    "best, expected",
    [
        ("highest", ["1,204.5"]),
        ("lowest", ["−3"]),
        (1, ["0.9 ", "1.1"]),
        (0.95, ["0.9 "]),
    ],
)
def test_the_best_of_a_column_is_marked_and_cells_without_a_number_are_none(best, expected):
    cells = ["0.9 ± 0.2", "1.1", "−3", "", "none", "1,204.5"]
    table = Table(["method", "score"], [[str(i), cell] for i, cell in enumerate(cells)], "from x")
    assert marked(shown(table, {"score": best})) == [e.strip() for e in expected]


def test_a_column_without_numbers_has_no_best():
    table = Table(["method", "score"], [["a", ""], ["b", "none"]], "from x")
    html = shown(table, {"score": "highest"})
    assert marked(html) == [] and "the best of its column" not in html


def test_a_table_shows_its_caption_and_what_marks_mean():
    html = shown(Table(["m", "x"], [["a", "1"]], "`cmd`; data d"), {"x": "highest"})
    assert "<code>cmd</code>; data d" in html and "the best of its column" in html


def test_a_model_has_the_colour_of_its_charts_in_a_table():
    table = Table(["m", "x"], [["V2", "1"], ["other", "2"]], "from x")
    html = shown(table, {}, looks=looks({"V1": "V1", "V2": "V2"}))
    assert re.findall(r'class="dot" style="background:(.*?)"></span>(\w+)', html) == [
        ("var(--vermilion)", "V2")
    ]


def test_a_chart_has_the_colours_of_the_page_in_light_and_dark():
    chart = curves({"V2": [Point(1, 2)]}, "x", "y")
    inside = svg.inline(chart, "a", "label")
    assert SHADES["blue"].light in chart and "var(--blue)" in inside
    assert not [shade for shade in SHADES.values() if shade.light in inside]
    html = render(whole())
    for name, (light, dark) in SHADES.items():
        assert f"--{name}: {light};" in html and f"--{name}: {dark};" in html


def test_a_chart_as_wide_as_a_page_has_a_row_of_its_own():
    def row(wide):
        drawing = Drawing(curves({"V2": [Point(1, 2)]}, "x", "y", wide=wide), "t")
        return Read(render(Page("t", "s", [Section("q", "", [drawing])]))).all("figure")

    assert row(True) == [{"class": "wide"}] and row(False) == [{}]


def picture(inside="", attributes='viewBox="0 0 10 10"'):
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg xmlns="{SPACE}" {links} {attributes}>{inside}</svg>'


@pytest.mark.parametrize(
    "chart, message",
    [
        ("<svg", "well-formed"),
        ("", "well-formed"),
        (f'<g xmlns="{SPACE}" viewBox="0 0 1 1"/>', "must be an svg with a viewBox"),
        (picture(attributes=""), "must be an svg with a viewBox"),
        (picture("<script>alert(1)</script>"), "<script>"),
        (picture("<foreignObject/>"), "<foreignObject>"),
        (picture('<b xmlns="http://www.w3.org/1999/xhtml"/>'), "must hold nothing but drawing"),
        (picture('<g onclick="alert(1)"/>'), "onclick=.* must not act"),
        (picture('<use href="http://example.org/x.svg"/>'), "must load nothing from outside"),
        (picture('<use xlink:href="javascript:alert(1)"/>'), "must load nothing from outside"),
        (picture('<g style="fill: URL( http://example.org )"/>'), "must load nothing"),
        (picture('<image href="data:text/html,x"/>'), "must load nothing from outside"),
    ],
)
def test_a_chart_that_could_act_or_load_is_refused(chart, message):
    with pytest.raises(ValueError, match=message):
        render(Page("t", "s", [Section("q", "", [Drawing(chart, "title")])]))


def test_style_sheets_of_a_chart_do_not_reach_the_page():
    inside = svg.inline(picture("<defs><style>* {fill: red}</style></defs>"), "a", "label")
    assert "style" not in inside and "red" not in inside


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Page("", "s", [Section("q", "", [])]), r"title \(=''\)"),
        (lambda: Page("t", " ", [Section("q", "", [])]), r"summary \(=''\)"),
        (lambda: Page("t", "s", []), r"sections \(=\[\]\)"),
        (lambda: Page("t", "s", [Section("q", "", [])] * 2), "a title of its own"),
        (lambda: Section("", "", []), "title .* of a section"),
        (lambda: Section("q", "", [Table(["a"], [["1"]])]), "caption .* of the table in 'q'"),
        (lambda: Section("q", "", [RankedTable(Table(["a"], [["1"]]))]), "use .*provenance"),
        (lambda: RankedTable(Table(["a"], [["1"]]), {"b": "highest"}), "it has: a"),
    ],
)
def test_a_page_that_lacks_what_a_reader_needs_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
