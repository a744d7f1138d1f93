"""Completing held-out images and scoring them: during a run, and once at its end.

The task: the known pixels of the staged masks are given, all others are asked, and the known ones
are copied into the answer. "Posterior mean" is one call at t = 0; "one sample" is Heun's.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mambaflow.checks import require
from mambaflow.config import RunConfig, TrainConfig
from mambaflow.data.batches import Layout, PixelBatch, RowReader
from mambaflow.data.pixels import copy_known, unknown
from mambaflow.data.random_bits import normal
from mambaflow.evaluation.baselines import fill_images
from mambaflow.evaluation.metrics import Calibration, Quality, Speckle
from mambaflow.flow.samplers import CountedVelocity, heun, mean, uniform_times
from mambaflow.models.velocity_field import VelocityField
from mambaflow.report.pictures import only_known, picture
from mambaflow.report.tables import provenance, results_table

BASELINES = ("nearest", "linear", "thin-plate")
CHUNK = 32
SHOWN = 8
Images = Float[Tensor, "m h w 3"]


@dataclass(frozen=True)
class EvalSet:
    """Held-out images with their staged masks."""

    layout: Layout
    images: UInt8[Tensor, "m h w 3"]
    known: Int[Tensor, "m k"]
    ids: Int[Tensor, " m"]

    @classmethod
    def read(cls, reader: RowReader, layout: Layout, count: int) -> "EvalSet":
        """The first `count` images, or all if there are fewer."""
        rows = reader.rows(np.arange(min(count, len(reader))))
        if rows.images is None:
            raise ValueError("held-out shards must hold whole images; stage the data again")
        images = torch.from_numpy(rows.images).view(-1, layout.size, layout.size, 3)
        index = torch.from_numpy(rows.index.astype(np.int64))[:, : layout.known]
        return cls(layout, images, index, torch.from_numpy(rows.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "EvalSet":
        return EvalSet(self.layout, self.images[rows], self.known[rows], self.ids[rows])

    def chunks(self) -> Iterator["EvalSet"]:
        """A few images at a time."""
        for first in range(0, len(self), CHUNK):
            yield self[first : first + CHUNK]

    @property
    def truth(self) -> Images:
        """The images in [0, 1]."""
        return self.images / 255

    @property
    def is_known(self) -> Bool[Tensor, "m h w"]:
        """Which pixels are given."""
        flat = torch.zeros(len(self), self.layout.size**2, dtype=torch.bool)
        return flat.scatter(1, self.known, True).view(self.images.shape[:3])

    @property
    def mask_hash(self) -> str:
        """What two results must share to be compared."""
        return hashlib.sha256(self.known.numpy().astype(np.uint16).tobytes()).hexdigest()[:12]

    def asked(self) -> tuple[PixelBatch, Int[Tensor, "m n"]]:
        """The known pixels, and all others as queries; and which those are."""
        others = unknown(self.known, self.layout.size)
        index = torch.cat((self.known, others), 1)
        colours = self.images.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 3))
        return self.layout.batch(index, colours, self.ids), others

    def painted(self, others: Int[Tensor, "m n"], rgb: Float[Tensor, "m n 3"]) -> Images:
        """Whole images in [0, 1] from the colours of the unknown pixels."""
        known = self.truth.flatten(1, 2)
        whole = copy_known(known, others, self.layout.image(rgb.cpu()))
        return whole.view(self.images.shape)


Solver = Callable[[CountedVelocity, Tensor], Tensor]


def complete(model: VelocityField, eval_set: EvalSet, solver: Solver) -> tuple[Images, int]:
    """The images that a solver makes of (velocity, noise), and the calls it took."""
    device = next(model.parameters()).device
    batch, others = eval_set.asked()
    noise = normal(0, "evaluation", 0, eval_set.ids, 3 * others.shape[1]).view(*others.shape, 3)
    with torch.no_grad():
        velocity = CountedVelocity(model.condition(batch.to(device)))
        rgb = solver(velocity, noise.to(device))
    return eval_set.painted(others, rgb), velocity.calls


def posterior_mean(velocity: CountedVelocity, noise: Tensor) -> Tensor:
    """One call at t = 0."""
    return mean(velocity, noise)


def sampler(steps: int) -> Solver:
    """Heun's method in uniform steps."""
    return lambda velocity, noise: heun(velocity, noise, uniform_times(steps))


@dataclass(frozen=True)
class Answer:
    """What one method made of all held-out images."""

    images: Images
    calls: int
    seconds: float


def answers(model: VelocityField, eval_set: EvalSet, solver: Solver) -> Answer:
    """Complete all images, a few at a time."""
    start = time.perf_counter()
    parts = [complete(model, chunk, solver) for chunk in eval_set.chunks()]
    seconds = (time.perf_counter() - start) / len(eval_set)
    return Answer(torch.cat([p[0] for p in parts]), parts[0][1], seconds)


def score(images: Images, eval_set: EvalSet) -> dict[str, float]:
    """PSNR, SSIM and speckle of completed images."""
    quality = Quality().add(images, eval_set.truth, eval_set.is_known)
    return quality.report() | Speckle().add(images, eval_set.truth).report()


def validate(
    model: VelocityField, eval_set: EvalSet, config: TrainConfig
) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]]:
    """Scores of the posterior mean, and a picture with one sample of a few images."""
    answer = answers(model, eval_set, posterior_mean)
    scores = score(answer.images, eval_set)
    few = eval_set[:SHOWN]
    sample = answers(model, few, sampler(config.sample_steps))
    shown = {"posterior mean": answer.images[:SHOWN], "sample": sample.images}
    named = {f"val/{key}": scores[key] for key in ("psnr", "psnr_unknown", "ssim", "speckle")}
    return named, completion_grid(few, shown)


def completion_grid(
    eval_set: EvalSet, answers: Mapping[str, Images]
) -> UInt8[np.ndarray, "height width 3"]:
    """Truth, known pixels, linear fill, and the answers, side by side."""
    truth = eval_set.images.numpy()
    columns = {
        "truth": truth,
        "known pixels": only_known(truth, eval_set.is_known.numpy()),
        "linear fill": _bytes(baseline("linear", eval_set)),
    }
    return picture(columns | {name: _bytes(images) for name, images in answers.items()})


def _bytes(images: Images) -> UInt8[np.ndarray, "m h w 3"]:
    return (images * 255).round().to(torch.uint8).numpy()


def baseline(name: str, eval_set: EvalSet) -> Images:
    """A classical fill of the same masks."""
    truth = eval_set.truth.flatten(1, 2)
    rgb = truth.gather(1, eval_set.known[..., None].expand(-1, -1, 3))
    filled = fill_images(name, eval_set.known.numpy(), rgb.double().numpy(), eval_set.layout.size)
    return torch.from_numpy(filled).float().clamp(0, 1)


@dataclass(frozen=True)
class FinalReport:
    """The end of a run: rows of the table, what it was measured on, and the picture."""

    rows: dict[str, dict[str, float]]
    facts: dict[str, str | int]
    picture: UInt8[np.ndarray, "height width 3"]

    @property
    def table(self) -> str:
        """The table, with where its numbers come from."""
        shown = ("psnr", "psnr_se", "psnr_unknown", "psnr_unknown_se", "ssim", "nfe", "spread",
                 "coherence", "speckle")  # fmt: skip
        rows = {
            name: {key: row[key] for key in shown if key in row} for name, row in self.rows.items()
        }
        facts = dict(self.facts)
        command, data, seed = (facts.pop(key) for key in ("command", "data", "seed"))
        facts.pop("trained_steps")
        return str(results_table(rows, provenance(str(command), str(data), int(seed), **facts)))

    @property
    def json(self) -> str:
        """The same for programs."""
        return json.dumps({"rows": self.rows, **self.facts}, indent=2) + "\n"


def final_report(
    model: VelocityField, eval_set: EvalSet, config: RunConfig, step: int, trained_steps: int
) -> FinalReport:
    """Score the model and the classical fills on the same images and masks."""
    require(len(eval_set) > 0, "the test split is empty; stage the data with a test split")
    rows = {name: score(baseline(name, eval_set), eval_set) for name in BASELINES}
    best = answers(model, eval_set, posterior_mean)
    one = answers(model, eval_set, sampler(config.train.sample_steps))
    for name, answer in (("posterior mean", best), ("one sample (Heun)", one)):
        scores = score(answer.images, eval_set)
        rows[name] = scores | {"nfe": answer.calls, "seconds": answer.seconds}
    law = Calibration().add(one.images, best.images, eval_set.truth, eval_set.is_known)
    rows["one sample (Heun)"] |= law.report()
    facts: dict[str, str | int] = {
        "command": config.command,
        "data": config.data,
        "seed": config.train.seed,
        "images": len(eval_set),
        "masks": eval_set.mask_hash,
        "training masks": config.train.masks,
        "checkpoint": f"step {step}",
        "trained_steps": trained_steps,
    }
    shown = {"posterior mean": best.images[:SHOWN], "sample": one.images[:SHOWN]}
    return FinalReport(rows, facts, completion_grid(eval_set[:SHOWN], shown))
