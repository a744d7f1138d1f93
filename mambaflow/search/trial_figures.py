"""What a trial came to: its numbers, nan where it has none yet."""

import math

from mambaflow.search.board import Report, Trial


def psnr(trial: Trial) -> float:
    """The newest PSNR of a trial; nan where there is none."""
    return trial.last.psnr if trial.last else math.nan


def told(trial: Trial) -> list[Report]:
    """A trial's reports with a number, along its budget: of a share that was come to twice, as
    after a start that was lost, the newer."""
    known = {report.share: report for report in trial.reports if math.isfinite(report.psnr)}
    return [known[share] for share in sorted(known)]


def flops(trial: Trial) -> float:
    """Of the training that was done; nan before the first report."""
    if trial.last is None:
        return math.nan
    done = trial.last.step / trial.steps if trial.steps else trial.share
    return trial.flops * done


def rate(trial: Trial) -> float:
    """Samples in a second of training and validation; nan before the first report."""
    known = trial.last is not None and trial.seconds > 0
    return trial.last.samples / trial.seconds if known and trial.last else math.nan
