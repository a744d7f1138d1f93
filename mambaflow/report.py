"""What a person sees of a run: result tables, pictures of completions, and training curves."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

log = logging.getLogger(__name__)
Number = int | float


@dataclass(frozen=True)
class Table:
    """A heading, rows of text and a caption that says where the numbers come from."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heading):
                raise ValueError(
                    f"row {list(row)} must have {len(self.heading)} cells, one for each of "
                    f"{list(self.heading)}; use '' for an empty one"
                )

    def __str__(self) -> str:
        """Markdown that also reads well in a terminal: the first column left, others right."""
        lines = [self.heading, *self.rows]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        text = "\n".join(_row(line, widths) for line in (self.heading, rule, *self.rows))
        return f"{text}\n\n{self.caption}\n" if self.caption else f"{text}\n"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join(padded)} |"


# Column: key of a row, key of its standard error, decimals.
COLUMNS: dict[str, tuple[str, str, int]] = {
    "PSNR full": ("psnr", "psnr_se", 2),
    "PSNR unknown": ("psnr_unknown", "psnr_unknown_se", 2),
    "SSIM": ("ssim", "ssim_se", 3),
    "speckle": ("speckle", "", 4),
    "outliers": ("outlier_rate", "", 4),
    "spread": ("spread", "", 2),
    "coherence": ("coherence", "", 2),
    "NFE": ("nfe", "", 0),
    "s / image": ("seconds", "", 4),
}


def results_table(rows: Mapping[str, Mapping[str, Number]], caption: str = "") -> Table:
    """Methods by what is known of them; a column that no method has is left out.

    Args:
        rows: method -> the numbers of `metrics` reports, `nfe` and `seconds`.
    """
    shown = {
        title: spec for title, spec in COLUMNS.items() if any(spec[0] in r for r in rows.values())
    }
    body = [[name, *(_cell(row, *spec) for spec in shown.values())] for name, row in rows.items()]
    return Table(["method", *shown], body, caption)


def _cell(row: Mapping[str, Number], key: str, error: str, decimals: int) -> str:
    if key not in row:
        return ""
    text = f"{row[key]:.{decimals}f}"
    return f"{text} ± {row[error]:.{decimals}f}" if error in row else text


def provenance(command: str, data: str, seed: int, **more: object) -> str:
    """The caption of a table: what to run again to get its numbers, and the day they are from."""
    facts = {"data": data, "seed": seed, **more, "date": time.strftime("%Y-%m-%d")}
    return f"`{command}`; " + ", ".join(f"{key} {value}" for key, value in facts.items())


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
    tile = _whole_multiple(columns.values(), tile)
    height = max(12, tile // 7)
    font = ImageFont.load_default(size=height)
    titles = [_wrap(title, font, tile) for title in columns]
    top = 2 * GAP + height * 5 // 4 * max(title.count("\n") + 1 for title in titles)
    step, rows = tile + GAP, next(iter(counts.values()))
    sheet = Image.new("RGB", (GAP + step * len(columns), top + step * rows), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, images in enumerate(columns.values()):
        left = GAP + column * step
        place = (left + tile / 2, top - GAP)
        pen.multiline_text(place, titles[column], INK, font, anchor="md", align="center")
        for row, image in enumerate(images):
            square = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
            under = top + row * step
            pen.rectangle((left - 1, under - 1, left + tile, under + tile), outline=FRAME)
            sheet.paste(square, (left, under))
    return np.asarray(sheet)


def _whole_multiple(images: Iterable[np.ndarray], tile: int) -> int:
    """The least width from `tile` up in which every pixel of every column is a whole square."""
    every = math.lcm(*(column.shape[1] for column in images))
    return -(-tile // every) * every


def _wrap(title: str, font: Any, width: int) -> str:
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def save_png(image: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """A PNG that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(image).save(partial, format="PNG")
    partial.replace(path)


class RunLog:
    """The curves of a run, as TensorBoard events and as lines of metrics.jsonl.

    A run that goes on after step s drops what an earlier, interrupted try logged beyond s, so
    that every step is there once; after 0 there is nothing to keep.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            _keep_until(path, step)
        self._lines = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        self._step = step

    def scalars(self, step: int, values: Mapping[str, Number]) -> None:
        """One line of metrics.jsonl with the step, the wall time and the values as they are."""
        line = {"step": step, "time": time.time(), **values}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._step = step

    def image(self, step: int, tag: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture in TensorBoard."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, Number]) -> None:
        """The settings, dotted names for nested ones, beside the run's final numbers."""
        events: Any = self._writer.file_writer
        for summary in hparams(_flat(settings), dict(metrics)):
            events.add_summary(summary)  # SummaryWriter.add_hparams would open a sub-run
        self.scalars(self._step, metrics)

    def flush(self) -> None:
        """Everything logged so far is in the files."""
        self._lines.flush()
        self._writer.flush()

    def close(self) -> None:
        """Flush and end; a second close does nothing."""
        self._lines.close()
        self._writer.close()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{key}"] = value if plain else repr(value)
    return flat


def _keep_until(path: Path, step: int) -> None:
    """Rewrite the lines up to `step`; the last line may be torn by a kill, no other."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            logged = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}:{number} (={line[:60]!r}) must be a JSON object with a step; "
                    "mend or remove the line"
                ) from error
            log.warning("%s:%d: dropped a torn last line %r", path, number, line[:60])
            continue
        if step and logged <= step:
            kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
