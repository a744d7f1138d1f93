"""The page of an evaluation: its questions in order, each with what its rows say of it."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mambaflow.evaluation.cells import NO_CHECKPOINT, Cell
from mambaflow.evaluation.metrics import AXIS_SPREADS, COLUMNS, SEXTILE_SPREADS, Column
from mambaflow.evaluation.summary import Entry, Summary, Way
from mambaflow.flow.samplers import SOLVERS
from mambaflow.report.figures import Bar, Bins, Difference, Point, bars, calibration, curves
from mambaflow.report.figures import differences as draw_differences
from mambaflow.report.page import Block, Drawing, KeyNumber, Page, RankedTable, Section
from mambaflow.report.palette import Look, looks
from mambaflow.report.pictures import only_known
from mambaflow.report.sheets import ImageSheet, Scale, crop, heat
from mambaflow.report.tables import results_table

Picture = UInt8[np.ndarray, "h w 3"]
# What is shown of answers of the size of the data, and of larger ones.
ANSWERED = {
    "psnr": COLUMNS["psnr"],
    "psnr_unknown": COLUMNS["psnr_unknown"],
    "ssim": COLUMNS["ssim"],
    "lpips": Column("LPIPS", 4, "lpips_se"),
    **{key: COLUMNS[key] for key in ("speckle", "outlier_rate", "fair_speckle", "spread",
                                     "coherence", "nfe", "seconds")},
}  # fmt: skip
LARGER = {
    "psnr_reduced": Column("reduced, against the truth", 2, "psnr_reduced_se"),
    "rival_psnr_reduced": Column("rival's", 2),
    "psnr_self": Column("reduced, against its own", 2, "psnr_self_se"),
    "psnr_bicubic": Column("agreement with bicubic", 2, "psnr_bicubic_se"),
    "spread_fine": Column("spread", 2),
    "coherence_fine": Column("coherence", 2),
    "seconds": Column("s / image", 2),
}
REAL = {
    "psnr": Column("PSNR", 2, "psnr_se"),
    "rival_psnr": Column("rival's PSNR", 2, "rival_psnr_se"),
    "ssim": Column("SSIM", 3),
    "rival_ssim": Column("rival's SSIM", 3),
    "lpips": Column("LPIPS", 4),
    "rival_lpips": Column("rival's LPIPS", 4),
}
COMPARED = {
    # Key -> title, unit, decimals, whether higher is better.
    "psnr": ("PSNR", "dB", 2, True),
    "psnr_unknown": ("PSNR of unknown pixels", "dB", 2, True),
    "ssim": ("SSIM", "", 4, True),
    "lpips": ("LPIPS", "", 4, False),
}
SHOWN = 6
CROP = (0.25, 0.25, 0.75, 0.75)


@dataclass(frozen=True)
class Pictures:
    """Truths, their known pixels, and answers as pictures, by the id of the image."""

    truth: Mapping[int, Picture]
    known: Mapping[int, Sequence[int]]
    """Places of known pixels, row x width + column."""
    answers: Mapping[tuple[Way, int], bytes]
    deviations: Mapping[tuple[Way, int], Sequence[float]]

    def of(self, way: Way, image: int) -> Picture | None:
        """An answer, if its picture was kept."""
        data = self.answers.get((way, image))
        return None if data is None else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def given(self, image: int) -> Picture:
        """The known pixels alone."""
        truth = self.truth[image]
        mask = np.zeros(truth.shape[0] * truth.shape[1], bool)
        mask[list(self.known[image])] = True
        return only_known(truth[None], mask.reshape(1, *truth.shape[:2]))[0]


class EvaluationPage:
    """What is shown of a summary.

    Args:
        about: what every table says of where its numbers are from.
    """

    def __init__(
        self, summary: Summary, pictures: Pictures, size: int, known: int, about: str,
        facts: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.summary, self.pictures, self.size, self.known = summary, pictures, size, known
        self.about, self.facts = about, facts

    @cached_property
    def checkpoints(self) -> list[str]:
        """Names of the models, in the order of their first rows."""
        names = [way.cell.checkpoint for way in self.summary.entries]
        return [name for name in dict.fromkeys(names) if name != NO_CHECKPOINT]

    @cached_property
    def plain(self) -> list[Way]:
        """The ways of the size and share that the data have: fills, then each model's."""
        found = self.summary.find(resolution=self.size, known=self.known, asked=0)
        return sorted(found, key=lambda way: (not way.cell.is_fill, way.cell.checkpoint,
                                              way.cell.is_sample, way.cell.sampler, way.cell.nfe,
                                              way.together))  # fmt: skip

    def mean(self, name: str) -> Way | None:
        """A model's posterior mean."""
        return next((w for w in self.plain if w.cell.checkpoint == name and not w.cell.is_sample), None)

    def sample(self, name: str, **at: int) -> Way | None:
        """The sampler of a model that stands for the others: of about ten calls, Heun's first."""
        point = {"resolution": self.size, "known": self.known, "asked": 0} | at
        ways = [w for w in self.summary.find(checkpoint=name, together=0, **point) if w.cell.is_sample]
        order = ["heun", "exponential", "midpoint", "ddim", "sde"]
        return min(ways, default=None, key=lambda w: (abs(math.log(w.cell.nfe / 10)), order.index(w.cell.sampler)))

    @cached_property
    def looks(self) -> dict[str, Look]:
        """A look for every series of the page."""
        series = {name: name for name in self.checkpoints}
        for way in self.plain:
            if way.cell.is_sample and not way.together:
                series.setdefault(self.sampler(way.cell), way.cell.checkpoint)
        return looks(series)

    def sampler(self, cell: Cell) -> str:
        """A model's sampler, whatever its calls."""
        settings = f" ({cell.settings})" if cell.settings else ""
        return f"{cell.checkpoint} {SOLVERS[cell.sampler].title}{settings}"

    def label(self, way: Way) -> str:
        """What tables call a way."""
        cell = way.cell
        if cell.is_fill:
            return cell.sampler
        if not cell.is_sample:
            return f"{cell.checkpoint} posterior mean"
        calls = f"{self.sampler(cell)}, {cell.nfe} calls"
        return f"{calls}, mean of {way.together}" if way.together else calls

    def table(self, ways: Iterable[Way], columns: Mapping[str, Column], best: Mapping[str, Any]) -> RankedTable:
        """Some ways and what they came to."""
        rows = {}
        for way in ways:
            entry = self.summary.entries[way]
            rows[self.label(way)] = entry.numbers | ({} if way.cell.is_fill else {"nfe": way.cell.nfe})
        table = results_table(rows, columns, self.about)
        titles = {columns[key].title: kind for key, kind in best.items() if key in columns}
        return RankedTable(table, {t: k for t, k in titles.items() if t in table.heading})

    def page(self) -> Page:
        """All of it."""
        sections = [section for make in self.questions for section in make()]
        title = " against ".join(self.checkpoints) if len(self.checkpoints) == 2 else "Evaluation"
        if len(self.checkpoints) != 2 and self.checkpoints:
            title = "Evaluation of " + ", ".join(self.checkpoints)
        used = {name: look for name, look in self.looks.items()}
        return Page(title, self.answer(), sections, self.numbers(), self.facts, used)

    @property
    def questions(self) -> Sequence[Callable[[], Iterator[Section]]]:
        """Each yields its section where rows answer it."""
        return (
            self.completion, self.compared, self.looked_at, self.calls, self.law, self.density,
            self.shares, self.enlarged, self.certainty, self.extremes, self.failures,
        )  # fmt: skip
