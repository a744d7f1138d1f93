"""tune/sweep.py: bad input changes nothing, and a sweep on a real Ray comes to its end whatever
happens on the way."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from processes import processes, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mambaflow.config import from_json
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.models import weights
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import Board
from mambaflow.search.ledger import Ledger
from mambaflow.storage import at

set_ray_environment()  # before Ray is imported, which this import does

from mambaflow.distributed.asha import Asha  # noqa: E402
from mambaflow.distributed.trial_actor import FAILURE  # noqa: E402

ROOT = Path(__file__).parents[2]
JOB = ROOT / "tune" / "sweep.py"
RUN = [flag for flag in small.FLAGS if flag != "--no-ray"]
SEARCH = ["--validations=4", "--num-samples=3", "--seed-trials=1", "--space=size"]
# Trials of seconds, so that what disturbs them comes before they end, on any machine.
LONG = ["--epochs=60", "--eval-images=8"]
# Ray's own workers are nice; on a machine that is busy with other things they would wait for it.
MINUTES = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(small.staged(tmp_path_factory.mktemp("data")))


class Sweep:
    """A sweep in a folder, and the processes that lead it."""

    def __init__(self, folder: Path, data: str) -> None:
        self.folder = folder / "runs" / "sweep"
        self.flags = [*RUN, f"--storage={folder / 'runs'}", f"--data={data}", "--run-name=sweep"]

    def start(self, *flags: str) -> subprocess.Popen:
        command = [sys.executable, str(JOB), *self.flags, *SEARCH, *flags]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)  # fmt: skip

    def run(self, *flags: str) -> tuple[int, str, str]:
        process = self.start(*flags)
        out, err = process.communicate(timeout=60 * MINUTES)
        return process.returncode, out, err

    @property
    def board(self) -> Board:
        return Board.of(Ledger(at(self.folder)).events())

    def reports(self) -> list[dict]:
        return [e for e in Ledger(at(self.folder)).events() if e["event"] == "report"]


@pytest.fixture
def sweep(tmp_path, data) -> Sweep:
    return Sweep(tmp_path, data)


REFUSED = {
    "--space=sizes": "unknown space 'sizes'; valid: size, optim, ablation",
    "--space=no.py:f": "no.py is not there",
    "--no-ray": "leave --no-ray out",
    "--resume": "has no sweep to resume",
    "--space=optim --search=grid": "train.lr is continuous and has no grid",
    "--num-samples=0": "num_samples (=0) must be positive",
    "--grace=5": "grace (=5) must be at most validations (=4)",
    "--reduction-factor=1": "reduction_factor (=1) must be 2 or more",
    "--budget=seconds": "trial_minutes (=0) must be above 0 with --budget seconds; use 10",
    "--trial-minutes=3": "trial_minutes (=3) is unused with --budget samples; leave it out",
    "--min-workers=1": "min_workers (=1) must be 0 in a sweep",
}


def plain(text: str) -> str:
    """Without the box that the parser of flags draws around its own refusals."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def job(monkeypatch):
    """The job as a module, found as a script finds what lies beside it."""
    monkeypatch.syspath_prepend(str(JOB.parent))
    return importlib.import_module("sweep")


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_refused_and_changes_nothing(job, sweep, flags, capsys):
    try:
        code = job.main([*sweep.flags, *SEARCH, *flags.split()])
    except SystemExit as error:  # the parser's own way
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and REFUSED[flags] in plain(err), err
    assert not sweep.folder.exists()


def test_a_sweep_in_a_jobs_copy_is_warned_of_storage_and_refused_data_that_did_not_travel(
    job, sweep, capsys, caplog, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x"}}')
    code = job.main([*sweep.flags, *SEARCH, "--storage=runs", "--data=data/away"])
    assert code == 2 and "storage (=runs) is in Ray's copy of --working-dir" in caplog.text
    assert "data (=data/away) is not in Ray's copy of --working-dir" in capsys.readouterr().err
    assert not sweep.folder.exists()


@pytest.mark.ray
def test_more_workers_than_there_will_ever_be_are_refused_with_the_arithmetic(
    sweep, marked, monkeypatch
):
    monkeypatch.setenv("MAMBAFLOW_CORES", "4")
    code, out, err = sweep.run("--num-workers=8")
    assert (code, out) == (2, "") and not sweep.folder.exists()
    assert "num_workers (=8) needs 8 CPUs, and the cluster has 4" in err


@pytest.mark.parametrize("args", [["--status"], ["--report-only"], ["stop", "0001"], ["add", "2"]])
def test_a_sweep_that_there_is_not_is_named(job, tmp_path, args, capsys):
    assert job.main([*args, "--run-name", "none", "--storage", str(tmp_path)]) == 2
    assert "none/sweep.json is not there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_is_killed_goes_on_and_accounts_for_every_trial(sweep, marked):
    driver = sweep.start(*LONG)
    wait_for(lambda: len(at(sweep.folder).list("ledger/")) and len(sweep.reports()) >= 2, 300)
    assert driver.poll() is None and len(processes(marked)) > 3
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    before = sweep.board
    assert before.ended == "running" and before.with_status("running", "waiting")
    # What it had started ends with it.
    wait_for(lambda: not processes(marked), 60)

    code, out, err = sweep.run(*LONG, "--resume")
    assert code == 0, err
    board = sweep.board
    assert board.starts == 2 and board.ended == "finished"
    assert len(board.trials) == 4 and not board.with_status("running", "waiting", "interrupted")
    # Nobody was trained twice: what was reported before the kill is in the ledger once.
    told = [(report["trial"], report["step"]) for report in sweep.reports()]
    assert len(set(told)) == len(told)
    # The rungs decided as those of one sweep that heard the same, in the same order.
    asha = Asha(json_search(sweep))
    for report in sweep.reports():
        if board.trials[report["trial"]].kind == "seed":
            continue
        trial = board.trials[report["trial"]]
        again = asha.decide(trial.name, report["step"] * 4 / trial.steps, psnr(report))
        assert report["decision"] == ("stop" if report["step"] == trial.steps else again)
    assert not processes(marked)
    # The test split was never looked at, and every run has its curves.
    for name in board.trials:
        logged = (sweep.folder / "trials" / name / RunPaths.METRICS).read_text()
        assert '"val/psnr"' in logged and "test/" not in logged
        assert not (sweep.folder / "trials" / name / "report").exists()


def json_search(sweep):
    from mambaflow.search.config import from_json as sweep_from

    return sweep_from((sweep.folder / "sweep.json").read_bytes()).search


def psnr(report) -> float:
    return report["scores"]["val/psnr"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Iterator[Sweep]:
    """A sweep of two configurations, to its end."""
    sweep = Sweep(tmp_path_factory.mktemp("finished"), data)
    code, _, err = sweep.run("--num-samples=2", "--seed-trials=0", "--scheduler=none")
    assert code == 0, err
    yield sweep


@pytest.mark.ray
def test_the_best_configuration_trained_again_has_the_trials_bits(finished):
    best = finished.board.best
    config = from_json((finished.folder / "best.json").read_bytes())
    assert config.model.d_model == best.values["model.d_model"]
    again = finished.folder.parent / "again"
    done = subprocess.run(
        [sys.executable, "jobs/train.py", f"--config={finished.folder / 'best.json'}",
         f"--run-name={again.name}", f"--storage={again.parent}", "--no-ray"],
        cwd=ROOT, capture_output=True, text=True, timeout=60 * MINUTES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trial = finished.folder / "trials" / best.name
    step = max(weights.saved_steps(at(trial)))
    assert step == best.steps == max(weights.saved_steps(at(again)))
    ours, theirs = (
        folder / RunPaths.checkpoint(step) / "model.safetensors" for folder in (trial, again)
    )
    assert ours.read_bytes() == theirs.read_bytes()
    assert weights.read_info(at(again), step).scores == best.last.scores


@pytest.mark.ray
def test_who_looks_sees_where_it_stands_and_its_report_again(job, finished, capsys):
    where = ["--run-name", "sweep", "--storage", str(finished.folder.parent)]
    assert job.main(["--status", *where]) == 0
    assert "2 of 2 configurations: 2 finished" in capsys.readouterr().out
    page = finished.folder / "report" / "index.html"
    assert page.exists()
    page.unlink()
    assert job.main(["--report-only", *where]) == 0 and page.exists()
    assert job.main(["stop", "9999", *where]) == job.main(["add", "none", *where]) == 2
    told = capsys.readouterr().err
    assert "unknown trial '9999'; valid: 0000, 0001" in told and "add (=none)" in told
    # Nothing was asked for.
    assert not (finished.folder / "requests").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_is_stopped_keeps_its_trials_and_takes_more(job, sweep, marked):
    driver = sweep.start(*LONG)
    wait_for(lambda: len(at(sweep.folder).list("ledger/")) and len(sweep.reports()) >= 1, 300)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=60 * MINUTES)
    assert driver.returncode == 143 and "go on with --resume" in out, err
    stopped = sweep.board
    assert stopped.ended == "interrupted" and stopped.with_status("interrupted")
    for trial in stopped.with_status("interrupted"):
        assert weights.saved_steps(at(sweep.folder / "trials" / trial.name))
    # More is asked for before it goes on.
    where = ["--run-name", "sweep", "--storage", str(sweep.folder.parent)]
    assert job.main(["add", "1", *where]) == 0
    code, _, err = sweep.run(*LONG, "--resume")
    assert code == 0, err
    board = sweep.board
    assert board.wanted == 4 and len(board.trials) == 5
    assert not board.with_status("running", "waiting", "interrupted", "failed")


@pytest.mark.ray
def test_tensorboard_has_each_trials_curve_and_settings(finished):
    for trial in finished.board.trials.values():
        events = EventAccumulator(str(finished.folder / "trials" / trial.name))
        events.Reload()
        curve = [point.value for point in events.Scalars("val/psnr")]
        assert curve == pytest.approx([report.psnr for report in trial.reports], rel=1e-6)
        assert "sweep/psnr" not in events.Tags()["scalars"], "a card of one dot"
        table = events.summary_metadata["_hparams_/experiment"].plugin_data.content
        assert b"val/psnr" in table
        plugins = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        for name in ("model.d_model", "model.perceiver_iterations", "parameters", "flops"):
            assert name.encode() in plugins


@pytest.mark.ray
def test_optunas_journal_is_there(finished):
    assert b"model.d_model" in (finished.folder / "optuna.log").read_bytes()


SPACE = """
from mambaflow.search.space import Choice, Product


def rates(run):
    return Product({"train.lr": Choice([1e30, 2e-3])})
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_fails_is_told_with_its_cause_and_the_others_go_on(sweep, tmp_path):
    (tmp_path / "mine.py").write_text(SPACE)
    code, _, err = sweep.run(
        f"--space={tmp_path / 'mine.py'}:rates", "--num-samples=2", "--seed-trials=0",
        "--search=grid", "--grad-clip=1e30", "--scheduler=none",
    )  # fmt: skip
    board = sweep.board
    assert code == 4, err
    (failed,) = board.with_status("failed")
    assert failed.values == {"train.lr": 1e30} and "gradient is not finite" in failed.cause
    assert [t.values for t in board.with_status("finished")] == [{"train.lr": 2e-3}]


@pytest.mark.ray
@pytest.mark.slow
def test_trials_of_two_workers_train_as_one_run_of_two_workers(sweep, marked, monkeypatch):
    monkeypatch.setenv("MAMBAFLOW_CORES", "4")
    # In seconds: how many steps they are, a worker's own machine must tell.
    code, _, err = sweep.run(
        "--num-workers=2", "--num-samples=2", "--seed-trials=0", "--scheduler=none",
        "--threads=1", "--budget=seconds", "--trial-minutes=0.02",
    )  # fmt: skip
    assert code == 0, err
    board = sweep.board
    assert board.concurrent == 2 and board.counts() == {"finished": 2}
    assert not processes(marked)
    for trial in board.trials.values():
        folder = sweep.folder / "trials" / trial.name
        assert not (folder / FAILURE).exists()
        assert max(weights.saved_steps(at(folder))) == trial.steps
        assert len(trial.reports) >= 1 and trial.steps > 0 and trial.flops > 0
        config = json.loads((folder / "config.json").read_text())
        assert config["scale"]["num_workers"] == 2
