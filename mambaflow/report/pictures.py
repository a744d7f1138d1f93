"""Pictures of completions: images side by side, for a person."""

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FRAME, BLANK = (255, 255, 255), (64, 64, 64), (200, 200, 200), 222
GAP = 10


def only_known(
    images: UInt8[np.ndarray, "m h w 3"], known: Bool[np.ndarray, "m h w"]
) -> UInt8[np.ndarray, "m h w 3"]:
    """The images with their unknown pixels grey: the column that shows what a model is given."""
    return np.where(known[..., None], images, np.uint8(BLANK))


def picture(
    columns: Mapping[str, UInt8[np.ndarray, "m _h _w 3"]], tile: int = 96
) -> UInt8[np.ndarray, "height width 3"]:
    """Images side by side, a title over each column and a row for each image.

    Columns may differ in resolution: each image is shown `tile` pixels wide, or the next whole
    multiple of every column's size, so that its own pixels are crisp squares.
    """
    counts = {title: len(images) for title, images in columns.items()}
    if not columns or len(set(counts.values())) != 1:
        raise ValueError(f"columns (={counts}) must hold the same number of images, at least one")
    tile = whole_multiple(columns.values(), tile)
    height = max(12, tile // 7)
    font = ImageFont.load_default(size=height)
    titles = [_wrap(title, font, tile) for title in columns]
    # Room for the title with the most lines, a quarter of a line between them.
    top = 2 * GAP + height * 5 // 4 * max(title.count("\n") + 1 for title in titles)
    step, rows = tile + GAP, next(iter(counts.values()))
    sheet = Image.new("RGB", (GAP + step * len(columns), top + step * rows), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, images in enumerate(columns.values()):
        left = GAP + column * step
        # "md": centred, on the foot of the last line: titles of one line and of two end level.
        place = (left + tile / 2, top - GAP)
        pen.multiline_text(place, titles[column], INK, font, anchor="md", align="center")
        for row, image in enumerate(images):
            square = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
            under = top + row * step
            # Both corners are drawn: the frame lies around the image, on none of its pixels.
            pen.rectangle((left - 1, under - 1, left + tile, under + tile), outline=FRAME)
            sheet.paste(square, (left, under))
    return np.asarray(sheet)


def whole_multiple(images: Iterable[np.ndarray], tile: int) -> int:
    """The least width from `tile` up in which every pixel of every column is a whole square."""
    every = math.lcm(*(column.shape[1] for column in images))
    return -(-tile // every) * every  # rounded up


def _wrap(title: str, font: Any, width: int) -> str:
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)  # a word wider than its column stands alone
    return "\n".join(lines)


def to_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
