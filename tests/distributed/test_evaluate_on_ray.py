"""Evaluation on a real Ray cluster: the same rows, whatever dies on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import processes, wait_for
from small import FLAGS, staged

from mambaflow.distributed.environment import set_ray_environment
from mambaflow.evaluation.cells import EvaluateConfig
from mambaflow.evaluation.evaluate import evaluate
from mambaflow.evaluation.plan import plan
from mambaflow.evaluation.rows import Results
from mambaflow.storage import at

set_ray_environment()

from deadly import Deadly  # noqa: E402

from mambaflow.distributed import evaluate as on_ray_module  # noqa: E402
from mambaflow.distributed.cluster import connect  # noqa: E402

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
JOB = [sys.executable, str(ROOT / "jobs/evaluate.py")]
ASKED = [
    "--lpips=none", "--samplers", "mean", "heun", "ddim", "--nfe", "2", "20", "--samples=2",
    "--fills", "linear", "--limit=16", "--resolutions", "24", "36", "48", "--at-nfe=20",
]  # fmt: skip


@pytest.fixture
def shards(tmp_path) -> Path:
    return staged(tmp_path)


@pytest.fixture
def run(shards, tmp_path) -> str:
    train = [sys.executable, str(ROOT / "jobs/train.py"), *FLAGS, "--epochs=1", "--test-images=0"]
    where = [f"--data={shards}", f"--storage={tmp_path / 'runs'}", "--run-name=one"]
    subprocess.run([*train, *where], check=True, capture_output=True, timeout=240)
    return str(tmp_path / "runs/one")


def rows(out: str) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k != "seconds"} for r in Results(at(out)).read().to_pylist()
    ]


def finished(command: list[str], code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def actors(mark: str) -> list[int]:
    return [pid for pid, title in processes(mark) if "MapWorker" in title]


@pytest.mark.slow
@pytest.mark.s3
def test_rows_are_the_same_for_any_number_of_actors_and_whichever_of_them_die(
    shards, run, tmp_path, bucket, marked
):  # fmt: skip
    given = [f"--checkpoint=a={run}", f"--data={shards}", *ASKED]
    said = finished([*JOB, *given, f"--out={tmp_path / 'alone'}", "--no-ray"])
    alone = rows(str(tmp_path / "alone"))
    asked = len(alone)
    assert f"{asked} rows asked = {asked} done + 0 failed, all unique" in said

    # Two actors, results in S3; one is killed in the middle, and then the driver itself.
    out = f"{bucket}/results"
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen(
        [*JOB, *given, f"--out={out}", "--num-workers=2"], stdout=log, stderr=log
    )
    victim = wait_for(
        lambda: len(actors(marked)) == 2 and at(out).list("rows/") and actors(marked)
    )[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in actors(marked) or not _alive(victim))
    before = len(at(out).list("rows/"))
    wait_for(lambda: driver.poll() is not None or len(at(out).list("rows/")) > before)
    assert driver.poll() is None, "it ended before it could be killed"
    driver.kill()
    driver.wait()
    wait_for(lambda: not processes(marked))  # its Ray ends with it
    kept = at(out).list("rows/")
    assert kept, "rows were kept before the kill"
    told = finished([*JOB, f"--out={out}", "--status"])
    done = Results(at(out)).read(columns=()).num_rows
    assert f"{asked} rows asked: {done} done, 0 failed, {asked - done} missing" in told

    # The same command makes what is missing, and what is there stays as it is.
    again = finished([*JOB, *given, f"--out={out}", "--num-workers=1"])
    assert f"{asked} rows asked = {asked} done + 0 failed, all unique" in again
    assert set(kept) <= set(at(out).list("rows/"))
    assert rows(out) == alone, "to the bit"
    summary = json.loads(at(out).read("report/summary.json"))
    assert sum(entry["images"] for entry in summary["entries"]) >= 16
    assert at(out).read("report/index.html").startswith(b"<!DOCTYPE html>")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_more_actors_than_cores_are_refused_before_anything_is_made(
    shards, run, tmp_path, marked, monkeypatch
):  # fmt: skip
    monkeypatch.setenv("MAMBAFLOW_CORES", "2")
    out = tmp_path / "out"
    done = subprocess.run(
        [*JOB, f"--checkpoint={run}", f"--data={shards}", f"--out={out}", "--lpips=none",
         "--num-workers=3"], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "num_workers (=3) must be in [1, 2]" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_a_unit_that_kills_its_actors_ends_the_job_and_keeps_what_others_made(
    shards, run, tmp_path, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Where actors import the deadly one from: a private Ray has its driver's environment.
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(on_ray_module, "Worker", Deadly)
    asked = EvaluateConfig(
        checkpoint=(f"a={run}",), data=str(shards), out=str(tmp_path / "out"), limit=4, nfe=(2,),
        lpips="none", num_workers=1,
    )  # fmt: skip
    results = Results(at(asked.out))
    with connect(), pytest.raises(RuntimeError, match="an actor failed: "):
        evaluate(plan(asked), results, on_ray_module.on_ray(asked, 1))
    samplers = {row["sampler"] for row in results.read(columns=()).to_pylist()}
    assert "heun" not in samplers and {"linear", "mean"} <= samplers
