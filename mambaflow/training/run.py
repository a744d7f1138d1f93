"""One run from its first step to its report, on one worker of however many.

Where its files are stands in `run_paths`. Nothing here knows what started the workers: a
ProcessGroup says who else there is.
"""

import contextlib
import copy
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mambaflow.config import RECIPES, RunConfig, differences
from mambaflow.data.batches import Batches, Layout, Prefetcher, Stream
from mambaflow.data.device_rows import device_resident
from mambaflow.data.shard_reader import ShardSet, other_splits
from mambaflow.disk import FullError
from mambaflow.evaluation.complete import EvalSet, NotFiniteError
from mambaflow.evaluation.final_report import FinalReport, final_report, validate
from mambaflow.lease import taken_by
from mambaflow.models import weights
from mambaflow.models.velocity_field import parameters
from mambaflow.models.weights import CheckpointInfo
from mambaflow.report.pictures import to_png
from mambaflow.report.run_log import StoredRunLog
from mambaflow.run_paths import RunPaths
from mambaflow.storage_base import Storage
from mambaflow.training import checkpoint
from mambaflow.training.flops import step_flops
from mambaflow.training.law_fit import fit_law, residuals
from mambaflow.training.loop import StepResult, TrainState, compiled, fit
from mambaflow.training.objective import Objective
from mambaflow.training.preflight import (
    MAY_CHANGE,
    check_same_data,
    other_training,
    total_steps,
)
from mambaflow.training.process_group import ProcessGroup, Progress
from mambaflow.training.stop_signal import StopSignal

# A run's columns in TensorBoard's table of runs, the same for all, and the curves beside them.
COMPARED = (
    "arch", "recipe", "model.d_model", "model.num_layers", "model.start", "train.lr",
    "train.batch_size", "train.masks", "train.precision", "train.seed", "workers",
)  # fmt: skip
COMPARED_BY = ("val/psnr", "val/sample_psnr", "val/ssim", "train/loss")
BEST = "val/psnr"  # of the posterior mean: a sample's PSNR is highest where it is no sample
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and after which step."""

    status: str
    """finished; stopped, as somebody asked; diverged: a gradient, weights or answers that are not
    finite; lost: another process has taken the run over; or full: no room for what it writes."""
    step: int
    cause: str = ""
    """Of a run that diverged, was lost or full: what a person should read."""

    @property
    def failed(self) -> bool:
        """Whether it ended without a result, in a way that trying again cannot help."""
        return self.status in ("diverged", "lost", "full")


class RunFailed(RuntimeError):
    """A run that ended without a result; the message says why."""


def train_and_score(config: RunConfig, group: ProcessGroup) -> Outcome:
    """Train to the end and score the test split: all of a run, as one worker of `group`."""
    # All workers have the same outcome, and go on together: the test is shared out among them.
    outcome = train(config, group)
    if outcome.status == "finished":
        try:
            lost = score_test(config, group)
        # Of the first worker, as it writes: by then no other waits for it.
        except FullError as error:
            return Outcome("full", outcome.step, str(error))
        # Of all workers: an image of the test may be the first that is answered so.
        except NotFiniteError as error:
            return Outcome("diverged", outcome.step, f"{error}; {_lower(config)}")
        if lost:
            return Outcome("lost", outcome.step, lost)
    return outcome


def train(config: RunConfig, group: ProcessGroup) -> Outcome:
    """Train as this worker of `group`, from the newest checkpoint if there is one.

    The test split is not looked at: that is `score_test`, which a search leaves out.
    """
    check_same_data(config)  # by every worker: of these data, at this time, from here
    folder, shards = RunPaths.of(config).folder, ShardSet(config.data, "train")
    layout = Layout.of(shards.spec, config.model)
    # Strict masks take the staged pixels alone: whole images stay out of the GPU's memory.
    rows = device_resident(shards, group.device, images=config.train.masks == "fresh")
    batches = Batches(shards, layout, config.train, group.rank, group.size, rows)
    state = TrainState(config.model, config.train, group.device)
    # Each worker reads the checkpoint for itself: storage is what they share.
    info = checkpoint.restore_newest(state, folder)
    if info is not None:
        _require_same_run(info, config)
        log.info("resumed %s after step %d", config.run_name, info.step)
    # A checkpoint of the run's own goes first: other weights are where it began, not where it is.
    elif config.init_from:
        _init_from(state, config)
    # Before DDP is made, which would hide it: it evens out the weights, not moments and steps.
    _require_together(state.step, group)
    # A collective too, which only those that begin anew enter: together, as is known by now.
    if info is None and not config.init_from and config.model.start == "process":
        # All of each image's queries: as many for each of them.
        asked = replace(config.train, min_queries=config.train.max_queries)
        # Drawn from all: the rows of a block are often of a few classes.
        _fit_law(state, Batches(shards, layout, asked, block=len(shards)), group)
    trainer = Trainer(config, group, state, layout, total_steps(config, len(shards)))
    try:
        return trainer.train(batches)
    # However it ended, curves are pushed, and no thread goes on fetching shards.
    finally:
        trainer.close()
        shards.close()


def _require_same_run(info: CheckpointInfo, config: RunConfig) -> None:
    """A checkpoint knows its run itself: the run's configuration may have been lost since, or the
    checkpoint may be another run's."""
    was, now = info.config.data_hash, config.data_hash
    changed = other_splits(was, now) if was and now else ""
    if changed:
        raise weights.CheckpointError(
            f"checkpoint {info.uri} is of other data than data (={config.data}) hold ({changed}); "
            "give --data with the address of those, or another --run-name"
        )
    other = other_training(config, info.config)
    if other:
        raise weights.CheckpointError(
            f"checkpoint {info.uri} is of another training ({'; '.join(other)}); give its flags, "
            "or another --run-name"
        )


def _init_from(state: TrainState, config: RunConfig) -> None:
    """Start from another run's weights: its best ones, averaged, and no optimiser's moments."""
    model, info = weights.load_model(config.init_from)
    found = info.files[info.file("ema")]
    if config.init_hash not in ("", found):
        raise weights.CheckpointError(
            f"init_from (={info.uri}) holds other weights now than the run was begun from "
            f"({config.init_hash[:12]} -> {found[:12]}); put those back, or use another --run-name"
        )
    # The average too: it would otherwise begin at the weights that the seed drew.
    for module in (state.model, state.ema):
        module.load_state_dict(model.state_dict())
    log.info("started from the weights of %s", info.uri)


def _fit_law(state: TrainState, batches: Batches, group: ProcessGroup) -> None:
    """Give the residual's law the numbers of the training images."""
    start = time.perf_counter()
    fitted: dict[str, torch.Tensor] = {}
    # By the first worker, from whole batches: on other machines last bits would be others. On CPU,
    # where the batches are.
    if group.rank == 0:
        fitted = fit_law(residuals(copy.deepcopy(state.ema).cpu(), batches)).state_dict()
    fitted = group.broadcast(fitted)
    for model in (state.model, state.ema):
        model.residual_law.load_state_dict(fitted)
    told = ", ".join(f"{k} {v:.3g}" for k, v in state.ema.residual_law.numbers().items())
    log.info("fitted the residual's law in %.0f s: %s", time.perf_counter() - start, told)


def _require_together(step: int, group: ProcessGroup) -> None:
    """Every worker must have restored the same checkpoint, or their gradients would mix."""
    # A collective that all can enter, whatever they have read. A worker whose step is the mean by
    # chance passes; the others' failure ends the run.
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
        # The first worker alone has one. It drops what an interrupted try logged past this step.
        self.run_log: StoredRunLog | None = None
        if group.rank == 0:
            with self._while_there_is_room():
                self.run_log = StoredRunLog(self.folder, state.step)
        validation = ShardSet(config.data, "validation")
        # Read once and held: every validation is of the same images.
        self.eval_set = EvalSet.read(validation, layout, config.train.eval_images)
        self._began = time.perf_counter()
        self._norm: torch.Tensor | None = None  # of the newest step
        self._start_clock()

    def _start_clock(self) -> None:
        self._clock, self._clock_step, self._waited = time.perf_counter(), self.state.step, 0.0

    def train(self, batches: Batches) -> Outcome:
        """Train to the end, or until somebody asks to stop."""
        # A thread that makes batches ahead would take the cores that train.
        if self.group.device.type == "cpu":
            return self._train(batches)
        with contextlib.closing(Prefetcher(batches, self.group.device, self.steps)) as ahead:
            return self._train(ahead)

    def _train(self, batches: Stream) -> Outcome:
        # DDP inside, torch.compile around it: graphs are then cut where DDP sends gradients.
        objective = Objective(self.state.model, self.config.train)
        forward = compiled(self.group.wrap(objective), self.config.scale.compile)
        if self.group.rank == 0:
            name, size = self.config.run_name, self.group.size
            log.info("training %s after step %d; workers: %d", name, self.state.step, size)
            if self.config.scale.compile != "off":
                log.info("compiling the network: the first steps take a minute or two")
        stopped = False
        with self.stop_signal.catching():
            for result in fit(self.state, batches, self.config.train, self.steps, forward):
                # agreed() stands first, being collective: behind `and` it would be left out at the
                # last step, after which there is nothing to stop.
                answer = self.stop_signal.agreed()
                if answer in ("lost", "full"):
                    return Outcome(answer, result.step, self._why_it_cannot_write())
                stopped = answer == "stop" and result.step < self.steps
                # Before anything is logged or saved of it. The same norm on every worker, so that
                # all leave together; returned, not raised, since Ray would try again what cannot
                # help.
                if not self._finite(result, now=stopped):
                    return Outcome("diverged", result.step, self._divergence("gradient", result))
                try:
                    self._after(result, stopped)
                # Raised by every worker, and before anything is saved: the step had a gradient, and
                # the weights that it led to are the ones to blame.
                except NotFiniteError:
                    return Outcome("diverged", result.step, self._divergence("model", result))
                if stopped:
                    break
        # What the first worker found as it saved last, all know before they score the test.
        signal = self.stop_signal
        found = self.group.broadcast("full" if signal.full else "lost" if signal.taken_by else "")
        if found:
            return Outcome(found, self.state.step, self._why_it_cannot_write())
        return Outcome("stopped" if stopped else "finished", self.state.step)

    def _finite(self, result: StepResult, now: bool) -> bool:
        """Whether the gradient of a step is finite; on a GPU that of the step before, unless this
        one is looked at anyway, or `now`: reading a number waits for the step to end."""
        config, before = self.config.train, self._norm
        self._norm = result.grad_norm
        looked_at = result.step % config.log_every == 0 or result.step % config.eval_every == 0
        if now or looked_at or result.step == self.steps or self.group.device.type == "cpu":
            return bool(torch.isfinite(result.grad_norm))
        return before is None or bool(torch.isfinite(before))

    def _divergence(self, what: str, result: StepResult) -> str:
        saved = weights.saved_steps(self.folder)
        newest = RunPaths.checkpoint(max(saved)) if saved else "none yet"
        return (
            f"the {what} is not finite by step {result.step}; {_lower(self.config)}; the newest "
            f"checkpoint is good: {newest}"
        )

    @contextlib.contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        """What the first worker writes: where there is no room, the next step's question ends the
        run for all workers. An error of one would have Ray try again what cannot help."""
        try:
            yield
        except FullError as error:
            # The first of them is the cause.
            self.stop_signal.full = self.stop_signal.full or str(error)

    def _why_it_cannot_write(self) -> str:
        if self.stop_signal.full:
            return self.stop_signal.full
        return _lost(self.folder, self.stop_signal.taken_by or "another process")

    def _after(self, result: StepResult, stopped: bool) -> None:
        """What is due after a step; the same on every worker, since all of it is collective."""
        config, last = self.config.train, result.step == self.steps
        self._waited += result.waited
        if result.step % config.log_every == 0 or last:
            self._log(result)
        due = result.step % config.eval_every == 0 or last
        # A stop where a validation is due does not lose it: the resumed run would not make it up.
        if due or stopped:
            self._save(result.step, validating=due)
            self._start_clock()  # the rate is of training: without validation, without saving

    def _log(self, result: StepResult) -> None:
        # The mean over equal shares. Collective: before the first worker goes on alone.
        loss = self.group.all_reduce(result.loss).item() / self.group.size
        if self.run_log is None:
            return
        seconds = time.perf_counter() - self._clock
        # batch_size counts the images of all workers.
        rate = (result.step - self._clock_step) * self.config.train.batch_size / seconds
        stall = self._waited / seconds
        self._start_clock()
        values = {
            "train/loss": loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm.item(),  # of the mean, the same on all workers
            "train/samples_per_second": rate,
            "train/input_stall": stall,
        }
        with self._while_there_is_room():
            self.run_log.scalars(result.step, values)
        self.group.report_progress(Progress(result.step, self.steps, loss, rate))

    def _save(self, step: int, validating: bool) -> None:
        """Validate, then save; a run that stops between two validations is saved as it is.

        Raises:
            NotFiniteError: by every worker, of weights or of what the model answers.
        """
        # By every worker alike, whose weights are the same; also where nothing is validated.
        if not all(p.isfinite().all() for p in self.state.model.parameters()):
            raise NotFiniteError(f"weights are not finite after step {step}")
        scores: dict[str, float] = {}
        if validating:
            # Collective; the picture comes to the first worker alone.
            scores, picture = validate(self.state.ema, self.eval_set, self.config.train, self.group)
            if self.run_log is not None and picture is not None:
                with self._while_there_is_room():
                    self.run_log.scalars(step, scores | self._law())
                    self.run_log.image(step, "validation", picture)
        with self._while_there_is_room():
            self._write(step, scores)
        # On Ray the others wait here for the first, so that none goes on from what is not in place;
        # those of torchrun wait in the gradients of the next step.
        about = {"step": float(step), "seconds": time.perf_counter() - self._began}
        self.group.report_checkpoint(scores | about, self.paths.uri(RunPaths.checkpoint(step)))

    def _write(self, step: int, scores: dict[str, float]) -> None:
        """The first worker's curves and checkpoint."""
        # Looked at again, right before anything is written: what was taken over meanwhile is not
        # ours to write to, nor to prune. The next step's question ends the run for all workers.
        if self.run_log is None or self.stop_signal.full or self.stop_signal.look_for_owner():
            return
        # Curves before the checkpoint: whoever goes on from it finds all points up to it.
        self.run_log.push()
        info = CheckpointInfo(
            step=step, config=self.config, scores=scores, finished=step == self.steps
        )
        checkpoint.save(self.state, info, self.folder)
        # Later steps are of a past that the run went back from: never the best, and removed.
        # Older checkpoints go only now that the new one is whole.
        best = weights.best_step(self.folder, BEST, until=step)
        checkpoint.prune(self.folder, newest=step, best=best)

    def _law(self) -> dict[str, float]:
        """The numbers of the residual's law, for curves."""
        if self.config.model.start != "process":
            return {}
        return {f"law/{name}": x for name, x in self.state.ema.residual_law.numbers().items()}

    def close(self) -> None:
        """End the logs; those of a run that was taken over stay as they are."""
        if self.run_log is None:
            return
        # In a run that ends by an error a second one would hide the first.
        with self._while_there_is_room():
            self.run_log.close(push=not self.stop_signal.taken_by and not self.stop_signal.full)


def _lost(folder: Storage, who: str) -> str:
    return f"{folder.uri} was taken over by {who}; this run ends, and leaves it as it is"


def _lower(config: RunConfig) -> str:
    """What helps against numbers that are not finite."""
    train = config.train
    return (
        f"lower lr (={train.lr:g}) or grad_clip (={train.grad_clip:g}), or use precision fp32 "
        f"(={train.precision})"
    )


def reported_steps(folder: Storage) -> int | None:
    """After how many steps the run's report was written, if it was."""
    return _reported(folder).get("trained_steps")


def _reported(folder: Storage) -> dict[str, Any]:
    """What the run's report says for programs; nothing where it is not there, or not whole."""
    try:
        # What a person reads belongs to it: it was written before.
        found = json.loads(folder.read(RunPaths.RESULTS)) if folder.exists(RunPaths.TABLE) else {}
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def compared(config: RunConfig) -> dict[str, Any]:
    """What tells runs apart: the fields of COMPARED, and in a line whatever else of what is learnt
    is not as architecture and recipe have it."""
    values = {"arch": config.arch, "recipe": config.recipe, "workers": config.scale.num_workers}
    recipe, changed = RECIPES[config.recipe](config.arch), []
    for part in ("model", "train"):
        ours, usual = getattr(config, part), getattr(recipe, part)
        values |= {f"{part}.{name}": value for name, value in vars(ours).items()}
        changed += list(differences(usual, ours, f"{part}."))
    told = {*COMPARED, *(f"train.{name}" for name in MAY_CHANGE)}
    others = "; ".join(line for line in changed if line.split(":")[0] not in told)
    return {name: values[name] for name in COMPARED} | {"others": others}


def score_test(config: RunConfig, group: ProcessGroup) -> str:
    """Score the best checkpoint on the test split, shared out over the workers, and write the
    run's report; nothing where it is written already, or where no test image is asked for.

    Returns:
        Why there is none, on the first worker, where another process has taken the run over.
    """
    folder, steps = RunPaths.of(config).folder, max(weights.saved_steps(RunPaths.of(config).folder))
    if not config.train.test_images:
        return ""
    # What the report is of: these weights, asked so. By their number of steps alone it could be
    # that of a run which was here before.
    best, asked = weights.read_best(folder.uri, BEST), config.train
    of: dict[str, str | int] = {
        "trained_steps": steps,
        "weights": best.files[best.file("ema")],
        "asked": f"{asked.test_images} images, {asked.sample_steps} steps",
    }
    # The first worker writes the report after all scores are summed up, and so after every worker
    # has looked here.
    if of.items() <= _reported(folder).items():
        return ""
    check_same_data(config)  # again: hours have gone by, and of the test split nothing was read
    # By each worker from storage: the best checkpoint need not be the one that training ended with.
    model, info = weights.load_model(folder.uri, score=BEST, device=str(group.device))
    test = ShardSet(config.data, "test")
    eval_set = EvalSet.read(test, Layout.of(test.spec, config.model), config.train.test_images)
    report = final_report(model, eval_set, config, info.step, steps, group)
    # Its log would cut the other's curves off, and its report stand for a run that goes on.
    who = taken_by(folder, group.owner) if report is not None and group.owner else ""
    if report is not None and not who:
        # Of the training split, whose shards hold targets.
        spec = ShardSet(config.data, "train").spec
        flops = steps * step_flops(config.model, config.train, spec.known, spec.target)
        cost = {"steps": steps, "parameters": parameters(model), "flops": flops}
        report = replace(report, facts=report.facts | of)
        _write_report(report, config, folder, cost)
    return _lost(folder, who) if who else ""


def _write_report(
    report: FinalReport, config: RunConfig, folder: Storage, cost: dict[str, int]
) -> None:
    # Its own: the trainer's is closed, and a resumed run may have nothing left but its test.
    steps = cost["steps"]
    run_log = StoredRunLog(folder, steps)
    try:
        run_log.line(steps, report.curves)
        run_log.hparams(compared(config) | cost, COMPARED_BY)
        run_log.text(steps, "test", report.table)
        run_log.image(steps, "test", report.picture)
    finally:
        run_log.close()
    folder.write(RunPaths.PICTURE, to_png(report.picture))
    folder.write(RunPaths.TABLE, report.table.encode())
    folder.write(RunPaths.RESULTS, report.json.encode())  # last: where it is, the rest is
