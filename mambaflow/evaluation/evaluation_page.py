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
    "lpips": Column("LPIPS", 4),
    **{key: COLUMNS[key] for key in ("speckle", "fair_speckle", "spread",
                                     "coherence", "nfe", "seconds")},
}  # fmt: skip
LARGER = {
    "psnr_reduced": Column("reduced, against the truth", 2, "psnr_reduced_se"),
    "rival_psnr_reduced": Column("rival's", 2),
    "psnr_self": Column("reduced, against its own", 2, "psnr_self_se"),
    "psnr_bicubic": Column("agreement with bicubic", 2, "psnr_bicubic_se"),
    "spread_fine": Column("spread", 2),
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
        return next(
            (w for w in self.plain if w.cell.checkpoint == name and not w.cell.is_sample), None
        )

    def sample(self, name: str, **at: int) -> Way | None:
        """The sampler of a model that stands for the others: of about ten calls, Heun's first."""
        point = {"resolution": self.size, "known": self.known, "asked": 0} | at
        ways = [
            w for w in self.summary.find(checkpoint=name, together=0, **point) if w.cell.is_sample
        ]
        order = ["heun", "exponential", "midpoint", "ddim", "sde"]
        return min(
            ways,
            default=None,
            key=lambda w: (abs(math.log(w.cell.nfe / 10)), order.index(w.cell.sampler)),
        )

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

    def table(
        self, ways: Iterable[Way], columns: Mapping[str, Column], best: Mapping[str, Any]
    ) -> RankedTable:
        """Some ways and what they came to."""
        table = results_table(self.rows(ways), columns, self.about)
        titles = {columns[key].title: kind for key, kind in best.items() if key in columns}
        return RankedTable(table, {t: k for t, k in titles.items() if t in table.heading})

    def rows(self, ways: Iterable[Way]) -> dict[str, dict[str, float]]:
        """The numbers of some ways, by what tables call them."""
        found = {}
        for way in ways:
            calls = {} if way.cell.is_fill else {"nfe": way.cell.nfe * max(1, way.together)}
            found[self.label(way)] = self.summary.entries[way].numbers | calls
        return found

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

    def completion(self) -> Iterator[Section]:
        """Every way of the data's own size in one table."""
        if not self.plain:
            return
        best = {"psnr": "highest", "psnr_unknown": "highest", "ssim": "highest", "lpips": "lowest",
                "spread": 1, "fair_speckle": 0}  # fmt: skip
        text = (
            "All answers of the same images from the same known pixels, which are copied. A "
            "**posterior mean** and **one sample** are different answers: PSNR rewards the first, "
            "LPIPS and the eye the second."
        )
        right = (
            "A true sample has 3.01 dB less PSNR on unknown pixels than the posterior mean, spread "
            "1, the truth's coherence, and a fair speckle of 0."
        )
        blocks = [self.table(self.plain, ANSWERED, best)]
        yield Section("What are the answers worth?", text, blocks, right)

    def compared(self) -> Iterator[Section]:
        """Two models, image by image."""
        if len(self.checkpoints) != 2:
            return
        first, second = self.checkpoints
        kinds = {"posterior mean": self.mean, "one sample": self.sample}
        blocks: list[Block] = []
        for title, kind in kinds.items():
            ours, theirs = kind(second), kind(first)
            rows = {} if ours is None or theirs is None else self.differences(ours, theirs)
            if rows:
                drawn = draw_differences(rows, second, first, styles=self.looks)
                blocks.append(Drawing(drawn, f"{title}: {second} less {first}"))
        if blocks:
            text = (
                "Differences image by image: what images have in common cancels out. A bar is the "
                "95 % interval; one that crosses the line tells nothing."
            )
            yield Section(f"Is {second} better than {first}?", text, blocks)

    def differences(self, ours: Way, theirs: Way) -> dict[str, Difference]:
        """In each number that both have of each image."""
        found = {}
        for key, (title, unit, decimals, higher) in COMPARED.items():
            pair = self.summary.difference(ours, theirs, key)
            if f"{key}_se" in pair:
                found[title] = Difference(
                    value=pair[key], error=pair[f"{key}_se"], unit=unit, decimals=decimals,
                    higher_is_better=higher,
                )  # fmt: skip
        return found

    def looked_at(self) -> Iterator[Section]:
        """The first images, side by side."""
        images = list(self.pictures.truth)[:SHOWN]
        if images:
            text = "The first images of the order in which they were drawn, not chosen by eye."
            sheet = ImageSheet(columns=self.columns(images), rows=[f"image {i}" for i in images])
            yield Section("What do they look like?", text, [sheet])

    def columns(self, images: Sequence[int]) -> dict[str, list[Picture]]:
        """Truth, known pixels, the best fill, and the two answers of each model."""
        found = {
            "truth": [self.pictures.truth[i] for i in images],
            "known pixels": [self.pictures.given(i) for i in images],
        }
        fills = [way for way in self.plain if way.cell.is_fill]
        best = max(fills, default=None, key=lambda way: self.number(way, "psnr"))
        models = [way for name in self.checkpoints for way in (self.mean(name), self.sample(name))]
        for way in [best, *models]:
            shown = [] if way is None else [self.pictures.of(way, i) for i in images]
            if way is not None and shown and all(p is not None for p in shown):
                found[self.label(way)] = [p for p in shown if p is not None]
        return found

    def number(self, way: Way, key: str) -> float:
        """A number of a way; less than any where it has none."""
        return self.summary.entries[way].numbers.get(key, -math.inf)

    def calls(self) -> Iterator[Section]:
        """What more calls of the network are worth."""
        lines = {"psnr_unknown": "PSNR of unknown pixels (dB)", "lpips": "LPIPS",
                 "spread": "spread", "coherence": "coherence"}  # fmt: skip
        ways = [w for w in self.plain if w.cell.is_sample and not w.together]
        if len({way.cell.nfe for way in ways}) < 2:
            return
        blocks: list[Block] = []
        for key, title in lines.items():
            drawn = self.lines(ways, key, lambda way: way.cell.nfe)
            if drawn:
                line = {"right": 1.0} if key == "spread" else self.truth_coherence(ways, key)
                blocks.append(
                    Drawing(
                        curves(drawn, "calls of the network (NFE)", title, right=line, log_x=True,
                               styles=self.looks), title,
                    )
                )  # fmt: skip
        text = "Every sampler at the same number of calls: Heun and midpoint take two for a step."
        right = "A good sampler gives at ten calls what it gives at a hundred."
        yield Section("How many calls does a sample need?", text, blocks, right)

    def lines(
        self, ways: Iterable[Way], key: str, x: Callable[[Way], float]
    ) -> dict[str, list[Point]]:
        """A number along an axis, a line for each sampler of each model."""
        found: dict[str, list[Point]] = {}
        for way in ways:
            numbers = self.summary.entries[way].numbers
            if key in numbers:
                point = Point(x(way), numbers[key], numbers.get(f"{key}_se"))
                found.setdefault(self.sampler(way.cell), []).append(point)
        return {name: sorted(points) for name, points in found.items()}

    def truth_coherence(self, ways: Iterable[Way], key: str) -> dict[str, float]:
        """The line that is right for coherence: around the last model's mean."""
        found = [self.number(way, "coherence_truth") for way in ways] if key == "coherence" else []
        return {"truth": found[-1]} if found and math.isfinite(found[-1]) else {}

    def law(self) -> Iterator[Section]:
        """Where samples vary too much, and where too little."""
        ways = [w for w in map(self.sample, self.checkpoints) if w is not None]
        if not ways:
            return
        axes = {
            "by how busy the known pixels around are": (
                SEXTILE_SPREADS, ["calmest", "2", "3", "4", "5", "busiest"]),
            "along the colours' own axes": (AXIS_SPREADS, ["widest", "2", "3"]),
        }  # fmt: skip
        blocks: list[Block] = []
        for title, (keys, groups) in axes.items():
            series = {}
            for way in ways:
                heights = [self.number(way, key) for key in keys]
                if all(math.isfinite(height) for height in heights):
                    series[self.sampler(way.cell)] = [Bar(height) for height in heights]
            if series:
                drawn = bars(series, groups, "spread", right={"right": 1.0}, styles=self.looks)
                blocks.append(Drawing(drawn, f"spread {title}"))
        text = (
            "**Spread** is Var(sample - mean) / Var(truth - mean): an average of 1 can hide "
            "samples that are too wild in the sky and too tame in the leaves."
        )
        if blocks:
            yield Section("Is a sample a sample?", text, blocks, "1 everywhere.")

    def density(self) -> Iterator[Section]:
        """Whether samples keep their law when other numbers of pixels are asked."""
        whole = self.size**2 - self.known
        found: dict[str, dict[str, list[Point]]] = {"spread": {}, "coherence": {}}
        for way in self.summary.find(known=self.known, together=0):
            cell, fine = way.cell, way.cell.resolution > self.size
            point = self.sample(cell.checkpoint, resolution=cell.resolution, asked=cell.asked)
            if way != point:
                continue
            count = cell.resolution**2 if fine else cell.asked or whole
            for key, lines in found.items():
                if fine and key != "spread":
                    continue
                height = self.number(way, f"{key}_fine" if fine else key)
                if math.isfinite(height):
                    lines.setdefault(self.sampler(cell), []).append(Point(count, height))
        blocks: list[Block] = []
        for key, lines in found.items():
            if any(len(points) > 1 for points in lines.values()):
                right = {"right": 1.0} if key == "spread" else {}
                drawn = curves(
                    lines, "pixels asked", key, right=right, log_x=True, styles=self.looks
                )
                blocks.append(Drawing(drawn, f"{key} by the number of pixels asked"))
        if blocks:
            text = (
                "One model, asked for a part of the unknown pixels, for all of them, or for the "
                f"places of a finer grid (more than {whole}): there compared at the distances from "
                "known pixels that the unknown pixels have."
            )
            yield Section("Do samples keep their law at any density?", text, blocks, "Flat lines.")

    def shares(self) -> Iterator[Section]:
        """What more known pixels are worth."""
        ways = self.summary.find(resolution=self.size, asked=0, together=0)
        if len({way.cell.known for way in ways}) < 2:
            return
        lines: dict[str, list[Point]] = {}
        for way in ways:
            cell, numbers = way.cell, self.summary.entries[way].numbers
            kept = way == self.sample(cell.checkpoint, known=cell.known)
            if cell.is_sample and not kept:
                continue
            name = self.label(way) if not cell.is_sample else self.sampler(cell)
            share = round(100 * cell.known / self.size**2, 1)
            lines.setdefault(name, []).append(
                Point(share, numbers["psnr_unknown"], numbers.get("psnr_unknown_se"))
            )
        models = {name: "" if name in self.fills else name for name in lines}
        styles = looks({name: next((c for c in self.checkpoints if name.startswith(c)), "")
                        for name in models})  # fmt: skip
        drawn = curves(
            lines, "known pixels (%)", "PSNR of unknown pixels (dB)", styles=styles, wide=True
        )
        text = "Masks are nested: each share keeps the pixels of the smaller ones."
        yield Section("What are more known pixels worth?", text, [Drawing(drawn, "by share")])

    @property
    def fills(self) -> list[str]:
        """Names of the classical fills."""
        return [way.cell.sampler for way in self.plain if way.cell.is_fill]

    def enlarged(self) -> Iterator[Section]:
        """Larger images, and what can honestly be said of them."""
        ways = [w for w in self.summary.entries if w.cell.resolution > self.size]
        for size in sorted({way.cell.resolution for way in ways}):
            at = [way for way in ways if way.cell.resolution == size]
            real = any("ssim" in self.summary.entries[way].numbers for way in at)
            columns = (REAL | LARGER) if real else LARGER
            blocks: list[Block] = [self.table(at, columns, {})]
            blocks += self.larger_pictures(size)
            text = (
                f"The model is asked at the pixel centres of {size} x {size}; nothing is scaled "
                "up. The rival is the same model's answer at its own size, enlarged by bicubic."
            )
            right = (
                "There is no true image of this size. Reduced again, an answer should be the "
                "truth, and its own smaller answer; agreement with bicubic is no truth."
            )
            if real:
                right = "PSNR, SSIM and LPIPS are against the real images of this size."
            yield Section(f"What are {size} x {size} pixels worth?", text, blocks, right)

    def larger_pictures(self, size: int) -> list[Block]:
        """The first images at a larger size, whole and in part."""
        images = list(self.pictures.truth)[: SHOWN // 2]
        columns = {"truth": [self.pictures.truth[i] for i in images]}
        for name in self.checkpoints:
            for way in (self.mean_at(name, size), self.sample(name, resolution=size)):
                shown = [] if way is None else [self.pictures.of(way, i) for i in images]
                if way is not None and shown and all(p is not None for p in shown):
                    columns[self.label(way)] = [p for p in shown if p is not None]
        if len(columns) < 2:
            return []
        rows = [f"image {i}" for i in images]
        parts = {title: crop(found, CROP) for title, found in columns.items()}
        return [
            ImageSheet(columns=columns, rows=rows, box=CROP, tile=128),
            ImageSheet(columns=parts, rows=rows, title="The part in the box", tile=128),
        ]

    def mean_at(self, name: str, size: int) -> Way | None:
        """A model's posterior mean at a size."""
        return next(iter(self.summary.find(checkpoint=name, sampler="mean", resolution=size)), None)

    def certainty(self) -> Iterator[Section]:
        """Whether samples tell how sure they are."""
        # Of each model the sampler that stands for the others.
        shown = [way.cell for way in map(self.sample, self.checkpoints) if way is not None]
        ways = [way for way in self.plain if way.together and way.cell in shown]
        series = {}
        for way in ways:
            found = self.summary.entries[way].reliability
            if found:
                predicted, observed, counts = (
                    np.array(column) for column in zip(*found, strict=True)
                )
                series[self.sampler(way.cell)] = Bins(predicted, observed, counts)
        if not series:
            return
        blocks: list[Block] = [
            Drawing(calibration(series, "of 1", styles=self.looks), "predicted and observed error")
        ]
        images = [
            i for i in list(self.pictures.truth)[:SHOWN] if (ways[0], i) in self.pictures.deviations
        ]
        if images:
            shape = (self.size, self.size)
            maps = [np.array(self.pictures.deviations[ways[0], i]).reshape(shape) for i in images]
            high = round(max(float(m.max()) for m in maps), 2) or 1.0
            scale = Scale("standard deviation", 0.0, high)
            columns = {
                "truth": [self.pictures.truth[i] for i in images],
                "known pixels": [self.pictures.given(i) for i in images],
                "deviation": [heat(m, scale) for m in maps],
            }
            blocks.append(
                ImageSheet(columns=columns, rows=[f"image {i}" for i in images], scale=scale,
                           title=self.label(ways[0]))
            )  # fmt: skip
        text = (
            "Pixels by how much several samples of them deviate, against how far the samples' mean "
            "is off. The fewer the samples, the more a small deviation is luck: from few samples "
            "the left end lies too high and the right end too low even where all is right."
        )
        yield Section("Do samples know how sure they are?", text, blocks, "On the diagonal.")

    def extremes(self) -> Iterator[Section]:
        """Best, median and worst images of the last model's posterior mean."""
        way = self.mean(self.checkpoints[-1]) if self.checkpoints else None
        if way is None:
            return
        values = self.summary.values(way, "psnr_unknown")
        ranked = sorted((i for i in self.pictures.truth if i in values), key=lambda i: values[i])
        if len(ranked) < SHOWN:
            return
        middle = len(ranked) // 2
        chosen = [*ranked[:-3:-1], *ranked[middle - 1 : middle + 1], *ranked[1::-1]]
        names = ["best", "second", "median", "median", "second worst", "worst"]
        rows = [f"{n}: {values[i]:.1f} dB" for n, i in zip(names, chosen, strict=True)]
        text = (
            f"By PSNR of unknown pixels of {self.label(way)}, among the {len(ranked)} images whose "
            "pictures were kept."
        )
        yield Section(
            "Where is it good, and where not?",
            text,
            [ImageSheet(columns=self.columns(chosen), rows=rows)],
        )

    def failures(self) -> Iterator[Section]:
        """Rows without an answer."""
        failed = {way: entry.failed for way, entry in self.summary.entries.items() if entry.failed}
        if failed:
            text = "Rows that failed are in no number above: " + "; ".join(
                f"{self.label(way)}, {way.cell.resolution} x {way.cell.resolution}: {count}"
                for way, count in failed.items()
            )
            yield Section("What failed?", text, [])

    def numbers(self) -> list[KeyNumber]:
        """The numbers that answer the question."""
        found = []
        for name in self.checkpoints:
            way = self.mean(name)
            if way is not None:
                entry = self.summary.entries[way]
                found.append(
                    KeyNumber(_with_error(entry, "psnr"), f"{name}, posterior mean", "PSNR, dB")
                )
        removed = self.speckle_removed()
        if removed is not None:
            first, second = self.checkpoints
            found.append(
                KeyNumber(
                    f"{100 * removed:.0f} %", f"of {first}'s speckle gone in {second}'s samples"
                )
            )
        return found

    def speckle_removed(self) -> float | None:
        """The share of the first model's speckle that the second one's samples do not have."""
        if len(self.checkpoints) != 2:
            return None
        ways = [self.sample(name) for name in self.checkpoints]
        before, after = (math.nan if way is None else self.number(way, "speckle") for way in ways)
        return 1 - after / before if before > 0 else None

    def answer(self) -> str:
        """Two sentences."""
        fills = [way for way in self.plain if way.cell.is_fill]
        best = max(fills, default=None, key=lambda way: self.number(way, "psnr"))
        parts = [
            f"{self.label(way)} {_with_error(self.summary.entries[way], 'psnr')} dB"
            for way in [*(self.mean(name) for name in self.checkpoints), best]
            if way is not None
        ]
        known = 100 * self.known / self.size**2
        first = f"From {known:.0f} % of the pixels: {', '.join(parts)}."
        removed = self.speckle_removed()
        if removed is None:
            return first
        a, b = self.checkpoints
        ours, theirs = self.mean(b), self.mean(a)
        gain = (
            {} if ours is None or theirs is None else self.summary.difference(ours, theirs, "psnr")
        )
        more = f"{b} is {gain['psnr']:+.2f} dB from {a}, image by image, and " if gain else f"{b} "
        return f"{first} {more}has {100 * (1 - removed):.0f} % of its speckle in one sample."


def _with_error(entry: Entry, key: str) -> str:
    value, error = entry.numbers.get(key), entry.numbers.get(f"{key}_se")
    if value is None:
        return "none"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
