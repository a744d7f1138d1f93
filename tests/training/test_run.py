"""A run that is stopped, killed or shared out among workers is still that one run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import wait_for
from small import CPU, FLAGS, LAYOUT, STEPS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from mambaflow.config import RECIPES, RunConfig, ScaleConfig, from_json, to_json
from mambaflow.data.batches import Batches
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.complete import EvalSet
from mambaflow.evaluation.final_report import final_report
from mambaflow.models import weights
from mambaflow.models.velocity_field import VelocityField, parameters
from mambaflow.storage import at
from mambaflow.training import run as run_module
from mambaflow.training import stop_signal
from mambaflow.training.flops import step_flops
from mambaflow.training.preflight import open_run, total_steps
from mambaflow.training.process_group import ProcessGroup
from mambaflow.training.run import Outcome, compared, reported_steps, train_and_score

ROOT = Path(__file__).parents[2]
VOLATILE = {
    "time", "train/samples_per_second", "train/input_stall", "watch/samples_per_second",
    "watch/input_stall", "test/seconds",
}  # fmt: skip


class Killed(BaseException):
    """What kill -9 is to a process: nothing handles it."""


class Scripted(ProcessGroup):
    """A process alone in which something happens as a step begins."""

    def __init__(self, events: dict[int, Callable[[], None]], first: int = 0) -> None:
        super().__init__(0, 1, CPU)
        self.events, self.step = events, first

    def wrap(self, objective: nn.Module):
        def forward(*args: torch.Tensor) -> torch.Tensor:
            self.step += 1
            self.events.get(self.step, lambda: None)()
            return objective(*args)

        return forward


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the other processes of these tests, so that equal means bitwise equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Look for STOP after every step."""
    monkeypatch.setattr(stop_signal, "STOP_POLL_S", -1.0)


def start(
    config: RunConfig, events: dict[int, Callable[[], None]] | None = None, *, after: int = -1
) -> Outcome:
    """Open and train; `after` says where it goes on, if not after the newest checkpoint."""
    newest = max(weights.saved_steps(open_run(config)), default=0)
    return train_and_score(config, Scripted(events or {}, newest if after < 0 else after))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> RunConfig:
    config = small.run_config(data, tmp_path_factory.mktemp("straight"), "straight")
    assert start(config) == Outcome("finished", STEPS)
    return config


def folder(config: RunConfig) -> Path:
    return Path(config.storage) / config.run_name


def lines(config: RunConfig) -> list[dict]:
    text = (folder(config) / "metrics.jsonl").read_text()
    return [
        {k: v for k, v in json.loads(line).items() if k not in VOLATILE}
        for line in text.splitlines()
    ]


def events(config: RunConfig) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's points by tag, as TensorBoard reads them."""
    book = EventAccumulator(str(folder(config)), size_guidance={"scalars": 0})
    book.Reload()
    return {
        tag: [(e.step, e.value) for e in book.Scalars(tag)]
        for tag in book.Tags()["scalars"]
        if tag not in VOLATILE
    }


def final(config: RunConfig) -> dict[str, str]:
    """sha256 of weights, average and optimiser (moments and counts) of every checkpoint kept."""
    run = at(folder(config))
    kept = weights.saved_steps(run)
    return {f"{s}/{f}": d for s in kept for f, d in weights.read_info(run, s).files.items()}


def report(config: RunConfig) -> dict:
    about = json.loads((folder(config) / "report" / "results.json").read_text())
    for row in about["rows"].values():
        row.pop("seconds", None)
    about.pop("command")
    # A job asks what its data hold; who calls train_and_score need not.
    about.pop("data hash", None)
    return about


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    assert final(one) == final(other) and len(final(one)) >= 3
    assert lines(one) == lines(other)
    assert events(one) == events(other)
    assert report(one) == report(other)


def test_two_straight_runs_are_one(straight, data, tmp_path):
    again = small.run_config(data, tmp_path, "again")
    start(again)
    assert_same_run(again, straight)


@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a smaller failure is not worth minutes of runs
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(stops=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=3, unique=True))
def test_a_run_stopped_anywhere_and_continued_is_the_straight_run_bitwise(
    straight, data, tmp_path_factory, stops
):
    config = small.run_config(data, tmp_path_factory.mktemp("stopped"), "stopped")
    stop = folder(config) / "STOP"
    for number, step in enumerate(sorted(stops)):
        go_on = replace(config, resume=number > 0)
        assert start(go_on, {step: stop.touch}) == Outcome("stopped", step)
    assert start(replace(config, resume=True)) == Outcome("finished", STEPS)
    assert not stop.exists()
    assert_same_run(config, straight)


@pytest.mark.parametrize("step", [6, 18])
def test_a_stop_at_a_validation_does_not_lose_it(straight, data, tmp_path, step):
    config = small.run_config(data, tmp_path, "due")
    assert start(config, {step: (folder(config) / "STOP").touch}).step == step
    assert "val/psnr" in weights.read_info(at(folder(config)), step).scores
    start(replace(config, resume=True))
    assert_same_run(config, straight)


@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a smaller failure is not worth minutes of runs
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kills=st.lists(st.integers(1, STEPS), min_size=1, max_size=3))
def test_a_run_killed_anywhere_goes_on_from_its_last_checkpoint_and_doubles_no_point(
    straight, data, tmp_path_factory, kills
):
    config = small.run_config(data, tmp_path_factory.mktemp("killed"), "killed")

    def kill() -> None:
        raise Killed

    died = 0
    for number, step in enumerate(kills):
        try:
            start(replace(config, resume=number > 0), {step: kill})
        except Killed:
            died += 1
    assert died >= 1
    start(replace(config, resume=True))
    assert_same_run(config, straight)


def test_there_is_no_generator_whose_state_a_resume_must_restore(data, tmp_path, straight):
    """Masks, order, times and noise are functions of (seed, step): the step is all of "RNG"."""
    config = small.run_config(data, tmp_path, "unseeded")
    start(config, {9: (folder(config) / "STOP").touch})
    torch.manual_seed(987654321)
    before = torch.get_rng_state()
    start(replace(config, resume=True))
    assert torch.equal(torch.get_rng_state(), before)  # nor is the caller's touched
    assert_same_run(config, straight)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    straight, data, tmp_path, caplog
):
    config = small.run_config(data, tmp_path, "damaged")
    start(config, {15: (folder(config) / "STOP").touch})
    run = at(folder(config))
    best, newest = weights.saved_steps(run)
    assert best < newest == 15
    path = folder(config) / "step_0000015" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    # Stopped again before the damaged one's step: what is saved then must not be pruned away.
    start(replace(config, resume=True), {13: (folder(config) / "STOP").touch}, after=best)
    assert "trying the one before" in caplog.text
    assert weights.saved_steps(run) == [best, 13]
    start(replace(config, resume=True))
    assert_same_run(config, straight)


def test_an_error_in_a_step_keeps_the_last_checkpoint_and_the_run_goes_on(straight, data, tmp_path):
    config = small.run_config(data, tmp_path, "full")

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        start(config, {14: full})
    assert max(weights.saved_steps(at(folder(config)))) == 12
    start(replace(config, resume=True))
    assert_same_run(config, straight)


def test_a_taken_name_is_refused_finished_or_not(straight, data, tmp_path):
    with pytest.raises(ValueError, match=r"run_name \(='straight'\) is taken by a finished run"):
        open_run(straight)
    config = small.run_config(data, tmp_path, "begun")
    start(config, {5: (folder(config) / "STOP").touch})
    before = {p: p.read_bytes() for p in folder(config).rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="is taken by a begun run .* use --resume to go on, or"):
        open_run(config)
    assert {p: p.read_bytes() for p in folder(config).rglob("*") if p.is_file()} == before


def test_of_two_runs_that_take_a_name_at_once_one_gets_it(straight, monkeypatch):
    monkeypatch.setattr(type(at(".")), "exists", lambda self, key: False)  # both looked before
    before = (folder(straight) / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"run_name \(='straight'\) is taken"):
        open_run(replace(straight, data="elsewhere"))
    assert (folder(straight) / "config.json").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(straight, data, tmp_path):
    config = small.run_config(data, tmp_path, "twice")
    start(config)
    start(replace(config, resume=True))
    assert_same_run(config, straight)


def test_no_curve_of_a_finished_run_is_a_single_point(straight):
    single = [tag for tag, points in events(straight).items() if len(points) == 1]
    assert "val/psnr" in events(straight) and not single
    # The final figures are a line of metrics.jsonl, and a table in TensorBoard.
    assert "test/psnr" in lines(straight)[-1]
    book = EventAccumulator(str(folder(straight))).Reload()
    (text,) = book.Tensors("test/text_summary")
    table = (folder(straight) / "report/table.md").read_bytes()
    assert text.tensor_proto.string_val == [table] and text.step == STEPS
    assert [image.step for image in book.Images("view/test")] == [STEPS]


def test_tensorboards_table_has_what_runs_are_compared_by_and_no_path(straight, data):
    book = EventAccumulator(str(folder(straight))).Reload()
    about = book.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(about).session_start_info.hparams
    with torch.device("meta"):
        count = parameters(VelocityField(straight.model))
    assert settings["parameters"].number_value == count
    assert settings["flops"].number_value == STEPS * step_flops(
        straight.model, straight.train, LAYOUT.known, LAYOUT.target
    )
    assert (
        settings["model.d_model"].number_value == 16 and settings["train.lr"].number_value == 2e-3
    )
    # What has no column of its own, and is not as the recipe has it.
    assert "model.frequencies: 64 -> 4" in settings["others"].string_value
    assert "d_model" not in settings["others"].string_value
    assert not [name for name in settings if name in ("command", "data", "storage")]
    for value in settings.values():
        assert str(data) not in value.string_value and straight.storage not in value.string_value


def test_every_run_has_the_same_columns_in_tensorboards_table(straight):
    other = RECIPES["mission"]("v1")
    assert compared(other).keys() == compared(straight).keys()
    assert compared(other)["others"] == ""


def test_a_finished_run_with_more_epochs_goes_on_and_says_that_its_rate_changes(
    data, tmp_path, caplog
):
    config = small.run_config(data, tmp_path, "longer")
    start(config)
    more = replace(config, resume=True, train=replace(config.train, epochs=6))
    assert start(more) == Outcome("finished", 30)
    assert "epochs: 4 -> 6; the learning rate goes on along the other cosine" in caplog.text
    rates = {line["step"]: line["train/lr"] for line in lines(more) if "train/lr" in line}
    assert rates[20] < 2e-5 < 2e-4 < rates[24]  # from near zero back up: stated, not hidden
    assert reported_steps(at(folder(more))) == 30
    tested = [line["step"] for line in lines(more) if "test/psnr" in line]
    assert tested == [20, 30]
    with pytest.raises(
        ValueError, match=r"epochs \(=5\) end at step 25, .* already at step 30; use --epochs 6"
    ):
        open_run(replace(config, resume=True, train=replace(config.train, epochs=5)))


def test_a_run_ends_at_its_last_step_with_a_learning_rate_of_nothing(data, tmp_path):
    config = small.run_config(data, tmp_path, "cut")
    config = replace(config, train=replace(config.train, max_steps=7, log_every=1))
    assert total_steps(config, rows=80) == 7 and config.train.epochs * 80 > 7
    assert start(config) == Outcome("finished", 7)
    rates = {line["step"]: line["train/lr"] for line in lines(config) if "train/lr" in line}
    assert max(rates) == 7 and rates[7] < 0.1 * max(rates.values())


def test_a_resume_as_another_run_is_refused_with_each_difference_named(straight):
    before = (folder(straight) / "config.json").read_bytes()
    other = replace(
        straight,
        resume=True,
        model=replace(straight.model, d_model=32),
        train=replace(straight.train, lr=1.0, batch_size=4, log_every=1),
    )
    with pytest.raises(ValueError, match="cannot resume with another configuration") as refused:
        open_run(other)
    message = str(refused.value)
    for difference in (
        "model.d_model: 16 -> 32",
        "train.lr: 0.002 -> 1.0",
        "train.batch_size: 8 -> 4",
    ):
        assert difference in message
    assert "log_every" not in message  # how often it is looked at may change
    assert (folder(straight) / "config.json").read_bytes() == before


def test_how_often_a_run_is_looked_at_changes_nothing_that_it_learns(straight, data, tmp_path):
    config = small.run_config(data, tmp_path, "watched", log_every=1, eval_every=5, eval_images=2)
    start(config)
    last = f"{STEPS}/optimizer.safetensors"
    assert final(config)[last] == final(straight)[last]


def test_the_best_on_validation_is_the_one_reported(data, tmp_path, monkeypatch):
    scores = iter([20.0, 23.0, float("nan"), 22.0])
    validate = run_module.validate

    def scripted(*args: object) -> tuple:
        named, picture = validate(*args)
        return named | {"val/psnr": next(scores)}, picture

    monkeypatch.setattr(run_module, "validate", scripted)
    config = small.run_config(data, tmp_path, "best")
    start(config)
    assert weights.saved_steps(at(folder(config))) == [12, STEPS]
    about = report(config)
    assert about["checkpoint"] == "step 12" and about["trained_steps"] == STEPS
    model, index = weights.load_model(folder(config))
    test = EvalSet.read(ShardSet(str(data), "test"), LAYOUT, 4)
    again = final_report(model, test, config, 12, STEPS)
    assert again.rows["posterior mean"]["psnr"] == about["rows"]["posterior mean"]["psnr"]


def test_the_test_split_is_read_at_the_end_alone(data, tmp_path, monkeypatch):
    opened = []

    class Watched(ShardSet):
        def __init__(self, uri: str, split: str) -> None:
            opened.append((split, group.step))
            super().__init__(uri, split)

    config = small.run_config(data, tmp_path, "blind")
    open_run(config)
    group = Scripted({})
    monkeypatch.setattr(run_module, "ShardSet", Watched)
    train_and_score(config, group)
    # Training data once more, for what a step costs.
    assert opened == [("train", 0), ("validation", 0), ("test", STEPS), ("train", STEPS)]


def test_the_law_is_fitted_to_images_of_all_shards_also_where_few_may_be_open(
    data, tmp_path, monkeypatch
):
    few, seen = partial(ShardSet, memory=1), []
    monkeypatch.setattr(run_module, "ShardSet", few)

    def residuals(model, batches):
        seen.append(batches.order)
        raise Killed

    monkeypatch.setattr(run_module, "residuals", residuals)
    with pytest.raises(Killed):
        train_and_score(small.run_config(data, tmp_path, "x"), ProcessGroup(0, 1, CPU))
    shards = few(str(data), "train")
    assert shards.shuffle_block < len(shards) == seen[0].block
    assert len({*(seen[0].stretch(0, 8) // shards.shuffle_block)}) > 1


def test_workers_that_restored_different_steps_do_not_start(data, tmp_path):
    class Apart(ProcessGroup):
        def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
            return values + 12  # the other worker's

    config = small.run_config(data, tmp_path, "apart")
    open_run(config)
    with pytest.raises(RuntimeError, match="worker 0 is after step 0, the 2 workers on average"):
        train_and_score(config, Apart(0, 2, CPU))


ENVIRONMENT = {**os.environ, "MAMBAFLOW_THREADS": "1"}
TWO = ScaleConfig(num_workers=2, ray=False)


def flags(config: RunConfig) -> list[str]:
    where = {"data": config.data, "storage": config.storage, "run-name": config.run_name}
    return [*FLAGS, *(f"--{key}={value}" for key, value in where.items())]


def job(config: RunConfig, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/train.py"), *flags(config), *more]


def torchrun(*command: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [sys.executable, *launcher, *command]


# A job that gets a signal once it has logged a step. From itself: from outside, a fast one may be
# over before the signal comes.
SIGNALLED = """
import os, runpy, sys
from mambaflow.training.run import Trainer
number, step, log = int(sys.argv[1]), int(sys.argv[2]), Trainer._log

def signalled(self, result):
    log(self, result)
    if result.step == step:
        os.kill(os.getpid(), number)

Trainer._log = signalled
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def signalled(command: list[str], number: int, step: int, cwd: Path) -> int:
    """Run a job that gets a signal once it has logged `step`; its exit code."""
    ours = [command[0], "-c", SIGNALLED, str(int(number)), str(step), *command[1:]]
    return subprocess.run(ours, env=ENVIRONMENT, cwd=cwd, timeout=120).returncode


LONG = ("--epochs=20", "--eval-every=25")  # 100 steps


@pytest.fixture(scope="module")
def long(data, tmp_path_factory) -> RunConfig:
    config = small.run_config(
        data, tmp_path_factory.mktemp("long"), "long", epochs=20, eval_every=25
    )
    start(config)
    return config


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_real_process_that_gets_a_signal_is_resumed_to_the_straight_run(
    long, data, tmp_path, number, code
):
    config = small.run_config(data, tmp_path, "signalled", epochs=20, eval_every=25)
    assert signalled(job(config, *LONG), number, step=28, cwd=tmp_path) == code
    saved = weights.saved_steps(at(folder(config)))
    # Asked, it saves the step after which it stops: the next one that it begins.
    assert max(saved) == (29 if number == signal.SIGTERM else 25)
    done = subprocess.run(
        job(config, *LONG, "--resume"), env=ENVIRONMENT, cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resumed signalled after step {max(saved)}" in done.stderr
    assert_same_run(config, long)


def test_a_failed_job_exits_1_with_a_traceback_and_keeps_its_last_checkpoint(data, tmp_path):
    config = small.run_config(data, tmp_path, "failed")
    broken = (
        "import sys, runpy, torch\n"
        "step = torch.optim.AdamW.step\n"
        "def full(self, *a):\n"
        "    if any(s['step'] == 14 for s in self.state.values()):\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return step(self, *a)\n"
        "torch.optim.AdamW.step = full\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = job(config)
    failed = subprocess.run(
        [command[0], "-c", broken, *command[1:]], env=ENVIRONMENT, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr and "No space left on device" in failed.stderr
    assert max(weights.saved_steps(at(folder(config)))) == 12


SILENT = """
import runpy, sys
from mambaflow.storage_base import StorageError
from mambaflow.training.run import Trainer
write = Trainer._write

def silent(self, step, scores):
    if step == 12:
        raise StorageError("s3://bucket/runs does not answer; check AWS_ENDPOINT_URL")
    write(self, step, scores)

Trainer._write = silent
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_storage_that_does_not_answer_ends_a_job_by_name_and_it_goes_on_later(data, tmp_path):
    config = small.run_config(data, tmp_path, "cut-off")
    command = job(config)
    failed = subprocess.run(
        [command[0], "-c", SILENT, *command[1:]], env=ENVIRONMENT, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    told = "error: s3://bucket/runs does not answer; check AWS_ENDPOINT_URL"
    assert f"{told}\ngo on with --resume --run-name cut-off" in failed.stderr
    assert weights.saved_steps(at(folder(config))) == [6]
    subprocess.run(job(config, "--resume"), env=ENVIRONMENT, cwd=tmp_path, check=True, timeout=120)


PARTED = """
import os, sys, torch
import torch.distributed as dist
from dataclasses import replace
from pathlib import Path
from mambaflow.training import run as run_module
from mambaflow.training import stop_signal
from mambaflow.config import from_json
from mambaflow.training.preflight import open_run
from mambaflow.training.process_group import ProcessGroup, launched_group
config = from_json(sys.argv[1])
folder = Path(config.storage) / config.run_name
stop_signal.STOP_POLL_S = -1.0
batches = []

class Scripted(ProcessGroup):
    def wrap(self, objective):
        whole = super().wrap(objective)
        def forward(batch, *more):
            batches.append(batch)
            if len(batches) == 11 and self.rank == 0:
                (folder / "STOP").touch()
            return whole(batch, *more)
        return forward

with launched_group(False) as launched:
    group = Scripted(launched.rank, launched.size, launched.device)
    for resume in (False, True):
        if group.rank == 0:
            open_run(replace(config, resume=resume))
        dist.barrier()
        outcome = run_module.train_and_score(config, group)
        assert outcome == run_module.Outcome(*(("finished", 20) if resume else ("stopped", 12)))
    torch.save(batches, f"{config.storage}/batches{group.rank}")
"""


@pytest.mark.slow
def test_two_workers_of_torchrun_train_as_one_and_resume_bitwise(straight, data, tmp_path):
    """One and two workers sum the same gradients in another order, and float32 addition is not
    associative: they agree to rounding, which in 20 steps of Adam grows to 1e-5 in most weights
    and to 4e-4 in those with next to no gradient, such as the bias of keys, which a softmax
    cancels. Two workers and two workers stopped half-way agree bitwise."""
    whole = small.run_config(data, tmp_path, "whole")
    parted = replace(small.run_config(data, tmp_path, "parted"), scale=TWO)
    script = tmp_path / "parted.py"
    script.write_text(PARTED)
    for command in (
        torchrun(str(ROOT / "jobs/train.py"), *flags(whole), "--num-workers=2"),
        torchrun(str(script), to_json(parted)),
    ):
        done = subprocess.run(
            command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
    assert_same_run(parted, whole)

    alone = Batches(ShardSet(str(data), "train"), LAYOUT, whole.train)
    halves = [torch.load(tmp_path / f"batches{rank}", weights_only=False) for rank in (0, 1)]
    for step, (first, second) in enumerate(zip(*halves, strict=True)):
        for part in fields(first):
            both = torch.cat([getattr(half, part.name) for half in (first, second)])
            assert torch.equal(both, getattr(alone[step], part.name))
    assert step == STEPS - 1

    ones, twos = (
        weights.load_model(folder(c), score="none")[0].state_dict() for c in (straight, whole)
    )
    for key, value in ones.items():
        torch.testing.assert_close(twos[key], value, rtol=1e-3, atol=5e-4, msg=key)
    for one, two in zip(lines(straight), lines(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-2, abs=1e-4)


SLOW_FIRST = """
import sys, time
from dataclasses import replace
from mambaflow.config import from_json
from mambaflow.evaluation import complete
from mambaflow.training import checkpoint, run
from mambaflow.training.preflight import open_run
from mambaflow.training.process_group import launched_group
config, save = from_json(sys.argv[1]), checkpoint.save
complete.CHUNK = 1  # every worker has test images of its own

def slow(*given):
    time.sleep(0.5)
    return save(*given)

checkpoint.save = slow
with launched_group(False) as group:
    config = group.broadcast(replace(config, run_name=f"told-by-{group.rank}"))
    if group.rank == 0:
        open_run(config)
    group.all_reduce(run.torch.zeros(1))
    run.train_and_score(config, group)
"""


def test_workers_go_on_to_the_test_only_when_the_last_checkpoint_is_in_place(data, tmp_path):
    """The others do not save: ahead of a slow first worker they would find none."""
    config = replace(small.run_config(data, tmp_path, "x", epochs=1, eval_every=100), scale=TWO)
    script = tmp_path / "slow.py"
    script.write_text(SLOW_FIRST)
    done = subprocess.run(
        torchrun(str(script), to_json(config)), env=ENVIRONMENT, cwd=tmp_path,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "told-by-0" / "report/results.json").read_text())
    assert about["trained_steps"] == 5 and about["rows"]["posterior mean"]["images"] == 4
    assert [p.name for p in tmp_path.glob("told-by-*")] == ["told-by-0"]


def test_a_run_whose_gradient_is_not_finite_stops_at_once_and_saves_nothing_of_it(data, tmp_path):
    config = small.run_config(data, tmp_path, "bad", lr=1e30, warmup_steps=1, log_every=1)
    outcome = start(config)
    assert outcome.status == "diverged" and 1 < outcome.step < 6
    assert "lower lr (=1e+30)" in outcome.cause and "none yet" in outcome.cause
    assert weights.saved_steps(at(folder(config))) == []
    logged = (folder(config) / "metrics.jsonl").read_text().splitlines()
    assert len(logged) == outcome.step - 1
    for line in logged:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("lr", "train"),
    [
        (1e12, {"eval_every": 1}),  # finite weights whose answers are not
        (1e12, {"max_steps": 1}),
        (1e39, {"eval_every": 1}),  # no such weights in 32 bits
    ],
)
def test_a_step_of_finite_gradient_to_a_model_that_is_not_is_never_saved(data, tmp_path, lr, train):
    config = small.run_config(data, tmp_path, "far", lr=lr, log_every=1, **train)
    outcome = start(config)
    assert outcome.status == "diverged" and outcome.step <= 2
    assert "the model is not finite by step" in outcome.cause and f"lr (={lr:g})" in outcome.cause
    assert weights.saved_steps(at(folder(config))) == []


def test_a_stop_does_not_save_weights_that_are_not_finite(data, tmp_path):
    config = small.run_config(data, tmp_path, "far", lr=1e39, warmup_steps=0)
    ask = {1: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    outcome = start(config, ask)
    assert outcome.status == "diverged" and weights.saved_steps(at(folder(config))) == []


def fill(disk: Path) -> None:
    room = os.statvfs(disk)
    (disk / "other").write_bytes(bytes(room.f_bavail * room.f_frsize))


@pytest.mark.parametrize(("at_step", "until"), [(8, 13), (20, 20)])
def test_a_full_disk_ends_a_run_by_name_and_it_goes_on_once_there_is_room(
    straight, data, small_disk, at_step, until
):
    config = small.run_config(data, small_disk, "full")
    outcome = start(config, {at_step: lambda: fill(small_disk)})
    assert outcome.status == "full" and outcome.failed and at_step <= outcome.step <= until
    assert str(folder(config)) in outcome.cause and "free space there" in outcome.cause
    # The checkpoint before is good, and nothing is left of the one that had no room.
    saved = [6] if at_step == 8 else [12, 18]
    assert set(weights.saved_steps(at(folder(config)))) <= {*saved, 6}
    assert {p.name for p in folder(config).glob("step_*")} == {
        f"step_{step:07d}" for step in weights.saved_steps(at(folder(config)))
    }
    assert not list(folder(config).rglob(".*"))
    (small_disk / "other").unlink()
    assert start(replace(config, resume=True)) == Outcome("finished", STEPS)
    assert_same_run(config, straight)


def test_a_disk_that_is_full_at_the_report_ends_the_run_by_name(straight, data, small_disk):
    config = small.run_config(data, small_disk, "untold")
    sound, filled = run_module.final_report, []

    def last(*args):
        report = sound(*args)
        filled.append(fill(small_disk))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "final_report", last)
        outcome = start(config)
    assert filled and (outcome.status, outcome.step) == ("full", STEPS)
    assert reported_steps(at(folder(config))) is None
    (small_disk / "other").unlink()
    assert start(replace(config, resume=True)) == Outcome("finished", STEPS)
    assert reported_steps(at(folder(config))) == STEPS


def test_a_run_that_diverges_late_keeps_what_it_saved_before(data, tmp_path, monkeypatch):
    config = small.run_config(data, tmp_path, "late")
    norms = {}

    def broken(self, result, now):
        norms[result.step] = float(result.grad_norm)
        worse = replace(
            result, grad_norm=result.grad_norm * float("nan" if result.step == 9 else 1)
        )
        return sound(self, worse, now)

    sound = run_module.Trainer._finite
    monkeypatch.setattr(run_module.Trainer, "_finite", broken)
    outcome = start(config)
    assert (outcome.status, outcome.step) == ("diverged", 9) and max(norms) == 9
    assert weights.saved_steps(at(folder(config))) == [6]
    assert "step_0000006" in outcome.cause
    # It goes on from there, once the cause is gone.
    monkeypatch.undo()
    assert start(replace(config, resume=True)).status == "finished"


@pytest.mark.parametrize("step", [6, 7])  # as a checkpoint is due, and between two
def test_a_run_that_another_process_takes_over_ends_and_touches_nothing(data, tmp_path, step):
    config = small.run_config(data, tmp_path, "taken")
    run = open_run(config)
    run.write("owner/0001.json", b"{}")
    files: dict[str, bytes] = {}

    def take():
        run.write("owner/0002.json", b"{}")
        files.update({key: run.read(key) for key in run.list() if "metrics" not in key})

    group = Scripted({step: take})
    group.owner = 1
    outcome = train_and_score(config, group)
    assert outcome.status == "lost" and outcome.step in (step, step + 1)
    assert "was taken over by another process" in outcome.cause
    after = {key: run.read(key) for key in run.list() if "metrics" not in key}
    # TensorBoard's file may grow: it is the loser's own, by its name.
    assert {k: v for k, v in after.items() if "tfevents" not in k} == {
        k: v for k, v in files.items() if "tfevents" not in k
    }
    assert weights.saved_steps(run) == ([6] if step > 6 else [])


def test_a_run_that_is_taken_over_while_it_scores_the_test_writes_no_report(
    data, tmp_path, monkeypatch
):
    config = small.run_config(data, tmp_path, "taken", max_steps=2)
    run = open_run(config)
    run.write("owner/0001.json", b"{}")
    sound = run_module.final_report

    def late(*args):
        run.write("owner/0002.json", b"{}")
        return sound(*args)

    monkeypatch.setattr(run_module, "final_report", late)
    group = Scripted({})
    group.owner = 1
    outcome = train_and_score(config, group)
    assert (outcome.status, outcome.step) == ("lost", 2) and "was taken over by" in outcome.cause
    assert reported_steps(run) is None and not run.exists("report/table.md")


TWICE = [sys.executable, "jobs/train.py", *FLAGS, "--epochs=100000", "--run-name=one"]


@pytest.mark.slow
def test_a_run_that_is_alive_is_not_resumed_but_taken_over_by_force(data, tmp_path):
    """The command line, in processes of their own."""
    flags = [*TWICE, f"--data={data}", f"--storage={tmp_path}"]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = at(tmp_path / "one")
    first = subprocess.Popen(flags, **pipes)
    second = None
    try:
        wait_for(lambda: weights.saved_steps(run))
        refused = subprocess.run([*flags, "--resume"], **pipes)
        assert refused.returncode == 2, refused.stderr
        assert f"is owned by process {first.pid} on " in refused.stderr
        assert "--take-over" in refused.stderr and first.poll() is None
        second = subprocess.Popen([*flags, "--resume", "--take-over"], **pipes)
        _, told = first.communicate(timeout=300)
        assert first.returncode == 1 and f"taken over by process {second.pid} on" in told
        second.send_signal(signal.SIGTERM)
        _, told = second.communicate(timeout=300)
        assert second.returncode == 143, told
    finally:
        for process in filter(None, (first, second)):
            process.kill()
    assert from_json(run.read("config.json")).take_over is False
