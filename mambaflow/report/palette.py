"""The colours of a page, in light and in dark, and how each series is drawn through all of it."""

from collections.abc import Mapping
from typing import NamedTuple

from mambaflow.checks import require


class Shade(NamedTuple):
    """One colour on light ground and on dark."""

    light: str
    dark: str


# The hues of Okabe and Ito (2008), "Color universal design", at lightnesses of their own: they
# differ to eyes that confuse red with green too, and stand out from their ground.
SHADES: dict[str, Shade] = {
    "paper": Shade("#ffffff", "#15181c"),
    "mark": Shade("#e3eaf1", "#2d3640"),
    "rule": Shade("#dde2e8", "#343b44"),
    "grey": Shade("#6b7684", "#98a3b0"),
    "ink": Shade("#1f2429", "#e4e7eb"),
    "blue": Shade("#117bbb", "#5bbdff"),
    "vermilion": Shade("#bd5700", "#e0763a"),
    "green": Shade("#1d7e5c", "#24c08a"),
    "purple": Shade("#4b2e67", "#a554db"),
    "ochre": Shade("#4e4009", "#fabb2d"),
}
HUES = ("blue", "vermilion", "green", "purple", "ochre")
PAPER, RULE, GREY, INK = (SHADES[name].light for name in ("paper", "rule", "grey", "ink"))
# A second sign beside the colour, for print in grey.
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
Dash = str | tuple[int, tuple[int, ...]]


class Look(NamedTuple):
    """How a series is drawn: a colour of SHADES (light), matplotlib's marker and line style."""

    colour: str
    marker: str
    dash: Dash


def looks(models: Mapping[str, str]) -> dict[str, Look]:
    """One look for each series, to be used through a whole page.

    The colour is the model's, marker and dashes tell a model's series apart. A series of no model
    ("") is grey, as a classical fill is.

    Args:
        models: series -> the model that it is of, in the order in which colours are dealt out.

    Raises:
        ValueError: more models than colours, or more series of one model than line styles.
    """
    named = list(dict.fromkeys(model for model in models.values() if model))
    require(
        len(named) <= len(HUES),
        f"models (={named}) must be {len(HUES)} or fewer, as there are colours; show fewer in one "
        "page, or those that need no telling apart as ''",
    )
    found: dict[str, Look] = {}
    counts: dict[str, int] = {}
    for series, model in models.items():
        place = counts[model] = counts.get(model, -1) + 1
        require(
            place < len(MARKERS),
            f"series of {model or 'no model'!r} must be {len(MARKERS)} or fewer, as there are line "
            "styles; show fewer in one page",
        )
        colour = SHADES[HUES[named.index(model)]].light if model else GREY
        # Each model begins with a marker of its own.
        first = named.index(model) if model else len(named)
        marker = MARKERS[(first + place) % len(MARKERS)]
        found[series] = Look(colour, marker, DASHES[place])
    return found


def variable(colour: str) -> str:
    """The page's CSS variable that is this colour in light and its fellow in dark; a colour that
    is not of SHADES stays what it is."""
    names = {shade.light: name for name, shade in SHADES.items()}
    return f"var(--{names[colour]})" if colour in names else colour
