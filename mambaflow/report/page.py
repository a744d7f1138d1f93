"""The page that a person reads: one HTML file that needs nothing else, no script and no network.

What stands on it comes in from outside as text, tables, charts and images. All text is escaped; in
it `code` and **strong** words are marked as here, and an empty line begins a paragraph.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mambaflow.checks import require
from mambaflow.report import svg
from mambaflow.report.figures import HALF
from mambaflow.report.palette import SHADES, Look, variable
from mambaflow.report.sheets import ImageSheet
from mambaflow.report.tables import Table

Best = Literal["highest", "lowest"] | int | float
NUMBER = re.compile(r"\s*([-+−]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Drawing:
    """A chart under its title; one that is wider than half a page has a row of its own."""

    svg: str
    """As `figures` draws it."""
    title: str
    caption: str = ""


@dataclass(frozen=True)
class RankedTable:
    """A table in which the best of a column is marked; equals, as they are shown, all are.

    Raises:
        ValueError: a heading that the table does not have.
    """

    table: Table
    best: Mapping[str, Best] = field(default_factory=dict)
    """Heading -> "highest", "lowest", or the number that the best is nearest to."""

    def __post_init__(self) -> None:
        for heading in self.best:
            require(
                heading in self.table.heading,
                f"best (={heading!r}) must be a heading of its table; it has: "
                f"{', '.join(self.table.heading)}",
            )

    @property
    def marked(self) -> set[tuple[int, int]]:
        """Row and column of each cell that is a best one; cells without a number are none."""
        found = set()
        for heading, best in self.best.items():
            column = list(self.table.heading).index(heading)
            numbers = {i: _number(row[column]) for i, row in enumerate(self.table.rows)}
            losses = {i: _loss(n, best) for i, n in numbers.items() if n is not None}
            found |= {(i, column) for i, x in losses.items() if x <= min(losses.values())}
        return found


def _number(cell: str) -> float | None:
    found = NUMBER.match(cell)
    return float(found[1].replace(",", "").replace("−", "-")) if found else None


def _loss(number: float, best: Best) -> float:
    if best == "highest":
        return -number
    # Ten digits: 0.95 and 1.05 are as near to 1, whatever is left over in the last bits.
    return number if best == "lowest" else round(abs(number - float(best)), 10)


Block = Drawing | RankedTable | Table | ImageSheet


@dataclass(frozen=True)
class Section:
    """One question: what is seen, what would be right, and the blocks that show it.

    Raises:
        ValueError: no title, or a table without a caption.
    """

    title: str
    text: str
    blocks: Sequence[Block]
    right: str = ""
    """What a perfect model would show here."""

    def __post_init__(self) -> None:
        require(bool(self.title.strip()), "title (='') of a section must not be empty; ask it")
        for block in self.blocks:
            table = block.table if isinstance(block, RankedTable) else block
            if isinstance(table, Table):
                require(
                    bool(table.caption.strip()),
                    f"caption (='') of the table in {self.title!r} must say where its numbers are "
                    "from; use mambaflow.report.tables.provenance",
                )


@dataclass(frozen=True)
class KeyNumber:
    """A number that answers the page's question, shown large."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Raises:
        ValueError: no title, no summary, no section, or two sections of one title.
    """

    title: str
    summary: str
    """Two sentences, with the answer in numbers."""
    sections: Sequence[Section]
    numbers: Sequence[KeyNumber] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """What was measured, on what, by which command, when."""
    looks: Mapping[str, Look] = field(default_factory=dict)
    """Series -> its look in the charts (`palette.looks`): a row of that name in a table has the
    same colour before it."""

    def __post_init__(self) -> None:
        for name, text in (("title", self.title), ("summary", self.summary)):
            require(bool(text.strip()), f"{name} (='') of a page must not be empty; write it")
        titles = [section.title for section in self.sections]
        require(
            len(titles) > 0 and len(set(titles)) == len(titles),
            f"sections (={titles}) must be one or more, each with a title of its own",
        )


def render(page: Page) -> str:
    """The page as HTML. Equal pages give equal text; a date is there only if it came in.

    Raises:
        ValueError: a chart that is not a harmless SVG.
    """
    shown = [
        [_shown(block, f"c{s}-{b}") for b, block in enumerate(section.blocks, 1)]
        for s, section in enumerate(page.sections, 1)
    ]
    template = _environment().get_template("page.html.jinja")
    return template.render(page=page, shown=shown, shades=SHADES) + "\n"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mambaflow.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"marked": _marked, "prose": _prose, "cell": _cell, "shade": variable}
    return environment


def _shown(block: Block, name: str) -> dict[str, object]:
    """What the template needs of a block: its kind, and what it cannot work out by itself."""
    if isinstance(block, Drawing):
        wide = svg.width(block.svg) > HALF
        chart = svg.inline(block.svg, name, block.title)
        return {"kind": "drawing", "block": block, "svg": chart, "wide": wide}
    if isinstance(block, ImageSheet):
        across = (len(block.columns) + bool(block.rows)) * (block.width + 10)
        return {"kind": "sheet", "block": block, "wide": across > HALF}
    ranked = block if isinstance(block, RankedTable) else RankedTable(block)
    return {"kind": "table", "table": ranked.table, "marked": ranked.marked}


def _marked(text: str) -> Markup:
    """Text with `code` and **strong** words; the rest as it is, escaped."""
    # A sign stays with its number at the end of a line.
    safe = str(escape(text)).replace("± ", "±\N{NO-BREAK SPACE}")
    # Code first, and what is in it left alone: a command may hold asterisks.
    parts = re.split(r"`([^`\n]+)`", safe)
    for i, part in enumerate(parts):
        strong = re.sub(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"<strong>\1</strong>", part)
        parts[i] = f"<code>{part}</code>" if i % 2 else strong
    return Markup("".join(parts))  # noqa: S704


def _prose(text: str) -> Markup:
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part]
    return Markup("\n").join(Markup("<p>{}</p>").format(_marked(part)) for part in paragraphs)


def _cell(text: str) -> Markup:
    """A number with its standard error set back, so that the eye runs down the numbers."""
    number, sign, error = text.partition(" ± ")
    shown = Markup("<span>{}</span>").format(number)
    return shown + Markup('<span class="error">± {}</span>').format(error) if sign else shown
