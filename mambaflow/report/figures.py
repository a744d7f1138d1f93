"""Charts of plain numbers as SVG: curves, points, bars, paired differences, calibration.

A chart carries no title, which belongs to the page: there it wraps, and can be found. Text stays
text, so that it takes the page's font, and colours are those of `palette`, so that the page can
turn them for dark ground. The ground is transparent. Equal numbers give equal bytes.
"""

import io
import math
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy import ndarray

from mambaflow.checks import lookup, require
from mambaflow.report.palette import GREY, INK, PAPER, RULE, Look, looks

Number = int | float
# Widths in pixels of a page: two figures in a row, or one alone; that is as wide as a page of 800,
# where a wider one would shrink and its words with it.
HALF, WIDE = 520, 752
UNITS = 72  # of an SVG by matplotlib, to the inch; a page shows each as one pixel
FONT = 12.5
# A tick's number without an exponent or an offset, and with a true minus.
PLAIN = FuncFormatter(lambda value, _: _plain(value))
# Matplotlib's settings are one dict for the whole process.
LOCK = threading.Lock()
STYLE: Any = {  # of matplotlib's own keys, which its types list
    "svg.fonttype": "none",
    # Names of clips and markers are hashes with this in them; by default it is drawn at random.
    "svg.hashsalt": "mambaflow",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.unicode_minus": True,
    "font.size": FONT,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.labelsize": FONT,
    "axes.titlesize": FONT,
    "axes.titlelocation": "left",
    "axes.titlecolor": GREY,
    "axes.titlepad": 10,
    "axes.labelpad": 8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 4,
    "ytick.major.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.columnspacing": 1.6,
    "legend.handlelength": 2.4,
    "legend.labelspacing": 0.35,
}


class Point(NamedTuple):
    """A measurement: where, what, and its standard error where there is one."""

    x: Number
    y: Number
    error: Number | None = None


class Bar(NamedTuple):
    """The height of a bar, and its standard error where there is one."""

    value: Number
    error: Number | None = None


class Bins(NamedTuple):
    """Pixels binned by the deviation that was predicted for them."""

    predicted: Float[ndarray, " bins"]
    """Root mean square of the predicted standard deviations."""
    observed: Float[ndarray, " bins"]
    """Root mean square of the errors, in the same unit."""
    counts: Int[ndarray, " bins"]
    """Pixels in each bin; a bin of none is left out."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference of two models in one metric: the first's mean minus the second's."""

    value: Number
    error: Number
    """Standard error of the mean of the paired differences."""
    unit: str = ""
    decimals: int = 2
    higher_is_better: bool = True

    def __str__(self) -> str:
        text = f"{self.value:+.{self.decimals}f} ± {self.error:.{self.decimals}f}"
        return f"{text} {self.unit}".rstrip().replace("-", "−")

    @property
    def gain(self) -> Number:
        """The difference, above 0 where the first is better."""
        return self.value if self.higher_is_better else -self.value


def curves(
    lines: Mapping[str, Sequence[Point]],
    x: str,
    y: str,
    *,
    right: Mapping[str, Number] | None = None,
    behind: Sequence[Sequence[Point]] = (),
    upright: Sequence[Number] = (),
    log_x: bool = False,
    styles: Mapping[str, Look] | None = None,
    wide: bool = False,
) -> str:
    """Lines with error bars, such as PSNR against the number of calls.

    Args:
        lines: name -> its points, in any order.
        x: label of the axis, with its unit.
        y: label of the axis, with its unit.
        right: label -> height of a dashed line, such as the value that is right.
        behind: more lines, grey and without names, each with a mark at its end.
        upright: where a dashed line stands upright, such as a place where lines may end.
        log_x: x by its logarithm.
        styles: look of every line (`palette.looks`); else one for each of this figure.
        wide: a figure that stands alone in its row.

    Raises:
        ValueError: no line, a line of no point, a number that is not finite, an error below 0, x
            not above 0 with log_x, or a line without a style.
    """
    right = right or {}
    _require_named("lines", lines)
    for name, points in lines.items():
        numbers = [n for p in points for n in p if n is not None]
        _require_finite(f"line {name!r}", [*numbers, *right.values()])
        _require_errors(f"line {name!r}", [p.error for p in points])
        _require_above_0(f"line {name!r}", points, log_x)
    for points in behind:
        _require_named("behind", {"a line": points})
        _require_finite("a line behind", [n for p in points for n in p[:2]])
        _require_above_0("a line behind", points, log_x)
    _require_finite("upright", upright)
    styles = _styles(lines, styles)
    with _style():
        figure, axes = _axes(wide, 340)
        for place in upright:
            axes.axvline(place, color=GREY, linewidth=1, dashes=(2, 3), zorder=1)
        for points in behind:
            _line_behind(axes, sorted(points, key=lambda point: point.x))
        for name, points in lines.items():
            _line(axes, name, sorted(points, key=lambda point: point.x), styles[name])
        if log_x:
            axes.set_xscale("log")
        every = [*lines.values(), *behind]
        _ticks(axes, {p.x for points in every for p in points}, log_x)
        axes.margins(x=0.04, y=0.1)
        _label(axes, x, y)
        _legend(figure, axes, wide)
        _references(figure, axes, right)
        return _svg(figure)


def scatter(
    series: Mapping[str, Sequence[Point]],
    x: str,
    y: str,
    *,
    front: Sequence[Point] = (),
    log_x: bool = False,
    styles: Mapping[str, Look] | None = None,
    wide: bool = False,
) -> str:
    """Points that are not joined, such as PSNR against the parameters of models.

    Args:
        series: name -> its points.
        x: label of the axis, with its unit.
        y: label of the axis, with its unit.
        front: points that a grey staircase joins: up to each x the best y that there is.
        log_x: x by its logarithm.
        styles: look of every series (`palette.looks`); else one for each of this figure.
        wide: a figure that stands alone in its row.

    Raises:
        ValueError: no series, a series of no point, a number that is not finite, an error below 0,
            x not above 0 with log_x, or a series without a style.
    """
    _require_named("series", series)
    for name, points in {**series, "front": front}.items():
        _require_finite(f"series {name!r}", [n for p in points for n in p if n is not None])
        _require_errors(f"series {name!r}", [p.error for p in points])
        _require_above_0(f"series {name!r}", points, log_x)
    styles = _styles(series, styles)
    with _style():
        figure, axes = _axes(wide, 340)
        if front:
            steps = sorted(front, key=lambda point: point.x)
            across, up = [p.x for p in steps], [p.y for p in steps]
            axes.plot(across, up, drawstyle="steps-post", color=GREY, linewidth=1.2, zorder=1)
        for name, points in series.items():
            _line(axes, name, points, styles[name]._replace(dash=""))
        if log_x:
            axes.set_xscale("log")
        _round_ticks(axes, [p.x for points in series.values() for p in points], log_x)
        axes.margins(x=0.06, y=0.1)
        _label(axes, x, y)
        _legend(figure, axes, wide)
        return _svg(figure)


def bars(
    series: Mapping[str, Sequence[Bar]],
    groups: Sequence[str],
    y: str,
    *,
    x: str = "",
    reach: tuple[Number, Number] | None = None,
    right: Mapping[str, Number] | None = None,
    styles: Mapping[str, Look] | None = None,
    wide: bool = False,
) -> str:
    """Bars from 0, side by side in each group, such as spread by sextile with the line at 1.

    Args:
        series: name -> one bar for each group.
        groups: names under the bars.
        y: label of the axis, with its unit.
        x: what the groups are.
        reach: lowest and highest y, where several figures are to have one scale.
        right: label -> height of a dashed line, such as the value that is right.
        styles: look of every series (`palette.looks`); else one for each of this figure.
        wide: a figure that stands alone in its row.

    Raises:
        ValueError: no series, none or too few bars, a number that is not finite, an error below 0,
            or a series without a style.
    """
    right = right or {}
    _check_bars(series, groups, reach, right)
    styles = _styles(series, styles)
    with _style():
        figure, axes = _axes(wide, 320)
        width = 0.78 / len(series)
        for place, (name, found) in enumerate(series.items()):
            shift = (place - (len(series) - 1) / 2) * width
            at = [group + shift for group in range(len(groups))]
            heights = [bar.value for bar in found]
            axes.bar(at, heights, width * 0.9, color=styles[name].colour, label=name)
            _error_bars(axes, at, heights, [bar.error for bar in found], INK)
        # As many letters as there is room for, at some nine pixels each with what is between.
        room = max(13, (WIDE if wide else HALF) // 9 // len(groups))
        axes.set_xticks(range(len(groups)), [_wrapped(group, room) for group in groups])
        axes.tick_params(axis="x", length=0, pad=8)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.margins(x=0.02)
        if reach is not None:
            axes.set_ylim(*reach)
        _label(axes, x, y)
        _legend(figure, axes, wide)
        _references(figure, axes, right)
        return _svg(figure)


def _check_bars(
    series: Mapping[str, Sequence[Bar]],
    groups: Sequence[str],
    reach: tuple[Number, Number] | None,
    right: Mapping[str, Number],
) -> None:
    _require_named("series", series)
    for name, found in series.items():
        require(
            len(found) == len(groups),
            f"series {name!r} (={len(found)} bars) must have {len(groups)}, one for each of "
            f"{list(groups)}",
        )
        numbers = [n for bar in found for n in bar if n is not None]
        _require_finite(f"series {name!r}", [*numbers, *right.values()])
        _require_errors(f"series {name!r}", [bar.error for bar in found])
    require(
        reach is None or -math.inf < reach[0] < reach[1] < math.inf,
        f"reach (={reach}) must rise, by finite numbers; use (low, high)",
    )


def differences(
    rows: Mapping[str, Difference],
    first: str,
    second: str,
    *,
    styles: Mapping[str, Look] | None = None,
    wide: bool = False,
) -> str:
    """What the first model gains on the second in each metric, right of the line where it is the
    better.

    Each row has a scale of its own, whose end stands in it, and its figures at the right. A bar is
    the 95 % interval, 1.96 standard errors to either side; a row is of the colour of the model that
    is better, and grey where the interval holds 0.

    Raises:
        ValueError: no row, a number that is not finite, an error below 0, or a model without a
            style.
    """
    _require_named("rows", {name: [row] for name, row in rows.items()})
    for name, row in rows.items():
        _require_finite(f"row {name!r}", [row.value, row.error])
        _require_errors(f"row {name!r}", [row.error])
    styles = _styles([first, second], styles)
    with _style():
        figure, axes = _axes(wide, 90 + 38 * len(rows))
        axes.axvline(0, color=GREY, linewidth=1)
        for place, row in enumerate(rows.values()):
            reach = 1.96 * row.error
            end = _round_up(abs(row.value) + reach)
            look = _winner(row.gain, reach, styles[first], styles[second])
            low, high = ((row.gain + side * reach) / end for side in (-1, 1))
            axes.plot([-1, 1], [place] * 2, "|", color=GREY, markersize=7)
            axes.plot([low, high], [place] * 2, color=look.colour, linewidth=2)
            axes.plot([row.gain / end], [place], look.marker, color=look.colour, markersize=9)
            axes.text(0.96, place - 0.08, _plain(end), color=GREY, fontsize=10.5, ha="right")
            colour = INK if look.colour == GREY else look.colour
            axes.text(1.1, place, _wrapped(str(row), 28), va="center", color=colour)
        axes.set_yticks(range(len(rows)), [_wrapped(name, 26) for name in rows])
        axes.set(xlim=(-1.05, 1.05), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        axes.grid(True, axis="y")
        axes.spines["bottom"].set_visible(False)
        worse, better = _wrapped(f"← {second} better", 26), _wrapped(f"{first} better →", 26)
        axes.text(-0.04, 1.02, worse, **_over(axes, styles[second], "right"))
        axes.text(0.04, 1.02, better, **_over(axes, styles[first], "left"))
        return _svg(figure)


def calibration(
    series: Mapping[str, Bins],
    unit: str = "",
    *,
    styles: Mapping[str, Look] | None = None,
) -> str:
    """Observed error by predicted deviation, with the diagonal on which a model errs as much as
    its samples say. The area of a mark grows with the pixels that it stands for.

    Raises:
        ValueError: no series, one without pixels, a number that is not finite or below 0, or a
            series without a style.
    """
    _require_named("series", {name: bins.counts[bins.counts > 0] for name, bins in series.items()})
    for name, bins in series.items():
        full = bins.counts > 0
        numbers = [*bins.predicted[full].tolist(), *bins.observed[full].tolist()]
        _require_finite(f"series {name!r}", numbers)
        _require_errors(f"series {name!r}", [*numbers, *bins.counts.tolist()])
    styles = _styles(series, styles)
    with _style():
        figure, axes = _axes(False, 420)
        top = 0.0
        for name, bins in series.items():
            full = bins.counts > 0
            across, up = bins.predicted[full], bins.observed[full]
            top = max(top, float(across.max()), float(up.max()))
            look, share = styles[name], bins.counts[full] / bins.counts.max()
            axes.plot(across, up, look.dash, color=look.colour, linewidth=1.2)
            axes.scatter(
                across, up, s=12 + 150 * share, c=look.colour, marker=look.marker, label=name,
                edgecolors=PAPER, linewidths=0.8, zorder=3,
            )  # fmt: skip
        end = 1.08 * top or 1.0
        axes.plot([0, end], [0, end], color=GREY, linewidth=1.2, dashes=(5, 4), zorder=1)
        axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
        axes.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PLAIN)
        of = f", {unit}" if unit else ""
        _label(axes, f"predicted: deviation of the samples{of}", f"observed: error{of}")
        axes.annotate(
            "right", (end, end), (4, 0), textcoords="offset points", va="center", color=GREY
        )
        _legend(figure, axes, False, always=True)
        return _svg(figure)


@contextmanager
def _style() -> Iterator[None]:
    """This file's settings, over matplotlib's own and not those of a user's matplotlibrc."""
    with LOCK, mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def _axes(wide: bool, height: int) -> tuple[Figure, Axes]:
    # Figure and not pyplot, which keeps every figure of the process.
    size = ((WIDE if wide else HALF) / UNITS, height / UNITS)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.06))
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    # None leaves an entry out: the date would differ, the rest names addresses.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue().decode()


def _line(axes: Axes, name: str, points: Sequence[Point], look: Look) -> None:
    across, up = [p.x for p in points], [p.y for p in points]
    axes.plot(across, up, ls=look.dash, marker=look.marker, color=look.colour, label=name)
    _error_bars(axes, across, up, [p.error for p in points], look.colour)


def _line_behind(axes: Axes, points: Sequence[Point]) -> None:
    """Without a name, which the legend would show; below the lines that have one."""
    across, up = [p.x for p in points], [p.y for p in points]
    axes.plot(across, up, color=GREY, linewidth=0.9, alpha=0.6, zorder=1.5)
    axes.plot(across[-1:], up[-1:], "o", color=GREY, markersize=3.5, zorder=1.5)


def _error_bars(
    axes: Axes,
    across: Sequence[Number],
    up: Sequence[Number],
    errors: Sequence[Number | None],
    colour: str,
) -> None:
    """One standard error to either side, where there is one."""
    for x, y, error in zip(across, up, errors, strict=True):
        if error is not None:
            axes.plot([x, x], [y - error, y + error], color=colour, linewidth=1.3)


def _plain(number: Number) -> str:
    """Twelve decimals hold all that a chart shows, and drop what binary fractions leave over."""
    whole, _, part = f"{number:,.12f}".partition(".")
    return f"{whole}.{part}".rstrip("0").rstrip(".").replace("-", "−")


def _ticks(axes: Axes, values: Iterable[Number], log: bool) -> None:
    """Ticks where something was measured, less those that would touch the last one."""
    ordered = sorted(values)
    place = [math.log(value) if log else value for value in ordered]
    apart = 0.075 * (place[-1] - place[0])
    kept = [0]
    for i in range(1, len(ordered)):
        if place[i] - place[kept[-1]] >= apart:
            kept.append(i)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([ordered[i] for i in kept], [_plain(ordered[i]) for i in kept])


def _round_ticks(axes: Axes, values: Sequence[Number], log: bool) -> None:
    """Ticks at round numbers: of points that lie anyhow, each of its own would tell little."""
    # A logarithmic axis of less than a factor of 5 would have one tick or none.
    wide = log and max(values) > 5 * min(values)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
    axes.xaxis.set_major_formatter(PLAIN)


def _label(axes: Axes, x: str, y: str) -> None:
    """Both labels level, as one reads: y stands over its axis."""
    axes.set_title(_wrapped(y, 60))
    axes.set_xlabel(_wrapped(x, 60))
    axes.grid(True, axis="y")
    axes.yaxis.set_major_formatter(PLAIN)


def _references(figure: Figure, axes: Axes, right: Mapping[str, Number]) -> None:
    """Dashed lines, named right of the axes, where no data are."""
    for height in right.values():
        axes.axhline(height, color=INK, linewidth=1.2, dashes=(5, 4))
    names = {_wrapped(name, 18): height for name, height in right.items()}
    names = dict(sorted(names.items(), key=lambda item: item[1]))
    texts = [
        axes.text(1.015, height, name, transform=axes.get_yaxis_transform(), va="center")
        for name, height in names.items()
    ]
    if len(texts) > 1:
        # Laid out once, to know how high a line is in the axis's own unit.
        figure.draw_without_rendering()
        low, high = axes.get_ylim()
        line = 1.25 * FONT * figure.dpi / UNITS / axes.bbox.height * (high - low)
        for text, height in zip(texts, _apart(names, line), strict=True):
            text.set_y(height)


def _apart(names: Mapping[str, Number], line: float) -> list[float]:
    """Ascending heights of names, moved up until none is on the one before."""
    moved: list[float] = []
    top = -math.inf
    for name, height in names.items():
        half = line * (name.count("\n") + 1) / 2
        moved.append(max(float(height), top + half))
        top = moved[-1] + half
    return moved


def _legend(figure: Figure, axes: Axes, wide: bool, always: bool = False) -> None:
    """Names over the axes, where no data are; one line alone needs none on a page that names it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2 and not always:
        return
    names = [_wrapped(label, 60) for label in labels]
    longest = max(len(line) for name in names for line in name.split("\n"))
    # A letter is some seven pixels wide, and the sign before a name as wide as six.
    columns = max(1, min(len(names), (WIDE if wide else HALF) // 7 // (longest + 6)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns)
    # Beyond a first line the figure grows: the axes keep their height.
    lines = max(sum(name.count("\n") + 1 for name in names[i::columns]) for i in range(columns))
    figure.set_figheight(figure.get_figheight() + 1.45 * FONT * (lines - 1) / UNITS)


def _winner(gain: Number, reach: Number, first: Look, second: Look) -> Look:
    if abs(gain) <= reach:
        return Look(GREY, "o", "-")
    return first if gain > 0 else second


def _round_up(number: Number) -> float:
    """The next of 1, 2, 3, 5 and 10 times a power of ten; 1 for 0, as of a model and itself."""
    if number == 0:
        return 1.0
    ten = 10.0 ** math.floor(math.log10(number))
    return next(step * ten for step in (1, 2, 3, 5, 10) if step * ten >= number)


def _over(axes: Axes, look: Look, side: str) -> dict:
    transform = axes.get_xaxis_transform()
    return {"transform": transform, "va": "bottom", "ha": side, "color": look.colour}


def _wrapped(name: str, width: int) -> str:
    return textwrap.fill(name, width) or name


def _styles(names: Iterable[str], styles: Mapping[str, Look] | None) -> dict[str, Look]:
    styles = looks({name: name for name in names}) if styles is None else styles
    return {name: lookup(styles, name, "series") for name in names}


def _require_named(what: str, series: Mapping[str, Sequence | ndarray]) -> None:
    require(len(series) > 0, f"{what} (={{}}) must not be empty; give one or more")
    for name, found in series.items():
        require(len(found) > 0, f"{what}: {name!r} (=nothing) must not be empty; leave it out")


def _require_above_0(what: str, points: Sequence[Point], log_x: bool) -> None:
    low = min((p.x for p in points), default=math.inf)
    require(not log_x or low > 0, f"{what} (x={low}) must have x > 0; use log_x=False")


def _require_finite(what: str, numbers: Iterable[Number]) -> None:
    for number in numbers:
        require(
            math.isfinite(number), f"{what} (={number}) must be finite; leave out what has no value"
        )


def _require_errors(what: str, numbers: Iterable[Number | None]) -> None:
    for number in numbers:
        require(
            number is None or number >= 0,
            f"{what} (={number}) must not have an error or a deviation below 0; give its size",
        )
