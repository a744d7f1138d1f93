"""How good a model is on held-out images: now and then during a run, and once at its end.

"Posterior mean" is one call at t = 0; "one sample" is Heun's. They are different answers: PSNR
rewards the first, the eye the second.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from mambaflow.checks import require
from mambaflow.config import RunConfig, TrainConfig
from mambaflow.evaluation.complete import (
    EvalSet,
    Images,
    Workers,
    complete,
    fill,
    score,
)
from mambaflow.evaluation.metrics import COLUMNS, SAMPLED, VALIDATED
from mambaflow.evaluation.scored_images import Completion
from mambaflow.flow.samplers import SOLVERS
from mambaflow.models.velocity_field import VelocityField
from mambaflow.report.pictures import only_known, picture
from mambaflow.report.tables import provenance, results_table

# The others take seconds an image.
QUICK_FILLS = ("nearest", "linear", "thin-plate")
MEAN_SOLVER, SAMPLE_SOLVER = SOLVERS["mean"], SOLVERS["heun"]
MEAN, SAMPLE = MEAN_SOLVER.title, f"one sample ({SAMPLE_SOLVER.title})"
SHOWN = 8
# Of the images that are validated: a sample takes a few dozen calls an image, a mean one. Spreads
# are pooled over pixels, of which these have tens of thousands.
SAMPLED_IMAGES = 64
DETAIL = """\
The coherence that is right, and the spread (right: 1) in each sixth of the unknown pixels, from the
calmest to the busiest by the known ones around them, and along each colour axis of what the mean
leaves out, the widest first:"""
Picture = UInt8[np.ndarray, "height width 3"]


def validate(
    model: VelocityField, eval_set: EvalSet, config: TrainConfig, workers: Workers | None = None
) -> tuple[dict[str, float], Picture | None]:
    """Scores of the posterior mean and of one sample of each of some images, the same on every
    worker; and on the first of them a picture with one sample of a few images."""
    # All workers take part in this, and all get the scores; the picture is the first one's.
    means = score(
        [MEAN], lambda chunk: {MEAN: complete(model, chunk, MEAN_SOLVER)}, eval_set, workers
    )
    samples = score(
        [SAMPLE],
        lambda chunk: {SAMPLE: _mean_and_sample(model, chunk, config)[SAMPLE]},
        eval_set.some(SAMPLED_IMAGES),
        workers,
    )
    named = curves("val", means[MEAN].report(), samples[SAMPLE].report())
    if workers is not None and workers.rank:
        return named, None
    return named, completion_grid(eval_set.some(SHOWN), model, config)


def curves(prefix: str, mean: Mapping[str, float], sample: Mapping[str, float]) -> dict[str, float]:
    """The numbers of both answers that have a curve: `val/psnr` is the mean's and
    `val/sample_psnr` the sample's; `val/spread` only a sample has."""
    # A metric may have no number, such as speckle where nothing is flat.
    own = {key: mean[key] for key in VALIDATED if key in mean}
    drawn = {name: sample[key] for name, key in SAMPLED.items() if key in sample}
    return {f"{prefix}/{name}": number for name, number in (own | drawn).items()}


def _mean_and_sample(
    model: VelocityField, eval_set: EvalSet, config: TrainConfig
) -> dict[str, Completion]:
    # The mean first, in one call: it is what the sample is measured against.
    best = complete(model, eval_set, MEAN_SOLVER)
    one = complete(model, eval_set, SAMPLE_SOLVER, config.sample_steps, around=best)
    return {MEAN: best, SAMPLE: one}


def completion_grid(eval_set: EvalSet, model: VelocityField, config: TrainConfig) -> Picture:
    """Truth, known pixels, linear fill, posterior mean and one sample, side by side."""
    truth = eval_set.images.numpy()  # bytes, as they were staged
    columns = {
        "truth": truth,
        "known pixels": only_known(truth, eval_set.is_known.numpy()),
        "linear fill": _bytes(fill("linear", eval_set).prediction),
        MEAN: _bytes(complete(model, eval_set, MEAN_SOLVER).prediction),
        "sample": _bytes(complete(model, eval_set, SAMPLE_SOLVER, config.sample_steps).prediction),
    }
    return picture(columns)


def _bytes(images: Images) -> UInt8[np.ndarray, "m h w 3"]:
    return (images * 255).round().to(torch.uint8).numpy()  # a cast alone would cut


@dataclass(frozen=True)
class FinalReport:
    """The end of a run: rows of the table, what it was measured on, and the picture."""

    rows: dict[str, dict[str, float]]
    facts: dict[str, str | int]
    picture: Picture

    @property
    def table(self) -> str:
        """The table, under it what only samples have, and where the numbers come from."""
        facts = dict(self.facts)  # a copy, to take from
        command, data, seed = (facts.pop(key) for key in ("command", "data", "seed"))
        # For programs: a run tells by them whether this is the report that it would write.
        for name in ("trained_steps", "weights", "asked"):
            facts.pop(name, None)
        brief = {key: column for key, column in COLUMNS.items() if column.brief}
        caption = provenance(str(command), str(data), int(seed), **facts)
        detailed = {key: column for key, column in COLUMNS.items() if column.detailed}
        samples = {name: row for name, row in self.rows.items() if detailed.keys() & row.keys()}
        short, under = results_table(self.rows, brief), results_table(samples, detailed, caption)
        return f"{short}\n{DETAIL}\n\n{under}"  # nobody could read one of twenty columns

    @property
    def curves(self) -> dict[str, float]:
        """The numbers that a run's last point has, named as those of validation."""
        return curves("test", self.rows[MEAN], self.rows[SAMPLE])

    @property
    def json(self) -> str:
        """The same for programs."""
        return json.dumps({"rows": self.rows, **self.facts}, indent=2) + "\n"


def _answers(
    model: VelocityField, eval_set: EvalSet, config: TrainConfig
) -> Mapping[str, Completion]:
    """Every row of the final table, for a few images."""
    fills = {name: fill(name, eval_set) for name in QUICK_FILLS}
    return fills | _mean_and_sample(model, eval_set, config)


def final_report(
    model: VelocityField,
    eval_set: EvalSet,
    config: RunConfig,
    step: int,
    trained_steps: int,
    workers: Workers | None = None,
) -> FinalReport | None:
    """Score the model and the classical fills on the same images and masks.

    Args:
        step: of the checkpoint that the model is of.
        trained_steps: of the whole run.
        workers: who shares the scoring; every one of them calls this, and the first gets a report.
    """
    # On every worker alike, before they wait for one another.
    require(len(eval_set) > 0, "the test split is empty; stage the data with a test split")
    names = [*QUICK_FILLS, MEAN, SAMPLE]
    scores = score(names, lambda chunk: _answers(model, chunk, config.train), eval_set, workers)
    if workers is not None and workers.rank:  # from here on the first worker alone
        return None
    # All that the numbers depend on, so that two reports can be told to be comparable.
    facts: dict[str, str | int] = {
        "command": config.command,
        "data": config.data,
        **({"data hash": config.data_hash} if config.data_hash else {}),
        "seed": config.train.seed,
        "images": len(eval_set),
        "masks": eval_set.mask_hash,
        "training masks": config.train.masks,
        "checkpoint": f"step {step}",
        "trained_steps": trained_steps,
    }
    rows = {name: sums.report() for name, sums in scores.items()}
    return FinalReport(rows, facts, completion_grid(eval_set.some(SHOWN), model, config.train))
