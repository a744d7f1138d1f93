"""The rows of one unit of an evaluation: what an actor makes, wherever it runs.

A row is a function of its key and of what the fingerprint holds. So noise is drawn from the id of
its image, and the images of a group are always answered together: those that nobody asked for
are computed and dropped, since the company of an image may move its last bits.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from mambaflow.checks import require
from mambaflow.data.batches import Layout
from mambaflow.data.pixels import grid
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.cells import Key, Unit, group_size, order
from mambaflow.evaluation.complete import EvalSet, Images, complete, fill
from mambaflow.evaluation.enlarge import paint
from mambaflow.evaluation.fine_spread import FineSpread
from mambaflow.evaluation.metrics import Scores
from mambaflow.evaluation.perceptual import Perceptual
from mambaflow.evaluation.quality import psnr
from mambaflow.evaluation.reliability import Reliability
from mambaflow.evaluation.rows import Row, row
from mambaflow.evaluation.scored_images import Completion
from mambaflow.evaluation.super_resolution import enlarged_scores
from mambaflow.flow.samplers import SOLVERS
from mambaflow.models.velocity_field import VelocityField
from mambaflow.models.weights import load_model
from mambaflow.report.pictures import to_png

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that rows depend on besides their keys, as an actor anywhere needs it."""

    data: str
    split: str
    checkpoints: Mapping[str, str]
    """Name -> address of the very checkpoint."""
    edges: Mapping[int, tuple[float, ...]]
    """Known pixels -> edges of the sextiles of activity."""
    lpips: str
    """As in EvaluateConfig; "none" for no LPIPS."""
    truth: str
    pictures: frozenset[int]
    """Ids of the images whose pictures are kept."""
    device: str = "cpu"
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Images that are answered together, as a checkpoint wants them."""

    checkpoint: str
    """Empty for a classical fill."""
    known: int
    asked: int
    number: int
    """Of the group, among those of its size."""
    size: int

    @classmethod
    def of(cls, unit: Unit, size: int) -> "Group":
        """The images of a unit, of data with `size` pixels on a side."""
        cell = unit.cell
        checkpoint = "" if cell.is_fill else cell.checkpoint
        together = group_size(cell.resolution, size)
        return cls(checkpoint, cell.known, cell.asked, unit.group, together)


class Answerer:
    """Makes the rows of units, with every checkpoint loaded once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.held_out = ShardSet(job.data, job.split)
        self.size = self.held_out.spec.size
        self.order = order(len(self.held_out))
        self.perceptual = perceptual(job.lpips)
        self._model = lru_cache(maxsize=None)(self._load)
        # Of the last few groups: samplers that follow one another have the images of a group in
        # common, and the mean that their samples are measured against.
        self._images = lru_cache(maxsize=4)(self._read)
        self._mean = lru_cache(maxsize=4)(self._make_mean)

    def rows(self, unit: Unit) -> list[Row]:
        """The rows that the unit asks for; where an answer fails, its rows say why."""
        try:
            with torch.no_grad():
                found = dict(self._rows(unit))
            return [found[key] for key in unit.keys]
        except Exception as failure:  # whatever it is, it is kept, counted and told
            # The first line says what; some go on for pages.
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
            log.warning("%s, group %d failed: %s", unit.cell, unit.group, error)
            return [row(key, error) for key in unit.keys]

    def _rows(self, unit: Unit) -> Iterator[tuple[Key, Row]]:
        if unit.cell.resolution == self.size:
            return self._completed(unit)
        return self._enlarged(unit)

    def _load(self, name: str) -> VelocityField:
        return load_model(self.job.checkpoints[name], device=self.job.device)[0]

    def _read(self, group: Group) -> EvalSet:
        spec = self.held_out.spec
        layout = Layout(spec.size, group.known, spec.target)
        if group.checkpoint:
            config = self._model(group.checkpoint).config
            layout = replace(Layout.of(spec, config), known=group.known)
        rows = self.order[group.number * group.size :][: group.size]
        edges = np.array(self.job.edges[group.known])
        images = EvalSet.of_rows(self.held_out, layout, rows, edges)
        return images.asking(group.asked) if group.asked else images

    def _make_mean(self, group: Group) -> Completion:
        return complete(self._model(group.checkpoint), self._images(group), SOLVERS["mean"])

    def _completed(self, unit: Unit) -> Iterator[tuple[Key, Row]]:
        """Answers at the size of the data: unknown pixels are asked, known ones are copied."""
        images, answers = self._images(Group.of(unit, self.size)), {}
        for number in _drawn(unit.samples):
            answers[number] = self._answer(unit, images, number)
            if number in unit.samples:
                yield from self._scored(unit, images, number, answers[number])
        for number in unit.samples:
            if number < 0:
                drawn = [answers[i] for i in range(-number)]
                yield from self._together(unit, images, number, drawn)

    def _answer(self, unit: Unit, images: EvalSet, number: int) -> Completion:
        cell, group = unit.cell, Group.of(unit, self.size)
        if cell.is_fill:
            return fill(cell.sampler, images)
        if not cell.is_sample:
            return self._mean(group)
        times, settings = cell.options
        return complete(
            self._model(cell.checkpoint), images, SOLVERS[cell.sampler], cell.steps, grid=times,
            around=self._mean(group), sample=number, **settings,
        )  # fmt: skip

    def _together(
        self, unit: Unit, images: EvalSet, number: int, drawn: list[Completion]
    ) -> Iterator[tuple[Key, Row]]:
        """What several samples of each image come to: their mean, and how they deviate."""
        answers = torch.stack([sample.answer for sample in drawn])  # (draws, m, h, w, 3)
        seconds = sum(sample.seconds for sample in drawn)
        calls = sum(sample.calls or 0 for sample in drawn)
        mean = answers.mean(0)
        whole = images.completion(mean.clamp(0, 1), calls, seconds, None, mean)
        deviation = answers.var(0).mean(-1).sqrt()  # of the three channels together
        for i, (key, found) in enumerate(self._scored(unit, images, number, whole)):
            one = whole.image(i)
            found["reliability"] = (
                Reliability().add(answers[:, i], one.truth[0], one.known[0]).flat()
            )
            if key.image in self.job.pictures:
                found["deviation"] = deviation[i].flatten().tolist()
            yield key, found

    def _enlarged(self, unit: Unit) -> Iterator[tuple[Key, Row]]:
        """Answers on a finer grid: all of its places are asked, and none is copied."""
        images = self._images(Group.of(unit, self.size))
        real = self._real(images, unit.cell.resolution)
        for number in unit.samples:
            start = time.perf_counter()
            answers = self._paint(unit, images, unit.cell.resolution, number)
            seconds = (time.perf_counter() - start) / len(images)
            own = self._paint(unit, images, images.layout.size, number)
            scores = enlarged_scores(
                answers.clamp(0, 1), own.clamp(0, 1), images.truth, real, self.perceptual
            )
            fine = self._fine_spreads(unit, images, answers) if unit.cell.is_sample else []
            for i, image in enumerate(images.ids.tolist()):
                key = Key(unit.cell, image, number)
                values: Row = {name: found[i].item() for name, found in scores.items()}
                values["fine"] = fine[i].flat() if fine else None
                values["picture"] = self._picture(image, number, answers[i].clamp(0, 1))
                yield key, row(key, seconds=seconds, **values)

    def _paint(self, unit: Unit, images: EvalSet, size: int, number: int) -> Images:
        cell = unit.cell
        times, settings = cell.options
        return paint(
            self._model(cell.checkpoint), images, size, cell.resolution, SOLVERS[cell.sampler],
            cell.steps, grid=times, sample=number, **settings,
        )  # fmt: skip

    def _fine_spreads(self, unit: Unit, images: EvalSet, answers: Images) -> list[FineSpread]:
        """Of each image: how its sample lies around the mean, on the fine grid."""
        size, fine = images.layout.size, unit.cell.resolution
        centre = replace(unit, cell=replace(unit.cell, sampler="mean", settings="", nfe=1))
        means = self._paint(centre, images, fine, 0)
        left = images.truth - self._paint(centre, images, size, 0)
        found = []
        for i in range(len(images)):
            known = grid(size)[images.known[i]]
            # In pixels of the coarse grid, whose places are in [0, 1].
            there, here = (size * torch.cdist(grid(n), known).amin(-1) for n in (fine, size))
            rest, real = (answers[i] - means[i]).flatten(0, 1), left[i].flatten(0, 1)
            found.append(FineSpread().add(rest, there, real, here))
        return found

    def _real(self, images: EvalSet, resolution: int) -> Images | None:
        """The real images of a resolution, where there are any."""
        if not self.job.truth:
            return None
        truth = self._truth
        if truth.spec.size != resolution:
            return None
        held = truth.rows(rows_of(truth, images.ids.numpy()), pixels=False)
        return torch.from_numpy(held.images).view(-1, resolution, resolution, 3) / 255

    @cached_property
    def _truth(self) -> ShardSet:
        return ShardSet(self.job.truth, self.job.split)

    def _scored(
        self, unit: Unit, images: EvalSet, number: int, answer: Completion
    ) -> Iterator[tuple[Key, Row]]:
        lpips = self._lpips(answer.prediction, answer.truth)
        for i, image in enumerate(images.ids.tolist()):
            one = answer.image(i)
            # How long it took is no function of the key, and has a column of its own.
            sums = Scores().add(replace(one, seconds=0.0)).flat()
            values: Row = {"scores": sums, "seconds": one.seconds}
            if unit.cell.asked:
                # Of a part of an image only what is of single pixels has a meaning.
                values["psnr_unknown"] = psnr(one.prediction, one.truth, ~one.known).item()
            else:
                values |= _numbers(one) | {"lpips": lpips[i]}
                values["picture"] = self._picture(image, number, one.prediction[0])
            key = Key(unit.cell, image, number)
            yield key, row(key, **values)

    def _lpips(self, a: Images, b: Images) -> Sequence[float | None]:
        if self.perceptual is None:
            return [None] * len(a)
        return self.perceptual.distances(a, b).tolist()

    def _picture(self, image: int, number: int, prediction: torch.Tensor) -> bytes | None:
        # Of several samples the first, and what they come to together.
        if image not in self.job.pictures or number > 0:
            return None
        return to_png((prediction * 255).round().to(torch.uint8).numpy())


def rows_of(split: ShardSet, ids: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """The rows of some images by their ids.

    Raises:
        ValueError: an image that the split does not hold.
    """
    held = split.rows(np.arange(len(split)), pixels=False, images=False).ids
    places = dict(zip(held.tolist(), range(len(held)), strict=True))
    lost = [i for i in ids.tolist() if i not in places]
    require(
        not lost,
        f"truth (={split.storage.uri}) holds none of the images {lost[:3]} ({len(lost)} in all); "
        "stage it from the same source",
    )
    return np.array([places[i] for i in ids.tolist()])


def perceptual(lpips: str) -> Perceptual | None:
    """LPIPS as the flag wants it."""
    if lpips == "none":
        return None
    return Perceptual(None if lpips == "torchvision" else Path(lpips))


def _drawn(samples: Sequence[int]) -> list[int]:
    """The single samples that are needed: those asked for, and those of a mean of many."""
    most = max((-number for number in samples if number < 0), default=0)
    return sorted({*range(most), *(number for number in samples if number >= 0)})


def _numbers(one: Completion) -> dict[str, float]:
    """Of one completed image."""
    report = Scores().add(one).report()
    error = (one.prediction - one.truth).double()
    return {
        **{name: report[name] for name in ("psnr", "psnr_unknown", "ssim")},
        "mse": error.square().mean().item(),
        "mae": error.abs().mean().item(),
    }
