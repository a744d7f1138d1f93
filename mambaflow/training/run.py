"""One run from its first step to its report, on one worker of however many.

Where its files are stands in `run_paths`. Nothing here knows what started the workers: a
ProcessGroup says who else there is.
"""

import contextlib
import json
import logging
import time
from dataclasses import dataclass

import torch

from mambaflow.config import RunConfig, to_dict
from mambaflow.data.batches import Batches, Layout, Prefetcher, Stream
from mambaflow.data.device_rows import device_resident
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.complete import EvalSet
from mambaflow.evaluation.final_report import MEAN, FinalReport, final_report, validate
from mambaflow.models import weights
from mambaflow.models.weights import CheckpointInfo
from mambaflow.report.pictures import to_png
from mambaflow.report.run_log import StoredRunLog
from mambaflow.run_paths import RunPaths
from mambaflow.storage import Storage
from mambaflow.training import checkpoint
from mambaflow.training.loop import StepResult, TrainState, compiled, fit
from mambaflow.training.preflight import total_steps
from mambaflow.training.process_group import ProcessGroup, Progress
from mambaflow.training.stop_signal import StopSignal

BEST = "val/psnr"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished" or "stopped", and after which step."""

    status: str
    step: int


class RunFailed(RuntimeError):
    """A run that ended without a result; the message says why."""


def train_and_score(config: RunConfig, group: ProcessGroup) -> Outcome:
    """Train to the end and score the test split: all of a run, as one worker of `group`."""
    outcome = train(config, group)
    if outcome.status == "finished":
        score_test(config, group)
    return outcome


def train(config: RunConfig, group: ProcessGroup) -> Outcome:
    """Train as this worker of `group`, from the newest checkpoint if there is one.

    The test split is not looked at: that is `score_test`, which a search leaves out.
    """
    folder, shards = RunPaths.of(config).folder, ShardSet(config.data, "train")
    layout = Layout.of(shards.spec, config.model)
    rows = device_resident(shards, group.device, images=config.train.masks == "fresh")
    batches = Batches(shards, layout, config.train, group.rank, group.size, rows)
    state = TrainState(config.model, config.train, group.device)
    info = checkpoint.restore_newest(state, folder)
    if info is not None:
        log.info("resumed %s after step %d", config.run_name, info.step)
    elif config.init_from:
        _init_from(state, config.init_from)
    _require_together(state.step, group)
    trainer = Trainer(config, group, state, layout, total_steps(config, len(shards)))
    try:
        return trainer.train(batches)
    finally:
        trainer.close()
        shards.close()


def _init_from(state: TrainState, run: str) -> None:
    """Start from another run's weights: its best ones, averaged, and no optimiser's moments."""
    model, info = weights.load_model(run)
    for module in (state.model, state.ema):
        module.load_state_dict(model.state_dict())
    log.info("started from the weights of %s", info.uri)


def _require_together(step: int, group: ProcessGroup) -> None:
    """Every worker must have restored the same checkpoint, or their gradients would mix."""
    total = int(group.all_reduce(torch.tensor(step, device=group.device)))
    if total != step * group.size:
        raise RuntimeError(
            f"worker {group.rank} is after step {step}, the {group.size} workers on average after "
            f"{total / group.size:g}: some read a checkpoint that others found damaged; "
            "look for the warning in their logs"
        )


class Trainer:
    """One worker's part in a run: every one trains and validates; the first also logs and saves."""

    def __init__(
        self,
        config: RunConfig,
        group: ProcessGroup,
        state: TrainState,
        layout: Layout,
        steps: int,
    ) -> None:
        self.config, self.group, self.state, self.steps = config, group, state, steps
        self.paths = RunPaths.of(config)
        self.folder: Storage = self.paths.folder
        self.stop_signal = StopSignal(group, self.folder)
        # The first worker alone has one.
        self.run_log = None if group.rank else StoredRunLog(self.folder, state.step)
        validation = ShardSet(config.data, "validation")
        self.eval_set = EvalSet.read(validation, layout, config.train.eval_images)
        self._start_clock()

    def _start_clock(self) -> None:
        self._clock, self._clock_step, self._waited = time.perf_counter(), self.state.step, 0.0

    def train(self, batches: Batches) -> Outcome:
        """Train to the end, or until somebody asks to stop."""
        if self.group.device.type == "cpu":
            return self._train(batches)
        with contextlib.closing(Prefetcher(batches, self.group.device, self.steps)) as ahead:
            return self._train(ahead)

    def _train(self, batches: Stream) -> Outcome:
        forward = compiled(self.group.wrap(self.state.model), self.config.scale.compile)
        if self.group.rank == 0:
            name, size = self.config.run_name, self.group.size
            log.info("training %s after step %d; workers: %d", name, self.state.step, size)
            if self.config.scale.compile != "off":
                log.info("compiling the network: the first steps take a minute or two")
        stopped = False
        with self.stop_signal.catching():
            for result in fit(self.state, batches, self.config.train, self.steps, forward):
                stopped = self.stop_signal.agreed() and result.step < self.steps
                self._after(result, stopped)
                if stopped:
                    break
        return Outcome("stopped" if stopped else "finished", self.state.step)

    def _after(self, result: StepResult, stopped: bool) -> None:
        """What is due after a step; the same on every worker, since all of it is collective."""
        config, last = self.config.train, result.step == self.steps
        self._waited += result.waited
        if result.step % config.log_every == 0 or last:
            self._log(result)
        due = result.step % config.eval_every == 0 or last
        if due or stopped:
            self._save(result.step, validating=due)
            self._start_clock()

    def _log(self, result: StepResult) -> None:
        loss = self.group.all_reduce(result.loss).item() / self.group.size
        if self.run_log is None:
            return
        seconds = time.perf_counter() - self._clock
        rate = (result.step - self._clock_step) * self.config.train.batch_size / seconds
        stall = self._waited / seconds
        self._start_clock()
        self.run_log.scalars(
            result.step,
            {
                "train/loss": loss,
                "train/lr": result.lr,
                "train/grad_norm": result.grad_norm.item(),
                "train/samples_per_second": rate,
                "train/input_stall": stall,
            },
        )
        self.group.report_progress(Progress(result.step, self.steps, loss, rate))

    def _save(self, step: int, validating: bool) -> None:
        """Validate, then save; a run that stops between two validations is saved as it is."""
        scores: dict[str, float] = {}
        if validating:
            scores, picture = validate(self.state.ema, self.eval_set, self.config.train, self.group)
            if self.run_log is not None and picture is not None:
                self.run_log.scalars(step, scores)
                self.run_log.image(step, "validation", picture)
        if self.run_log is not None:
            self.run_log.push()
            info = CheckpointInfo(
                step=step, config=self.config, scores=scores, finished=step == self.steps
            )
            checkpoint.save(self.state, info, self.folder)
            best = weights.best_step(self.folder, BEST, until=step)
            checkpoint.prune(self.folder, newest=step, best=best)
        # The others wait here for the first, so that none goes on from what is not in place.
        self.group.report_checkpoint(
            {**scores, "step": float(step)}, self.paths.uri(RunPaths.checkpoint(step))
        )

    def close(self) -> None:
        """End the logs."""
        if self.run_log is not None:
            self.run_log.close()


def reported_steps(folder: Storage) -> int | None:
    """After how many steps the run's report was written, if it was."""
    there = folder.exists(RunPaths.RESULTS)
    return json.loads(folder.read(RunPaths.RESULTS))["trained_steps"] if there else None


def score_test(config: RunConfig, group: ProcessGroup) -> None:
    """Score the best checkpoint on the test split, shared out over the workers, and write the
    run's report; nothing where it is written already, or where no test image is asked for."""
    folder, steps = RunPaths.of(config).folder, max(weights.saved_steps(RunPaths.of(config).folder))
    if not config.train.test_images or reported_steps(folder) == steps:
        return
    model, info = weights.load_model(folder.uri, score=BEST, device=str(group.device))
    test = ShardSet(config.data, "test")
    eval_set = EvalSet.read(test, Layout.of(test.spec, config.model), config.train.test_images)
    report = final_report(model, eval_set, config, info.step, steps, group)
    if report is not None:
        _write_report(report, config, folder, steps)


def _write_report(report: FinalReport, config: RunConfig, folder: Storage, steps: int) -> None:
    run_log = StoredRunLog(folder, steps)
    try:
        final = {f"test/{key}": value for key, value in report.rows[MEAN].items()}
        run_log.hparams(to_dict(config), final)
        run_log.image(steps, "test", report.picture)
    finally:
        run_log.close()
    folder.write(RunPaths.PICTURE, to_png(report.picture))
    folder.write(RunPaths.TABLE, report.table.encode())
    folder.write(RunPaths.RESULTS, report.json.encode())  # last: where it is, the rest is
