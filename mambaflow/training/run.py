"""One run from its configuration to its report, on one worker of however many.

    <storage>/<run_name>/
      config.json            what was asked for
      metrics.jsonl          the training and validation curves; events.out.tfevents.* the same
      step_0000400/          checkpoints: the newest and the best on validation
      report/                results.json, table.md and picture.png on the test split, at the end
      STOP                   put there by anyone: checkpoint and stop

Nothing here knows what started the workers: a ProcessGroup says who else there is.
"""

import contextlib
import io
import json
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from mambaflow.checks import require
from mambaflow.config import RunConfig, differences, from_json, to_dict, to_json
from mambaflow.data.batches import Batches, Layout, Prefetcher, Stream
from mambaflow.data.device_rows import device_resident
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.complete import EvalSet, final_report, validate
from mambaflow.models import weights
from mambaflow.models.weights import Index
from mambaflow.report.run_log import Logbook
from mambaflow.storage import Storage, at
from mambaflow.training import checkpoint
from mambaflow.training.loop import Progress, TrainState, compiled, fit
from mambaflow.training.process_group import ProcessGroup, RunProgress
from mambaflow.training.stop_signal import STOP, StopSignal

BEST = "val/psnr"
CONFIG, RESULTS = "config.json", "report/results.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished" or "stopped", and after which step."""

    status: str
    step: int


class RunFailed(RuntimeError):
    """A run that ended without a result; the message says why."""


def check_storage(config: RunConfig) -> None:
    """Refuse a run's folder that this worker's node does not share with the driver's.

    Raises:
        ValueError: the run's configuration is not there.
    """
    require(
        at(config.storage).child(config.run_name).exists(CONFIG),
        f"storage (={config.storage}) must be seen by every node; use a shared folder or s3://…",
    )


def reported_steps(run: Storage) -> int | None:
    """After how many steps the run's report was written, if it was."""
    return json.loads(run.read(RESULTS))["trained_steps"] if run.exists(RESULTS) else None


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def open_run(config: RunConfig) -> Storage:
    """The run's storage after the rules of names: a new name, or --resume of the same run.

    Raises:
        ValueError: the name is taken and resume is off; or resume is on and the run is missing,
            was another model or other training, or is already longer.
    """
    run = at(config.storage).child(config.run_name)
    taken, text = run.exists(CONFIG), to_json(config).encode()
    if not config.resume:
        require(
            not taken and run.create(CONFIG, text),
            f"run_name (={config.run_name!r}) is taken by a "
            f"{'finished' if run.exists(RESULTS) else 'begun'} run in {config.storage}; "
            "use --resume to go on, or another --run-name",
        )
        return run
    require(
        taken,
        f"run_name (={config.run_name!r}) has nothing to resume in {config.storage}; "
        "leave --resume out, or name a run that is there",
    )
    _same_run(config, run)
    run.delete(STOP)
    run.write(CONFIG, text)
    return run


# What may change when a run goes on: how long, how often it is looked at, not what it learns.
# With other epochs the learning rate goes on along the other cosine from the step it is at: a
# finished run with more epochs starts again at a higher rate, and ends where no straight run does.
ELASTIC = ("epochs", "log_every", "eval_every", "eval_images", "test_images", "sample_steps")


def _same_run(config: RunConfig, run: Storage) -> None:
    try:
        before = from_json(run.read(CONFIG))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{run.uri}/{CONFIG} is not of this version of mambaflow: {error}; "
            "resume with the version that wrote it"
        ) from error
    changed = [*differences(before.model, config.model, "model.")]
    changed += [
        line
        for line in differences(before.train, config.train, "train.")
        if line.split(":")[0].removeprefix("train.") not in ELASTIC
    ]
    if before.data != config.data:
        changed.append(f"data: {before.data} -> {config.data}")
    require(
        not changed,
        f"run_name (={config.run_name!r}) cannot resume with another configuration "
        f"({'; '.join(changed)}); give the same flags, or another --run-name",
    )
    rows, batch_size = len(ShardSet(config.data, "train")), config.train.batch_size
    steps, newest = _steps(config, rows), max(weights.saved_steps(run), default=0)
    require(
        newest <= steps,
        f"epochs (={config.train.epochs}) end at step {steps}, and run_name "
        f"(={config.run_name!r}) is already at step {newest}; "
        f"use --epochs {-(-newest * batch_size // rows)} or more",
    )
    if before.train.epochs != config.train.epochs:
        log.warning(
            "epochs: %d -> %d; the learning rate goes on along the other cosine",
            before.train.epochs,
            config.train.epochs,
        )


def _steps(config: RunConfig, rows: int) -> int:
    """Steps of the whole run, at least one."""
    return config.train.epochs * rows // config.train.batch_size or 1


def check_data(config: RunConfig) -> None:
    """Refuse data that the run could not use, before a worker starts.

    Reads the manifests, the first training shard and the held-out images. A damaged later shard
    is found by the worker that first needs it.

    Raises:
        ValueError: a split is missing, damaged, or does not fit the others or the configuration.
    """
    splits = {split: ShardSet(config.data, split) for split in ("train", "validation", "test")}
    spec = splits["train"].spec
    Batches(splits["train"], Layout.of(spec, config.model), config.train)
    require(
        config.train.masks == "strict" or spec.full_images,
        f"masks (={config.train.masks!r}) needs whole training images, and {config.data} holds "
        "only the staged pixels; stage again with --full-images, or use --masks strict",
    )
    splits["train"].rows(np.arange(1))
    eval_set = {"validation": config.train.eval_images, "test": config.train.test_images}
    for split, count in eval_set.items():
        other = splits[split].spec
        require(
            len(splits[split]) > 0 and (other.size, other.known) == (spec.size, spec.known),
            f"data (={config.data}) must hold {split} images, staged as the training ones "
            f"({spec.known} known pixels of {spec.size} x {spec.size}), and holds "
            f"{len(splits[split])} ({other.known} of {other.size} x {other.size}); stage it again",
        )
        splits[split].rows(np.arange(min(count, len(splits[split]))))


def train(config: RunConfig, group: ProcessGroup) -> Outcome:
    """Train as this worker of `group`, from the newest checkpoint if there is one."""
    run = at(config.storage).child(config.run_name)
    shards = ShardSet(config.data, "train")
    layout = Layout.of(shards.spec, config.model)
    rows = device_resident(shards, group.device, images=config.train.masks == "fresh")
    batches = Batches(shards, layout, config.train, group.rank, group.size, rows)
    steps = _steps(config, len(shards))
    state = TrainState(config.model, config.train, group.device)
    index = checkpoint.restore_newest(state, run)
    if index is not None:
        log.info("resumed %s after step %d", config.run_name, index.step)
    _require_together(state.step, group)
    worker = Worker(config, group, run, state, layout, steps)
    try:
        outcome = worker.train(batches)
        if outcome.status == "finished":
            worker.report()
    finally:
        worker.close()
        shards.close()
    return outcome


def _require_together(step: int, group: ProcessGroup) -> None:
    """Every worker must have restored the same checkpoint, or their gradients would mix."""
    total = int(group.all_reduce(torch.tensor(step, device=group.device)))
    if total != step * group.size:
        raise RuntimeError(
            f"worker {group.rank} is after step {step}, the {group.size} workers on average after "
            f"{total / group.size:g}: some read a checkpoint that others found damaged; "
            "look for the warning in their logs"
        )


class Worker:
    """One worker's part in a run: every one trains; the first also logs, validates and saves."""

    def __init__(
        self,
        config: RunConfig,
        group: ProcessGroup,
        run: Storage,
        state: TrainState,
        layout: Layout,
        steps: int,
    ) -> None:
        self.config, self.group, self.run = config, group, run
        self.state, self.layout, self.steps = state, layout, steps
        self.first = group.rank == 0
        self.stop_signal = StopSignal(group, run)
        self.book: Logbook | None = None
        if self.first:
            self.book = Logbook(run, state.step)
            eval_set = ShardSet(config.data, "validation")
            self.eval_set = EvalSet.read(eval_set, layout, config.train.eval_images)
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
        if self.first:
            name, size = self.config.run_name, self.group.size
            log.info("training %s after step %d; workers: %d", name, self.state.step, size)
            if self.config.scale.compile != "off":
                log.info("compiling the network: the first steps take a minute or two")
        stopped = False
        with self.stop_signal.listening():
            for progress in fit(self.state, batches, self.config.train, self.steps, forward):
                stopped = self.stop_signal.stop() and progress.step < self.steps
                self._watch(progress, stopped)
                if stopped:
                    break
        return Outcome("stopped" if stopped else "finished", self.state.step)

    def _watch(self, progress: Progress, stopped: bool) -> None:
        config, last = self.config.train, progress.step == self.steps
        self._waited += progress.waited
        if progress.step % config.log_every == 0 or last:
            self._log(progress)
        due = progress.step % config.eval_every == 0 or last
        if due or stopped:
            self._save(progress.step, validating=due)
            self._start_clock()

    def _log(self, progress: Progress) -> None:
        loss = self.group.all_reduce(progress.loss.clone()).item() / self.group.size
        if self.book is None:
            return
        seconds = time.perf_counter() - self._clock
        rate = (progress.step - self._clock_step) * self.config.train.batch_size / seconds
        stall = self._waited / seconds
        self._start_clock()
        self.book.log.scalars(
            progress.step,
            {
                "train/loss": loss,
                "train/lr": progress.lr,
                "train/grad_norm": progress.grad_norm.item(),
                "train/samples_per_second": rate,
                "train/input_stall": stall,
            },
        )
        self.group.report_progress(RunProgress(progress.step, self.steps, loss, rate))

    def _save(self, step: int, validating: bool) -> None:
        """Validate, then save; a run that stops between two validations is saved as it is."""
        scores: dict[str, float] = {}
        if self.book is not None:
            if validating:
                scores, picture = validate(self.state.ema, self.eval_set, self.config.train)
                self.book.log.scalars(step, scores)
                self.book.log.image(step, "validation", picture)
            self.book.push()
            index = Index(step=step, config=self.config, scores=scores, finished=step == self.steps)
            checkpoint.save(self.state, index, self.run)
            best = weights.best_step(self.run, BEST, until=step)
            checkpoint.prune(self.run, newest=step, best=best)
        self.group.report_checkpoint(
            {**scores, "step": float(step)}, f"{self.run.uri}/{weights.name(step)}"
        )

    def report(self) -> None:
        """Score the best checkpoint on the test split: the first worker's last task."""
        if self.book is None or reported_steps(self.run) == self.steps:
            return
        model, index = weights.load_model(self.run.uri, score=BEST, device=str(self.group.device))
        test = ShardSet(self.config.data, "test")
        eval_set = EvalSet.read(test, self.layout, self.config.train.test_images)
        report = final_report(model, eval_set, self.config, index.step, self.steps)
        final = {f"test/{key}": value for key, value in report.rows["posterior mean"].items()}
        self.book.log.hparams(to_dict(self.config), final)
        self.book.log.image(self.steps, "test", report.picture)
        self.book.push()
        self.run.write("report/picture.png", _png(report.picture))
        self.run.write("report/table.md", report.table.encode())
        self.run.write(RESULTS, report.json.encode())

    def close(self) -> None:
        """End the logs."""
        if self.book is not None:
            self.book.close()
