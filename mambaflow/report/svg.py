"""A chart's SVG as part of an HTML page: harmless, in the page's colours, with names of its own."""

import re
from xml.etree import ElementTree

from markupsafe import Markup

from mambaflow.checks import require
from mambaflow.report.palette import SHADES, variable

SPACE, LINKS = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
# All that draws and cannot act: no script, no foreign HTML, no animation.
ELEMENTS = {
    "svg", "g", "defs", "clipPath", "path", "rect", "circle", "line", "polyline", "polygon",
    "ellipse", "use", "text", "tspan", "image", "title", "desc", "linearGradient", "stop",
}  # fmt: skip
# A whole page would obey a style sheet in one chart; `page.html.jinja` has what it says.
DROPPED = {"style", "metadata"}
COLOUR = re.compile("|".join(re.escape(shade.light) for shade in SHADES.values()))


def inline(svg: str, name: str, label: str) -> Markup:
    """The chart as an element of HTML, each of its units one pixel wide, or less where the page is
    narrow.

    Args:
        svg: a file, such as one of `figures`.
        name: what its names begin with: one page may hold many charts.
        label: what is read out in the chart's place.

    Raises:
        ValueError: not well-formed, not an SVG with a viewBox, or one that could run or load
            something.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(
            f"chart {label!r} (={svg[:40]!r}) must be a well-formed SVG ({error}); draw it by "
            "mambaflow.report.figures"
        ) from error
    box = root.get("viewBox", "").split()
    require(
        root.tag == f"{SPACE}svg" and len(box) == 4,
        f"chart {label!r} (={root.tag}) must be an svg with a viewBox; draw it by "
        "mambaflow.report.figures",
    )
    for element in list(root.iter()):  # a list: a walk does not bear that elements go
        _drop(element)
    for element in root.iter():
        _enter(element, name, label)
    for key in ("height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"width": f"{float(box[2]):g}", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def width(svg: str) -> float:
    """Pixels that the chart is wide, or 0 where it does not say."""
    found = re.search(r'viewBox="\S+ \S+ (\S+) ', svg)
    return float(found[1]) if found else 0.0


def _drop(element: ElementTree.Element) -> None:
    for child in list(element):
        if str(child.tag).removeprefix(SPACE) in DROPPED:
            element.remove(child)


def _enter(element: ElementTree.Element, name: str, label: str) -> None:
    """An element as HTML has it, without namespaces, its names and colours turned."""
    # HTML knows the elements of SVG by their bare names.
    element.tag = str(element.tag).removeprefix(SPACE)
    require(
        element.tag in ELEMENTS,
        f"chart {label!r} (<{element.tag}>) must hold nothing but drawing; take that element out",
    )
    own = {key.removeprefix(LINKS): value for key, value in element.attrib.items()}
    element.attrib.clear()
    for key, value in own.items():
        _require_harmless(key, value, label)
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = re.sub("^#", f"#{name}-", value)
        else:
            value = value.replace("url(#", f"url(#{name}-")
            value = COLOUR.sub(lambda found: variable(found[0]), value)
        element.set(key, value)


def _require_harmless(key: str, value: str, label: str) -> None:
    """Refuse what acts, and addresses of anything that is not in the file."""
    require(
        re.fullmatch(r"[A-Za-z][\w.-]*|\{http://www.w3.org/XML/1998/namespace\}space", key)
        is not None
        and not key.lower().startswith("on"),
        f"chart {label!r} ({key}={value[:40]!r}) must not act; take that attribute out",
    )
    far = key.lower() == "href" and not re.match(r"#|data:image/png;base64,", value)
    far |= re.search(r"url\((?!#)", value, re.IGNORECASE) is not None
    require(
        not far,
        f"chart {label!r} ({key}={value[:40]!r}) must load nothing from outside; put it inside",
    )
