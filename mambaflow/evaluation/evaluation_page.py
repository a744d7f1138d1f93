"""The page of an evaluation: its questions in order, each with what its rows say of it."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mambaflow.evaluation.calibration import AXIS_SPREADS, SEXTILE_SPREADS
from mambaflow.evaluation.metrics import COLUMNS, Column
from mambaflow.evaluation.summary import Entry, Summary, Way
from mambaflow.evaluation.ways import Ways
from mambaflow.report.figures import Bar, Bins, Difference, Point, bars, calibration, curves
from mambaflow.report.figures import differences as draw_differences
from mambaflow.report.page import Block, Drawing, KeyNumber, Page, RankedTable, Section
from mambaflow.report.palette import Look
from mambaflow.report.pictures import only_known
from mambaflow.report.sheets import ImageSheet, Scale, crop, heat
from mambaflow.report.tables import Table, results_table

Picture = UInt8[np.ndarray, "h w 3"]
# What is told of answers of the size of the data: in the terminal, and on the page, where eleven
# columns would be wider than a window.
ANSWERED = {
    # Where a way has fewer than the caption tells.
    "images": Column("images", 0),
    "psnr": COLUMNS["psnr"],
    "psnr_unknown": COLUMNS["psnr_unknown"],
    "ssim": COLUMNS["ssim"],
    "lpips": Column("LPIPS", 4),
    **{key: COLUMNS[key] for key in ("speckle", "fair_speckle", "spread",
                                     "coherence", "nfe", "seconds")},
}  # fmt: skip
# The error of the unknown pixels' PSNR is that of the full one.
SEEN = {key: column for key, column in ANSWERED.items() if key != "coherence"} | {
    "psnr_unknown": Column("PSNR unknown", 2),
    "seconds": Column("s / image", 3),
}
LAW = {
    "images": Column("images", 0),
    "spread": COLUMNS["spread"],
    **{key: Column(f"sixth {number}", 2) for number, key in enumerate(SEXTILE_SPREADS, 1)},
    "coherence": COLUMNS["coherence"],
    "coherence_truth": Column("truth's", 2),
    "fair_speckle": COLUMNS["fair_speckle"],
}
LARGER = {
    "images": Column("images", 0),
    "psnr_reduced": Column("reduced", 2, "psnr_reduced_se"),
    "rival_psnr_reduced": Column("rival reduced", 2),
    "psnr_self": Column("against its own", 2),
    "psnr_bicubic": Column("bicubic", 2),
    "spread_fine": Column("spread", 2),
    "seconds": Column("s / image", 2),
}
REAL = {
    "images": Column("images", 0),
    "psnr": Column("PSNR", 2, "psnr_se"),
    "rival_psnr": Column("rival's PSNR", 2),
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
BEST = {"psnr": "highest", "psnr_unknown": "highest", "ssim": "highest", "lpips": "lowest"}
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


@dataclass(frozen=True)
class Failure:
    """Rows of a way without an answer, and what the first of them said."""

    way: Way
    rows: int
    error: str


class EvaluationPage:
    """What is shown of a summary.

    Args:
        size: pixels on a side of the data.
        known: known pixels of an image, as the data were staged.
        about: what every table says of where its numbers are from.
        facts: the same at length, at the page's end.
        missing: rows that were asked for and are not there yet.
    """

    def __init__(
        self, summary: Summary, pictures: Pictures, size: int, known: int, about: str,
        facts: Mapping[str, str], failed: Sequence[Failure] = (), missing: int = 0,
    ) -> None:  # fmt: skip
        self.summary, self.pictures, self.size, self.known = summary, pictures, size, known
        self.about, self.facts, self.failed, self.missing = about, facts, failed, missing
        self.ways = Ways(summary, size, known)

    def page(self) -> Page:
        """All of it."""
        sections = [section for make in self.questions for section in make()]
        names = self.ways.checkpoints
        title = " against ".join(names) if len(names) == 2 else "Evaluation"
        if len(names) not in (0, 2):
            title = "Evaluation of " + ", ".join(names)
        facts, left_out = dict(self.facts), self.ways.not_drawn
        if left_out:
            facts["not in charts"] = f"{', '.join(left_out)}: more than there are looks to tell"
        answer = self.answer()
        if self.missing:
            answer += f"\n\n**Not complete**: {self.missing} rows are missing."
        return Page(title, answer, sections, self.numbers(), facts, self.looks())

    def looks(self) -> dict[str, Look]:
        """Of the charts' series, and of the rows of tables that belong to them."""
        rows = {self.ways.label(way): self.ways.look(way) for way in self.summary.entries}
        return self.ways.looks | {name: look for name, look in rows.items() if look is not None}

    @property
    def questions(self) -> Sequence[Callable[[], Iterator[Section]]]:
        """Each yields its section where rows answer it."""
        return (
            self.completion, self.compared, self.looked_at, self.calls, self.law, self.density,
            self.shares, self.enlarged, self.certainty, self.extremes, self.every, self.failures,
        )  # fmt: skip

    def table(
        self, ways: Iterable[Way], columns: Mapping[str, Column], best: Mapping[str, Any]
    ) -> RankedTable:
        """Some ways and what they came to."""
        table = results_table(self.rows(ways), columns, self.about)
        titles = {columns[key].title: kind for key, kind in best.items() if key in columns}
        return RankedTable(table, {t: k for t, k in titles.items() if t in table.heading})

    def rows(self, ways: Iterable[Way]) -> dict[str, dict[str, float]]:
        """The numbers of some ways, by what tables call them."""
        entries, found, ways = self.summary.entries, {}, list(ways)
        # An evaluation may be under way, and rows may have failed.
        most = max(entry.images for entry in entries.values())
        fewer = any(entries[way].images < most for way in ways)
        for way in ways:
            more = {"images": entries[way].images} if fewer else {}
            if not way.cell.is_fill:
                more["nfe"] = way.cell.nfe * max(1, way.together)
            found[self.ways.label(way)] = entries[way].numbers | more
        return found

    def completion(self) -> Iterator[Section]:
        """The data's own size: a way for each sampler."""
        if not self.ways.plain:
            return
        text = (
            "All answers of the same images from the same known pixels, which are copied. A "
            "**posterior mean** and **one sample** are different answers: PSNR rewards the first, "
            "LPIPS and the eye the second."
        )
        right = (
            "A true sample has 3.01 dB less PSNR on unknown pixels than the posterior mean, spread "
            "1 and a fair speckle of 0."
        )
        blocks = [self.table(self.ways.main, SEEN, BEST | {"spread": 1})]
        yield Section("What are the answers worth?", text, blocks, right)

    def every(self) -> Iterator[Section]:
        """The same of every number of calls."""
        if len(self.ways.plain) > len(self.ways.main):
            text = (
                "As in the first table, of every sampler at every number of calls, and of the mean "
                "of several samples."
            )
            blocks = [self.table(self.ways.plain, SEEN, BEST | {"spread": 1})]
            yield Section("What is every way of answering worth?", text, blocks)

    def compared(self) -> Iterator[Section]:
        """Two models, image by image."""
        if len(self.ways.checkpoints) != 2:
            return
        first, second = self.ways.checkpoints
        styles = {name: self.ways.looks[f"{name} posterior mean"] for name in (first, second)}
        blocks: list[Block] = []
        for title, kind in {
            "posterior mean": self.ways.mean,
            "one sample": self.ways.sample,
        }.items():
            ours, theirs = kind(second), kind(first)
            rows = {} if ours is None or theirs is None else self.differences(ours, theirs)
            if rows:
                drawn = draw_differences(rows, second, first, styles=styles)
                blocks.append(Drawing(drawn, f"{title}: {second} less {first}"))
        if blocks:
            text = (
                "Differences image by image: what images have in common cancels out. A bar is the "
                "95\N{NO-BREAK SPACE}% interval; one that crosses the line tells nothing."
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
        images = self.pictured(self.answered, SHOWN)
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
        return found | self.answers(self.answered, images)

    @property
    def answered(self) -> list[Way]:
        """The best fill, and of each model its mean and a sample."""
        kinds = (self.ways.mean, self.ways.sample)
        models = [kind(name) for name in self.ways.checkpoints for kind in kinds]
        return [way for way in (self.ways.best_fill, *models) if way is not None]

    def pictured(self, ways: Iterable[Way], count: int) -> list[int]:
        """The first images of which every way has a picture that has any: an evaluation may be
        under way, and a row may have failed."""
        have: dict[Way, set[int]] = {way: set() for way in ways}
        for way, image in self.pictures.answers:
            if way in have:
                have[way].add(image)
        of_all = set(self.pictures.truth).intersection(*(found for found in have.values() if found))
        return [image for image in self.pictures.truth if image in of_all][:count]

    def answers(self, ways: Iterable[Way], images: Sequence[int]) -> dict[str, list[Picture]]:
        """A column for each way that has a picture of every image."""
        found = {}
        for way in ways:
            kept = [one for i in images if (one := self.pictures.of(way, i)) is not None]
            if kept and len(kept) == len(images):
                found[self.ways.label(way)] = kept
        return found

    def calls(self) -> Iterator[Section]:
        """What more calls of the network are worth."""
        lines = {"psnr_unknown": "PSNR of unknown pixels (dB)", "lpips": "LPIPS",
                 "spread": "spread", "coherence": "coherence"}  # fmt: skip
        ways = [w for w in self.ways.plain if w.cell.is_sample and not w.together]
        if len({way.cell.nfe for way in ways}) < 2:
            return
        blocks: list[Block] = []
        for key, title in lines.items():
            drawn = self.lines(ways, key, lambda way: way.cell.nfe)
            if drawn:
                chart = curves(drawn, "calls of the network (NFE)", title, right=self.right(key),
                               log_x=True, styles=self.ways.looks)  # fmt: skip
                blocks.append(Drawing(chart, title))
        text = "Every sampler at the same number of calls: Heun and midpoint take two for a step."
        right = "A good sampler gives at ten calls what it gives at a hundred."
        if blocks:
            yield Section("How many calls does a sample need?", text, blocks, right)

    def lines(
        self, ways: Iterable[Way], key: str, x: Callable[[Way], float]
    ) -> dict[str, list[Point]]:
        """A number along an axis, a line for each series that has a look."""
        found: dict[str, list[Point]] = {}
        for way in ways:
            numbers = self.summary.entries[way].numbers
            if math.isfinite(numbers.get(key, math.nan)) and self.ways.look(way) is not None:
                point = Point(x(way), numbers[key], numbers.get(f"{key}_se"))
                found.setdefault(self.ways.series(way), []).append(point)
        return {name: sorted(points) for name, points in found.items()}

    def right(self, key: str) -> dict[str, float]:
        """The line of what is right: for coherence that of the truth around the models' means."""
        if key == "spread":
            return {"right": 1.0}
        means = [self.ways.number(way, f"{key}_truth") for way in self.ways.plain]
        found = [value for value in means if math.isfinite(value)]
        return {"truth": float(np.mean(found))} if found else {}

    def law(self) -> Iterator[Section]:
        """Where samples vary too much, and where too little."""
        ways = [w for w in map(self.ways.sample, self.ways.checkpoints) if w is not None]
        axes = {
            "by how busy the known pixels around are": (
                SEXTILE_SPREADS, ["calmest", "2", "3", "4", "5", "busiest"]),
            "along the colours' own axes": (AXIS_SPREADS, ["widest", "2", "3"]),
        }  # fmt: skip
        blocks: list[Block] = []
        for title, (keys, groups) in axes.items():
            series = {way: [Bar(self.ways.number(way, key)) for key in keys] for way in ways}
            drawn = {self.ways.series(way): heights for way, heights in series.items()
                     if all(math.isfinite(bar.value) for bar in heights)
                     and self.ways.look(way) is not None}  # fmt: skip
            if drawn:
                chart = bars(drawn, groups, "spread", right=self.right("spread"),
                             styles=self.ways.looks)  # fmt: skip
                blocks.append(Drawing(chart, f"spread {title}"))
        if blocks:
            samples = [w for w in self.ways.main if w.cell.is_sample and not w.together]
            blocks.append(self.table(samples, LAW, {"spread": 1, "fair_speckle": 0}))
            text = (
                "**Spread** is Var(sample - mean) / Var(truth - mean): an average of 1 can hide "
                "samples that are too wild in the sky and too tame in the leaves. Sixths are from "
                "the calmest to the busiest."
            )
            right = "1 everywhere, the truth's coherence, and a fair speckle of 0."
            yield Section("Is a sample a sample?", text, blocks, right)

    def density(self) -> Iterator[Section]:
        """Whether samples keep their law when other numbers of pixels are asked."""
        whole = self.size**2 - self.known
        ways = [w for w in self.summary.find(known=self.known, together=0) if w == self._stands(w)]
        coarse = [way for way in ways if way.cell.resolution == self.size]
        fine = [way for way in ways if way.cell.resolution > self.size]
        found = {
            key: self.lines(coarse, key, lambda way: way.cell.asked or whole)
            for key in ("spread", "coherence")
        }
        for name, points in self.lines(fine, "spread_fine", lambda w: w.cell.resolution**2).items():
            found["spread"][name] = [*found["spread"].get(name, []), *points]
        blocks: list[Block] = []
        for key, lines in found.items():
            if any(len(points) > 1 for points in lines.values()):
                chart = curves(lines, "pixels asked", key, right=self.right(key), log_x=True,
                               styles=self.ways.looks)  # fmt: skip
                blocks.append(Drawing(chart, f"{key} by the number of pixels asked"))
        if blocks:
            text = (
                "One model, asked for a part of the unknown pixels, for all of them, or for the "
                f"places of a finer grid (more than {whole}): there compared at the distances from "
                "known pixels that the unknown pixels have."
            )
            yield Section("Do samples keep their law at any density?", text, blocks, "Flat lines.")

    def _stands(self, way: Way) -> Way | None:
        """The sample that stands for a model's others where a way is."""
        cell = way.cell
        return self.ways.sample(
            cell.checkpoint, resolution=cell.resolution, known=cell.known, asked=cell.asked
        )

    def shares(self) -> Iterator[Section]:
        """What more known pixels are worth."""
        every = self.summary.find(resolution=self.size, asked=0, together=0)
        ways = [w for w in every if not w.cell.is_sample or w == self._stands(w)]
        lines = self.lines(
            ways, "psnr_unknown", lambda way: round(100 * way.cell.known / self.size**2, 1)
        )
        if len({point.x for points in lines.values() for point in points}) < 2:
            return
        title = "PSNR of unknown pixels (dB)"
        drawn = curves(lines, "known pixels (%)", title, styles=self.ways.looks, wide=True)
        text = "Masks are nested: each share keeps the pixels of the smaller ones."
        yield Section("What are more known pixels worth?", text, [Drawing(drawn, title)])

    def enlarged(self) -> Iterator[Section]:
        """Larger images, and what can honestly be said of them."""
        ways = [w for w in self.summary.entries if w.cell.resolution > self.size]
        for size in sorted({way.cell.resolution for way in ways}):
            at = [way for way in ways if way.cell.resolution == size]
            real = any("ssim" in self.summary.entries[way].numbers for way in at)
            blocks: list[Block] = [self.table(at, LARGER, {})]
            if real:
                best = {"psnr": "highest", "ssim": "highest", "lpips": "lowest"}
                blocks.insert(0, self.table(at, REAL, best))
            yield Section(
                f"What are {size} x {size} pixels worth?",
                f"The model is asked at the pixel centres of {size} x {size}; nothing is scaled up."
                " The **rival** is the same model's answer at its own size, enlarged by bicubic. "
                "**Reduced**: PSNR against the truth after a reduction by area; **against its "
                "own**: the same against the model's own smaller answer; **bicubic**: agreement "
                "with the truth enlarged by bicubic, which is no truth.",
                blocks + self.larger_pictures(size),
                "PSNR, SSIM and LPIPS are against the real images of this size." if real else
                "There is no true image of this size. Reduced again, an answer should be the "
                "truth, and its own smaller answer.",
            )  # fmt: skip

    def larger_pictures(self, size: int) -> list[Block]:
        """The first images at a larger size, whole and in part."""
        kinds = (self.ways.mean, self.ways.sample)
        found = [kind(name, resolution=size) for name in self.ways.checkpoints for kind in kinds]
        ways = [way for way in found if way is not None]
        images = self.pictured(ways, SHOWN // 2)
        answers = self.answers(ways, images)
        if not answers:
            return []
        columns = {"truth": [self.pictures.truth[i] for i in images]} | answers
        rows = [f"image {i}" for i in images]
        parts = {title: crop(found, CROP) for title, found in columns.items()}
        return [
            ImageSheet(columns=columns, rows=rows, box=CROP, tile=128),
            ImageSheet(columns=parts, rows=rows, title="The part in the box", tile=128),
        ]

    def certainty(self) -> Iterator[Section]:
        """Whether samples tell how sure they are."""
        # Of each model the sampler that stands for the others.
        ways = [w for w in self.ways.main if w.together and self.summary.entries[w].reliability]
        bins, styles = {}, {}
        for way in ways:
            look, name = self.ways.look(way), f"{self.ways.series(way)}, {way.together} samples"
            if look is not None:
                found = zip(*self.summary.entries[way].reliability, strict=True)
                bins[name], styles[name] = Bins(*map(np.array, found)), look
        if not bins:
            return
        chart = calibration(bins, "in [0, 1]", styles=styles)
        text = (
            "Pixels by how much several samples of them deviate, against how far the samples' mean "
            "is off. The fewer the samples, the more a small deviation is luck: from few samples "
            "the left end lies too high and the right end too low even where all is right."
        )
        blocks = [Drawing(chart, "predicted and observed error"), *self.deviations(ways)]
        yield Section("Do samples know how sure they are?", text, blocks, "On the diagonal.")

    def deviations(self, ways: Sequence[Way]) -> list[Block]:
        """Maps of how much samples deviate, on one scale for all models."""
        images = self.pictured(ways, SHOWN)
        maps: dict[Way, list[np.ndarray]] = {}
        for way in ways:
            kept = [self.pictures.deviations.get((way, i)) for i in images]
            arrays = [np.array(one).reshape(self.size, -1) for one in kept if one is not None]
            if arrays and len(arrays) == len(images):
                maps[way] = arrays
        if not maps:
            return []
        high = max(float(one.max()) for found in maps.values() for one in found)
        scale = Scale("standard deviation of the samples", 0.0, max(round(high, 2), 0.01))
        columns = {"truth": [self.pictures.truth[i] for i in images],
                   "known pixels": [self.pictures.given(i) for i in images]}  # fmt: skip
        for way, found in maps.items():
            columns[self.ways.series(way)] = [heat(one, scale) for one in found]
        rows = [f"image {i}" for i in images]
        return [ImageSheet(columns=columns, rows=rows, scale=scale, title="Where samples deviate")]

    def extremes(self) -> Iterator[Section]:
        """Best, median and worst images of the last model's posterior mean."""
        names = self.ways.checkpoints
        way = self.ways.mean(names[-1]) if names else None
        if way is None:
            return
        values = self.summary.values(way, "psnr_unknown")
        kept = self.pictured(self.answered, len(self.pictures.truth))
        ranked = sorted((i for i in kept if i in values), key=lambda i: values[i])
        if len(ranked) < SHOWN:
            return
        middle = len(ranked) // 2
        chosen = [*ranked[:-3:-1], *ranked[middle - 1 : middle + 1][::-1], *ranked[1::-1]]
        places = ["best", "second", "median", "median", "second worst", "worst"]
        rows = [f"{name}: {values[i]:.1f} dB" for name, i in zip(places, chosen, strict=True)]
        text = (
            f"By PSNR of unknown pixels of {self.ways.label(way)}, among the {len(ranked)} images "
            "whose pictures were kept."
        )
        sheet = ImageSheet(columns=self.columns(chosen), rows=rows)
        yield Section("Where is it good, and where not?", text, [sheet])

    def failures(self) -> Iterator[Section]:
        """Rows without an answer."""
        if self.failed:
            rows = [[self.ways.label(one.way), str(one.rows), one.error] for one in self.failed]
            text = "These rows are in no number above; `--retry-errors` does them again."
            table = Table(["method", "rows", "the first says"], rows, self.about)
            yield Section("What failed?", text, [table])

    def numbers(self) -> list[KeyNumber]:
        """The numbers that answer the question."""
        means = {name: self.ways.mean(name) for name in self.ways.checkpoints}
        found = [
            KeyNumber(_with_error(self.summary.entries[way], "psnr"), f"{name}, posterior mean",
                      "PSNR, dB")
            for name, way in means.items() if way is not None
        ]  # fmt: skip
        removed = self.speckle_removed()
        if removed is not None:
            first, second = self.ways.checkpoints
            what = "gone in" if removed >= 0 else "on top in"
            label = f"of {first}'s speckle {what} {second}'s samples"
            found.append(KeyNumber(f"{100 * abs(removed):.0f} %", label))
        return found

    def speckle_removed(self) -> float | None:
        """The share of the first model's speckle that the second one's samples do not have."""
        if len(self.ways.checkpoints) != 2:
            return None
        ways = [self.ways.sample(name) for name in self.ways.checkpoints]
        before, after = (
            -math.inf if way is None else self.ways.number(way, "speckle") for way in ways
        )
        return 1 - after / before if before > 0 and math.isfinite(after) else None

    def answer(self) -> str:
        """Two sentences."""
        names, known = self.ways.checkpoints, 100 * self.known / self.size**2
        parts = [
            f"{self.ways.label(way)} {_with_error(self.summary.entries[way], 'psnr')} dB"
            for way in [*(self.ways.mean(name) for name in names), self.ways.best_fill]
            if way is not None
        ]
        # Of an evaluation without an answer of the data's own size there is no such number.
        first = f"From {known:.0f} % of the pixels: {', '.join(parts) or 'see below'}."
        removed = self.speckle_removed()
        if removed is None:
            return first
        a, b = names
        ours, theirs = self.ways.mean(b), self.ways.mean(a)
        found = (
            {} if ours is None or theirs is None else self.summary.difference(ours, theirs, "psnr")
        )
        gain = f"{b} gains {found['psnr']:.2f} dB on {a}, image by image, and" if found else b
        if found and found["psnr"] < 0:
            gain = f"{b} loses {-found['psnr']:.2f} dB to {a}, image by image, and"
        return f"{first} {gain} has {100 * (1 - removed):.0f} % of its speckle in one sample."


def _with_error(entry: Entry, key: str) -> str:
    value, error = entry.numbers.get(key), entry.numbers.get(f"{key}_se")
    if value is None:
        return "none"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
