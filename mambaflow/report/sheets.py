"""Images side by side on a page: any resolutions at one width, crops, and maps of one number."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8

from mambaflow.checks import require
from mambaflow.report.pictures import BLANK, to_png, whole_multiple

Number = int | float
Box = tuple[Number, Number, Number, Number]
"""Left, top, right, bottom, as shares of the width and the height."""
Images = Sequence[UInt8[np.ndarray, "_h _w 3"]] | UInt8[np.ndarray, "m h w 3"]
# From dark blue to yellow, evenly bright and alike to eyes that confuse red with green (Nunez,
# Anderton, Renslow 2018).
MAP = "cividis"


@dataclass(frozen=True)
class Scale:
    """What the colours of a map of one number stand for, shown under the sheet."""

    title: str
    low: Number
    high: Number

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high,
            f"scale (={self.low} to {self.high}) must rise, by finite numbers; use high > low",
        )

    @property
    def stops(self) -> list[str]:
        """Colours from low to high, evenly spaced."""
        ramp = heat(np.linspace(self.low, self.high, 9)[None], self)[0]
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in ramp]


def heat(values: Float[np.ndarray, "h w"], scale: Scale) -> UInt8[np.ndarray, "h w 3"]:
    """A map of one number, such as the standard deviation of each pixel's samples.

    What lies beyond the scale has the colour of its end; NaN is grey, as unknown pixels are.
    """
    share = (values.astype(np.float64) - scale.low) / (scale.high - scale.low)
    unknown = np.isnan(share)
    colours = mpl.colormaps[MAP](np.where(unknown, 0, share).clip(0, 1), bytes=True)[..., :3]
    return np.where(unknown[..., None], np.uint8(BLANK), colours)


def crop(images: Images, box: Box) -> list[UInt8[np.ndarray, "_h _w 3"]]:
    """The part of each image inside the box, to the nearest whole pixel and at least one.

    The same box shows the same part at every resolution: where its edges lie between two pixels of
    the coarsest image, parts differ by less than one of these.
    """
    _require_box(box)
    left, top, right, bottom = box
    found = []
    for image in images:
        height, width, _ = image.shape
        rows, columns = _span(top, bottom, height), _span(left, right, width)
        found.append(np.ascontiguousarray(image[rows, columns]))
    return found


def _span(start: Number, stop: Number, count: int) -> slice:
    first = min(round(start * count), count - 1)
    return slice(first, max(round(stop * count), first + 1))


def _require_box(box: Box) -> None:
    left, top, right, bottom = box
    require(
        0 <= left < right <= 1 and 0 <= top < bottom <= 1,
        f"box (={box}) must be left, top, right, bottom with 0 <= left < right <= 1 and 0 <= top < "
        "bottom <= 1; use (0.25, 0.25, 0.75, 0.75)",
    )


@dataclass(frozen=True, kw_only=True)
class ImageSheet:
    """Columns of images under titles, shown at one width, each pixel a crisp square.

    Raises:
        ValueError: no column, columns of different numbers of images, as many row titles as there
            are no rows, or a box outside the images.
    """

    columns: Mapping[str, Images]
    """Title -> its images, one for each row; columns may differ in resolution."""
    title: str = ""
    rows: Sequence[str] = ()
    """A title for each row, or none at all."""
    caption: str = ""
    box: Box | None = None
    """Drawn on every image: the part that a sheet of crops shows."""
    scale: Scale | None = None
    """Of a column that `heat` coloured: its legend."""
    tile: int = 96
    """Least width of an image in pixels of the page."""

    def __post_init__(self) -> None:
        counts = {title: len(images) for title, images in self.columns.items()}
        require(
            len(set(counts.values())) == 1 and 0 not in counts.values(),
            f"columns (={counts}) must hold the same number of images, at least one",
        )
        count = next(iter(counts.values()))
        require(
            len(self.rows) in (0, count),
            f"rows (={list(self.rows)}) must be {count} titles, one for each row of images, or ()",
        )
        require(self.tile > 0, f"tile (={self.tile}) must be positive; use 96")
        if self.box is not None:
            _require_box(self.box)

    @property
    def width(self) -> int:
        """Of an image on the page: a whole multiple of every image's own, unless that is more than
        twice what was asked for."""
        every = [np.stack([image]) for images in self.columns.values() for image in images]
        whole = whole_multiple(every, self.tile)
        return whole if whole <= 2 * self.tile else self.tile

    @property
    def cells(self) -> list[list[tuple[str, str, bool]]]:
        """By row, each image's address (a PNG in itself), what is read out in its place, and
        whether it has as many pixels as the page has for it, or more."""
        lines, wide = [], self.width
        for number, images in enumerate(zip(*self.columns.values(), strict=True)):
            row = self.rows[number] if self.rows else f"image {number + 1}"
            lines.append(
                [
                    (_address(image), f"{title}, {row}", image.shape[1] >= wide)
                    for title, image in zip(self.columns, images, strict=True)
                ]
            )
        return lines


def _address(image: UInt8[np.ndarray, "h w 3"]) -> str:
    return f"data:image/png;base64,{base64.b64encode(to_png(image)).decode()}"
