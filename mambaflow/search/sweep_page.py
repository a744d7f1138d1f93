"""The page of a sweep: its questions in order, each with what the ledger says of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from mambaflow.report.figures import Bar, Point, bars, curves, scatter
from mambaflow.report.page import Block, Drawing, KeyNumber, Page, RankedTable, Section
from mambaflow.report.palette import HUES, Look, looks
from mambaflow.report.tables import Table
from mambaflow.search.board import Trial
from mambaflow.search.effects import Field, label
from mambaflow.search.findings import Findings, front
from mambaflow.search.trial_figures import flops, psnr, rate, told

SEARCHED, BASE = "proposed", "base, other seeds"
# Signs that are not a line's, since the points are not joined.
LOOKS = looks({SEARCHED: SEARCHED, BASE: BASE})
PSNR = "PSNR (dB)"
RANK = (PSNR, "budget spent", "status")
COSTS = (PSNR, "budget spent", "parameters", "TFLOPs", "samples/s")
UNITS = {
    "samples": "the same number of samples",
    "flops": "the same number of FLOPs of training",
    "seconds": "the same time of training",
}


class SweepPage:
    """What is shown of a sweep.

    Args:
        about: what every table says of where its numbers are from.
        facts: the same at length, at the page's end.
    """

    def __init__(self, findings: Findings, about: str, facts: Mapping[str, str]) -> None:
        self.findings, self.about, self.facts = findings, about, facts
        self.board = findings.board
        # Where none has a rank, as where all failed, the first that ever had a number.
        every = self.board.ranked or [t for t in self.board.trials.values() if told(t)]
        shown = [findings.called(trial) for trial in every[: len(HUES)]]
        self.looks: dict[str, Look] = looks({name: name for name in shown})

    def page(self) -> Page:
        """All of it."""
        sections = [section for make in self.questions for section in make()]
        config, summary = self.findings.config, f"{self.answer()} {self.progress()}"
        title = f"{config.run.run_name}, a sweep of {config.search.space}"
        return Page(title, summary, sections, self.numbers(), self.facts, self.looks)

    @property
    def questions(self) -> Sequence[Callable[[], Iterator[Section]]]:
        """Each yields its section where the ledger answers it."""
        return (
            self.best, self.noise, self.fields, self.stages, self.size, self.learning,
            self.stopped, self.time, self.failures,
        )  # fmt: skip

    # --- What stands above the sections ---

    def answer(self) -> str:
        """A few sentences, with the answer in numbers."""
        found, best = self.findings, self.board.best
        if best is None:
            return "No proposed trial has spent its whole budget yet, so that none is the best."
        values = [f"{found.short(n)} {label(found.value(best, n))}" for n in self._varied]
        of = best.label or ", ".join(values)
        which = f"{best.name} ({of})" if of else best.name
        return f"The best is trial {which}: **{_psnr(best)} dB**. {self.verdict()}"

    @property
    def _varied(self) -> list[str]:
        """The fields that a table of trials has; runs of a list have names instead."""
        return [] if self.findings.is_listed else self.findings.fields

    def verdict(self) -> str:
        """Whether the gain over the base is more than the noise of seeds."""
        found = self.findings
        if self.board.best is not None and found.is_base(self.board.best):
            return "It is the base configuration: nothing that was tried is better."
        if not math.isfinite(found.gain):
            return "No run of the base configuration has ended, so that its gain is not known."
        gain = f"That is {_signed(found.gain)} dB against the base"
        if found.noise is None:
            return (
                f"{gain}; how much seeds alone vary is not known, so neither is what it is worth."
            )
        return f"{gain}, {self._luck()}"

    def _luck(self) -> str:
        """The gain beside what the best of many would gain by luck."""
        found = self.findings
        of = f"the best of {found.rivals} equals of the base would have"
        if found.gain > found.bound:
            return f"more than {of} by luck ({found.bound:.2f} dB in one sweep of twenty, at most)."
        if found.gain > found.luck:
            return (
                f"more than {of} by luck on average ({found.luck:.2f} dB). To be certain of it, "
                f"with so few runs of the base, would take {found.bound:.2f} dB."
            )
        return f"no more than {of} by luck on average ({found.luck:.2f} dB)."

    def progress(self) -> str:
        """Where the sweep stands."""
        seeds = len(self.board.trials) - len(self.findings.searched)
        told = f"{len(self.findings.searched)} of {self.board.wanted} configurations were tried"
        base = f", and the base with {seeds} other seed{'s' * (seeds > 1)}" if seeds else ""
        return f"{told}{base}: {self._counts()}."

    def _counts(self) -> str:
        counts = sorted(self.board.counts().items())
        return ", ".join(f"{count} {status}" for status, count in counts) or "no trial yet"

    def numbers(self) -> list[KeyNumber]:
        """The numbers that answer the questions."""
        return [*self._quality(), *self._effort()]

    def _quality(self) -> Iterator[KeyNumber]:
        found, best = self.findings, self.board.best
        if best is None:
            return
        error = best.last.error if best.last else math.nan
        note = f"± {error:.2f} over images" if math.isfinite(error) else "PSNR"
        yield KeyNumber(f"{psnr(best):.2f} dB", f"trial {best.name}, the best", note)
        noise, gain = found.noise, f"{_signed(found.gain)} dB"
        if found.is_base(best):
            yield KeyNumber("0.00 dB", "gained on the base", "the best is the base itself")
        elif noise is not None and noise.deviation > 0:
            value = f"{_signed(found.gain / noise.deviation, 1)} x"
            note = f"{gain}; noise {noise.deviation:.3f} dB, from {noise.runs} runs"
            yield KeyNumber(value, "the noise of seeds, gained on the base", note)
        elif math.isfinite(found.gain):
            yield KeyNumber(gain, "gained on the base", "the noise of seeds is not known")

    def _effort(self) -> Iterator[KeyNumber]:
        yield KeyNumber(str(len(self.board.trials)), "trials", self._counts())
        time = self.findings.time
        if time.places > 0:
            share = 100 * time.share(time.training)
            note = f"the rest of wall time x {_at_once(self.board.concurrent)}: see below"
            yield KeyNumber(f"{share:.0f} %", f"of {_long(time.wall)} was training", note)

    # --- The questions ---

    def best(self) -> Iterator[Section]:
        """The ranking."""
        text = (
            f"Every trial was given {UNITS[self.findings.config.search.budget]}. Those that spent "
            "more of it stand above those that were stopped before: numbers at different shares "
            "do not compare. The standard error is over validation images, which are the same for "
            "all trials: it tells how far the number is from that of all images, and not how far "
            "two trials are apart."
        )
        if not self.board.trials:
            text = "No trial has been proposed yet."
        table = self.table([*RANK, *self._varied], self.told)
        blocks = [RankedTable(table, {PSNR: "highest"})] if table.rows else []
        yield Section("Which configuration is best?", text, blocks)

    def ranking(self) -> Table:
        """All trials but those that failed, the best first, with all that a row can say."""
        return self.table([*self._varied, *COSTS, "status"], self.told)

    @property
    def told(self) -> list[Trial]:
        """All trials but those that failed, the best first; those without a number at the end."""
        ranked = self.board.ranked
        names = {trial.name for trial in ranked}
        others = [t for t in self.board.trials.values() if t.name not in names]
        return ranked + [trial for trial in others if trial.status != "failed"]

    def table(self, columns: Sequence[str], trials: Sequence[Trial]) -> Table:
        """Some trials: columns are fields of a run, or of those that every trial has."""
        called = self.findings.called
        rows = [[called(trial), *(self._cell(trial, name) for name in columns)] for trial in trials]
        heading = [self.findings.short(n) if n in self.findings.fields else n for n in columns]
        return Table(["trial", *heading], rows, self.about)

    def _cell(self, trial: Trial, column: str) -> str:
        found = self.findings
        if column in found.fields:
            return label(found.value(trial, column))
        makers: dict[str, Callable[[], str]] = {
            PSNR: lambda: _psnr(trial),
            "budget spent": lambda: f"{100 * trial.share:.0f} %",
            "parameters": lambda: f"{trial.parameters:,}",
            "TFLOPs": lambda: _number(flops(trial) / 1e12),
            "samples/s": lambda: _number(rate(trial)),
            "s / image": lambda: _number(found.seconds.get(trial.name, math.nan)),
            "status": lambda: found.status(trial),
            "cause": lambda: " ".join(trial.cause.split()) or "not told",
        }
        return makers[column]()

    def noise(self) -> Iterator[Section]:
        """The base's runs beside the best trial."""
        found = self.findings
        if not self.board.best:
            return
        runs = found.base_runs
        rows = [
            ["base" if trial.kind == "search" else "base, another seed", trial.name, _psnr(trial)]
            for trial in runs
        ]
        if not found.is_base(self.board.best):
            rows.append(["best", self.board.best.name, _psnr(self.board.best)])
        table = Table(["what", "trial", PSNR], rows, self.about)
        yield Section("Is that more than the noise of seeds?", self._noise_text(), [table])

    def _noise_text(self) -> str:
        noise = self.findings.noise
        if noise is None:
            return (
                f"{self.verdict()} It takes two finished runs of the base configuration with "
                "different seeds to see how much the score varies by itself: ask for more of them "
                "with `--seed-trials`."
            )
        low, high = noise.interval
        return (
            f"{self.verdict()} {noise.runs} runs of the base configuration have "
            f"{noise.mean:.2f} dB on average and a standard deviation of **{noise.deviation:.3f} "
            f"dB** from seed to seed ({_degrees(noise.freedom)}). It is itself uncertain: anything "
            f"from {low:.3f} to {high:.3f} dB is in keeping with these runs, and more of them "
            "(`--seed-trials`) would tell better. Two single runs differ by "
            f"{math.sqrt(2) * noise.deviation:.3f} dB by chance. The best of many is also the "
            "luckiest: with another seed its score is likely to fall a little."
        )

    def fields(self) -> Iterator[Section]:
        """The effects of each field's values."""
        found = self.findings
        if found.is_listed or not found.fields:
            return
        effects = found.effects
        good = [field for field in effects.fields if field.identifiable]
        blocks: list[Block] = []
        if good:
            ordered = sorted(good, key=lambda field: -field.range)
            blocks = [self._importance(ordered), *self._multiples(ordered)]
        if effects.fields:
            blocks.append(self._effects_table(effects.fields))
        yield Section("What does each field do?", self._effects_text(), blocks)

    def _effects_text(self) -> str:
        effects = self.findings.effects
        if not effects.fields:
            return (
                "Too few proposed trials have come far enough to tell what these do: "
                f"{', '.join(self._not_told())}."
            )
        text = (
            f"From the {effects.trials} proposed trials that {self._spent()}: PSNR there as a mean "
            "plus one number for each value of each field, by least squares. A number is the "
            "effect of a value against the mean of its field's values, in dB. The model knows "
            "nothing of fields that help one another."
        )
        if effects.freedom:
            text += (
                f" What it leaves over has a standard deviation of {effects.residual:.3f} dB "
                f"({_degrees(effects.freedom)}), from which the standard errors are."
            )
        else:
            text += (
                " **There are too few of them to tell noise from effects**: errors are not known."
            )
        lost = self._not_told()
        text += f" The trials do not tell what these do: {', '.join(lost)}." if lost else ""
        return text + self._caveat()

    def _spent(self) -> str:
        share = self.findings.compared_at
        return (
            "spent their whole budget"
            if share == 1
            else f"spent {100 * share:.0f} % of their budget"
        )

    def _caveat(self) -> str:
        """What stopping trials early does to the effects."""
        if self.findings.compared_at < 1:
            return (
                "\n\nThat is the first rung: too few spent all of it to tell, and here those too "
                "count that were stopped. What helps early may not be what helps in the end."
            )
        if not self.board.with_status("stopped"):
            return ""
        return (
            "\n\nTrials that were stopped early are not in it. They are those that fell behind, "
            "so that values that are often bad are seen too seldom, and their effects are likely "
            "larger than shown."
        )

    def _not_told(self) -> list[str]:
        """Fields whose values the finished trials do not tell apart."""
        found = self.findings
        known = {field.name for field in found.effects.fields if field.identifiable}
        return [found.short(name) for name in found.fields if name not in known]

    def _importance(self, ordered: Sequence[Field]) -> Drawing:
        noise = self.findings.compared_noise
        right = {} if noise is None else {"noise of seeds": noise.deviation}
        heights = [Bar(one.range, _known(one.range_error)) for one in ordered]
        groups = [self.findings.short(one.name) for one in ordered]
        chart = bars({"range": heights}, groups, "best value less worst value (dB)", right=right,
                     wide=True)  # fmt: skip
        caption = (
            "Noise makes every range a little larger. The line is the noise of one run; an effect "
            "is the mean of several and may be real below it, if it is several of its own errors."
        )
        return Drawing(chart, "importance of each field beside the noise of seeds", caption)

    def _multiples(self, ordered: Sequence[Field]) -> Iterator[Drawing]:
        """A figure for each field, all of one scale."""
        ends = [
            effect.mean + side * (_known(effect.error) or 0)
            for field in ordered for effect in field.effects for side in (-1, 1)
        ]  # fmt: skip
        low, high = min(*ends, 0.0), max(*ends, 0.0)
        pad = 0.08 * (high - low) or 1.0
        for field in ordered:
            heights = [Bar(one.mean, _known(one.error)) for one in field.effects]
            groups = [f"{one.label} ({one.count})" for one in field.effects]
            chart = bars({"effect": heights}, groups, "dB against the mean of the field",
                         x="value (trials)", reach=(low - pad, high + pad))  # fmt: skip
            yield Drawing(chart, self.findings.short(field.name))

    def _effects_table(self, fields: Sequence[Field]) -> Table:
        rows = [
            [self.findings.short(field.name), one.label, str(one.count),
             _effect(one.mean, one.error)]
            for field in fields for one in field.effects
        ]  # fmt: skip
        return Table(["field", "value", "trials", "effect (dB)"], rows, self.about)

    def stages(self) -> Iterator[Section]:
        """Runs that were listed, each beside the one before."""
        found = self.findings
        if not found.is_listed:
            return
        blocks: list[Block] = [self.staged()]
        known = [one for one in found.stages if math.isfinite(one.difference)]
        if known:
            heights = {"difference": [Bar(one.difference) for one in known]}
            chart = bars(heights, [one.label or one.trial for one in known],
                         "difference to the stage before (dB)", right=self._chance(),
                         wide=True)  # fmt: skip
            blocks.append(Drawing(chart, "what each stage adds"))
        text = (
            "The runs were listed, each with something changed to the one before. There is one run "
            "of each: a difference that is not well beyond what two runs differ by with other "
            "seeds tells nothing."
        )
        yield Section("What does each stage add?", text, blocks)

    def staged(self) -> Table:
        """The runs of a list in its order, with what was changed; empty of a product."""
        stages = self.findings.stages if self.findings.is_listed else []
        rows = [
            [f"{one.trial} {one.label}", one.change, _number(one.psnr, 2), _signed(one.difference)]
            for one in stages
        ]
        heading = ["trial", "changed to the one before", PSNR, "difference (dB)"]
        return Table(heading, rows, self.about)

    def _chance(self) -> dict[str, float]:
        noise = self.findings.noise
        if noise is None:
            return {}
        two = math.sqrt(2) * noise.deviation
        return {"noise of two runs": two, "the same below": -two}

    def size(self) -> Iterator[Section]:
        """PSNR by what it costs."""
        found = self.findings
        costs = {
            "parameters (millions)": found.parameters,
            "seconds per image (one thread)": found.seconds,
        }
        blocks: list[Block] = [
            drawing for axis, of in costs.items() for drawing in self._cost(axis, found.points(of))
        ]
        if blocks:
            text = (
                "Trials that spent their whole budget. The staircase is the **Pareto front**: the "
                "best that is to be had for at most that cost. A step of it that is smaller than "
                f"the noise of seeds may be luck. {self._timing_text()}"
            )
            columns = [*COSTS, "s / image"] if found.seconds else COSTS
            costs_table = self.table(columns, self.told)
            caption = (
                f"{self.about}\n\nTFLOPs: of the training that was done, forward and backward. "
                "Samples/s: of training, validation included."
            )
            blocks.append(replace(costs_table, caption=caption))
            yield Section("What does size cost?", text, blocks)

    def _cost(self, axis: str, points: Sequence[tuple[float, float, str]]) -> Iterator[Drawing]:
        kinds = {name: self.board.trials[name].kind for *_, name in points}
        series = {
            SEARCHED: [Point(x, y) for x, y, name in points if kinds[name] == "search"],
            BASE: [Point(x, y) for x, y, name in points if kinds[name] != "search"],
        }
        series = {name: found for name, found in series.items() if found}
        if not series:
            return
        best = front(points)
        drawn = scatter(series, axis, PSNR, front=[Point(x, y) for x, y, _ in best],
                        log_x=True, styles=LOOKS)  # fmt: skip
        told = "; ".join(f"{name} ({x:.3g}, {y:.2f} dB)" for x, y, name in best)
        yield Drawing(drawn, f"PSNR by {axis.partition(' (')[0]}", f"On the front: {told}.")

    def _timing_text(self) -> str:
        timing = self.findings.timing
        if timing is None:
            return "Seconds per image were not measured for this report."
        if not timing.seconds:
            cause = next(iter(timing.left_out.values()), "no trial has ended")
            return f"Seconds per image are not known: no checkpoint could be timed ({cause})."
        count = len(timing.left_out)
        left = f" Of {count} others no checkpoint could be loaded." if count else ""
        return (
            f"Seconds per image are of the posterior mean of {timing.images} images of "
            f"{timing.size} x {timing.size} pixels at a time, by the newest checkpoints of the "
            f"{len(timing.seconds)} best trials, on one CPU thread of the machine that made this "
            f"report: models took turns, and the least time of each counts.{left}"
        )

    def learning(self) -> Iterator[Section]:
        """PSNR along the budget."""
        every = [trial for trial in self.board.trials.values() if told(trial)]
        lines = {self.findings.called(trial): _line(trial) for trial in every}
        if not any(len(points) > 1 for points in lines.values()):
            return
        named = {name: lines[name] for name in self.looks}
        behind = [points for name, points in lines.items() if name not in named]
        shares = [round(100 * rung.share, 1) for rung in self.findings.rungs]
        chart = curves(named, "budget spent (%)", "PSNR on validation images (dB)", behind=behind,
                       upright=shares, styles=self.looks, wide=True)  # fmt: skip
        grey = "Grey: all other trials; a line ends with a mark at its last report."
        rungs = " Dashed upright lines: where trials were stopped." if shares else ""
        text = (
            f"Coloured: {'the best' if self.board.ranked else 'the first'} {len(named)}. The "
            "learning rate falls to zero along the budget, so that much of a gain comes late."
        )
        drawing = Drawing(chart, "learning curves", grey + rungs)
        yield Section("How did they learn?", text, [drawing])

    def stopped(self) -> Iterator[Section]:
        """What stopping early may have cost."""
        rungs = self.findings.rungs
        if not rungs:
            return
        heading = ["rung", "budget spent", "trials there", "stopped", "best stopped (dB)",
                   "it lacked (dB)", "most gained later (dB)", "could have been best",
                   "rank correlation"]  # fmt: skip
        rows = [
            [str(one.number), f"{100 * one.share:.0f} %", str(one.reached), str(one.stopped),
             _number(one.best_stopped, 2), _number(one.need, 2), _number(one.most, 2),
             str(one.possible), _number(one.agreement, 2)]
            for one in rungs
        ]  # fmt: skip
        table = Table(heading, rows, self.about)
        right = "No stopped trial could have been the best, and a rank correlation of 1."
        yield Section("What was stopped early, and was that fair?", self._fair(), [table], right)

    def _fair(self) -> str:
        rungs = self.findings.rungs
        stopped, possible = sum(r.stopped for r in rungs), sum(r.possible for r in rungs)
        return (
            f"{stopped} trials were stopped because others were ahead of them at the same share of "
            f"the budget. {_possible(possible)} What it **lacked** is the best trial's final PSNR "
            "less that of the best one stopped there; **most gained later** is what a trial that "
            "went to the end gained from there on at most. The **rank correlation** is between "
            "scores there and at the end, of trials that went to the end: of those that were "
            "stopped nobody knows the end, so that it speaks of the better ones alone. Trials that "
            "came early to a rung went on with fewer others to be compared with."
        )

    def time(self) -> Iterator[Section]:
        """Where the time went."""
        time = self.findings.time
        if time.places <= 0:
            return
        parts = {
            "training and validation": time.training,
            "beginning, until the first step": time.beginning,
            "saving and telling": time.besides,
            "places without a trial, and work not told of": time.rest,
        }
        rows = [
            [name, f"{seconds / 60:,.1f}", f"{100 * time.share(seconds):.1f} %"]
            for name, seconds in parts.items()
        ]
        table = Table(["what", "minutes", "share"], rows, self.about)
        yield Section("Where did the time go?", self._time_text(), [table, *self._beginnings()])

    def _time_text(self) -> str:
        board, time = self.board, self.findings.time
        drivers = f"{board.starts} drivers" if board.starts > 1 else "One driver"
        return (
            f"{drivers} ran for {_long(time.wall)}, with places for {_at_once(board.concurrent)}: "
            f"{_long(time.places)} of places. What a trial did after its last report, before it "
            "was lost or stopped from outside, nobody told: it stands in the last row."
        )

    def _beginnings(self) -> Iterator[Table]:
        found = [(t, t.beginnings) for t in self.board.trials.values() if t.beginnings]
        if found:
            rows = [
                [
                    trial.name,
                    str(trial.starts),
                    f"{sum(own) / len(own):.1f}",
                    f"{trial.seconds:.0f}",
                ]
                for trial, own in found
            ]
            heading = ["trial", "starts", "beginning (s)", "training (s)"]
            yield Table(heading, rows, self.about)

    def failures(self) -> Iterator[Section]:
        """Trials that failed."""
        failed = self.failed()
        if failed.rows:
            text = "These trials are in no number above but those of time and counts."
            yield Section("What failed?", text, [failed])

    def failed(self) -> Table:
        """Trials that failed, with their causes."""
        columns = ["budget spent", *self._varied, "cause"]
        return self.table(columns, self.board.with_status("failed"))


def _line(trial: Trial) -> list[Point]:
    return [Point(round(100 * report.share, 1), report.psnr) for report in told(trial)]


def _known(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _psnr(trial: Trial) -> str:
    value = psnr(trial)
    if not math.isfinite(value):
        return "" if trial.last is None else "none"
    error = trial.last.error if trial.last else math.nan
    return f"{value:.2f} ± {error:.2f}" if math.isfinite(error) else f"{value:.2f}"


def _number(value: float, decimals: int | None = None) -> str:
    """Three digits, or so many decimals; nothing where there is no number."""
    if not math.isfinite(value):
        return ""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _signed(value: float, decimals: int = 2) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:+.{decimals}f}".replace("-", "−")


def _effect(value: float, error: float = math.nan) -> str:
    if not math.isfinite(value):
        return "not told"
    # A digit more than a PSNR has: an effect is the mean of several trials.
    known = _signed(value, 3)
    return f"{known} ± {error:.3f}" if math.isfinite(error) else known


def _degrees(count: int) -> str:
    return f"{count} degree{'s' if count > 1 else ''} of freedom"


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _at_once(count: int) -> str:
    return f"{count} trials at once" if count > 1 else "one trial at a time"


def _possible(count: int) -> str:
    if not count:
        return (
            "None of them would have become the best, had it gained from there on as much as the "
            "trial that gained the most: as far as is known, nothing was lost."
        )
    return (
        f"**{count}** of them would have become the best, had they gained from there on as much as "
        "the trial that gained the most: that is possible, not likely."
    )
