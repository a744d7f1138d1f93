"""Runs on a real Ray, over the nodes of a real Slurm, on data and storage in S3."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
import torch
from lab import NET, run
from moto.server import DomainDispatcherApplication, create_backend_app
from safetensors.torch import load
from small import FLAGS, staged
from submitted import Job
from werkzeug.serving import make_server

from mambaflow.launch import scheduler
from mambaflow.models import weights
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import Board
from mambaflow.search.ledger import Ledger
from mambaflow.storage import at

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.timeout(1200)]

SHORT = [f for f in FLAGS if f != "--no-ray"]
# 400 steps, so that a run can be disturbed on its way.
STEPS = 400
LONG = [f for f in SHORT if not f.startswith(("--epochs", "--eval-every"))]
LONG += ["--epochs=80", "--eval-every=20", "--threads=1"]
LONG_S = 600  # all that Ray starts, on a machine that is busy with other things
S3_PORT = 36899
HELD_S = 40  # less than the 60 s after which boto takes a request for lost


@dataclass
class SlowS3:
    """moto's S3, that can be slow to take what a run saves.

    So that a run is on its way when a fault reaches it, however fast the machine and however slow
    the scheduler.
    """

    app: DomainDispatcherApplication = field(
        default_factory=lambda: DomainDispatcherApplication(create_backend_app)
    )
    free: threading.Event = field(default_factory=threading.Event)

    def __call__(self, environ, start_response):
        saved = ("/step_", "/rows/", "/ledger/")
        if environ["REQUEST_METHOD"] == "PUT" and any(s in environ["PATH_INFO"] for s in saved):
            self.free.wait(HELD_S)
        return self.app(environ, start_response)


@dataclass
class Bucket:
    """Shards and runs in S3."""

    uri: str
    s3: SlowS3

    @contextmanager
    def slow(self) -> Iterator[None]:
        self.s3.free.clear()
        try:
            yield
        finally:
            self.s3.free.set()

    def train(self, cluster, name: str, *flags: str, **config: object) -> Job:
        where = [f"--data={self.uri}/shards", f"--storage={self.uri}/runs", f"--run-name={name}"]
        return cluster.submit(["jobs/train.py", *LONG, *where, *flags], ray=(), **config)

    def steps(self, name: str) -> list[int]:
        return weights.saved_steps(at(f"{self.uri}/runs/{name}"))

    def last(self, name: str) -> int:
        """The newest checkpoint's step; 0 where there is none."""
        return max(self.steps(name), default=0)

    def weights(self, name: str) -> bytes:
        folder = RunPaths.checkpoint(self.last(name))
        return at(f"{self.uri}/runs/{name}").read(f"{folder}/ema.safetensors")


@pytest.fixture(scope="module")
def bucket(lab, tmp_path_factory) -> Iterator[Bucket]:
    """moto's S3 at the address at which nodes reach this machine, with a data set."""
    s3 = SlowS3()
    s3.free.set()
    server = make_server(f"{NET}.1", S3_PORT, s3, threaded=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    given = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{NET}.1:{S3_PORT}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "TESTKEYID", "AWS_SECRET_ACCESS_KEY": "TESTSECRET",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        given.setenv(name, value)
    try:
        boto3.client("s3").create_bucket(Bucket="lab")
        shards = at(str(staged(tmp_path_factory.mktemp("data"))))
        for key in shards.list():
            at("s3://lab/shards").write(key, shards.read(key))
        yield Bucket("s3://lab", s3)
    finally:
        given.undo()
        s3.free.set()
        server.shutdown()
        server.server_close()
        serving.join()


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """The weights of the run that nobody disturbs, once a test has made them."""
    return {}


def straight(cluster, bucket: Bucket, undisturbed: dict[str, bytes]) -> bytes:
    """The weights that the other runs are to have, to the bit."""
    if not undisturbed:
        job = bucket.train(cluster, "straight")
        assert job.finish(LONG_S) == 0, job.account()
        undisturbed["weights"] = bucket.weights("straight")
    return undisturbed["weights"]


def test_a_run_on_two_nodes_has_its_result_and_checkpoint_in_s3(cluster, bucket, undisturbed):
    began = time.monotonic()
    assert straight(cluster, bucket, undisturbed)
    (job,) = cluster.jobs
    print(f"{time.monotonic() - began:.0f} s from submission to the end")  # noqa: T201
    assert at(f"{bucket.uri}/runs/straight").exists(RunPaths.RESULTS)
    assert f"--num-workers={job.plan.config.nodes}" in str(job.plan.commands[0])
    assert "workers: 2" in job.said() and "posterior mean" in job.said()
    assert "TESTSECRET" not in job.account()


def asked_to_stop(job: Job) -> int:
    """How often the job's task has passed a request to stop on to the command."""
    return job.told().count("the command is asked to stop")


def requeue(cluster, job: Job) -> None:
    run("scontrol", "requeue", job.number)


def preempt(cluster, job: Job) -> None:
    run("sbatch", "-p", "urgent", "-N3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def come_to_the_time_limit(cluster, job: Job) -> None:
    shown = scheduler.parse_scontrol(run("scontrol", "show", "job", "-o", job.number))
    hours, minutes, _ = map(int, shown["RunTime"].split(":"))
    # Notice is due as many seconds before as the job asked for: now.
    limit = 60 * hours + minutes + 2
    run("scontrol", "update", f"jobid={job.number}", f"timelimit={limit}")
    job.await_(lambda: "SIGUSR2: the command is asked to stop" in job.told())
    run("scontrol", "update", f"jobid={job.number}", "timelimit=30")


def kill_the_driver(cluster, job: Job) -> None:
    (driver,) = cluster.processes("python", "code/jobs/train.py")
    os.kill(driver, signal.SIGKILL)


def kill_the_task(cluster, job: Job) -> None:
    os.kill(cluster.tasks()[0], signal.SIGKILL)


def cut_a_node_off_its_power(cluster, job: Job) -> None:
    assert "NodeList=node[1-2]" in run("scontrol", "show", "job", "-o", job.number)
    cluster.lab.kill_node("node2")


def kill_the_scheduler(cluster, job: Job) -> None:
    cluster.lab.kill_controller()
    cluster.lab.start_controller()
    job.await_(lambda: job.state == "RUNNING")


# In a row, in one run; only the death of the scheduler is nothing to it.
FAULTS = {
    "told to stop": [requeue, come_to_the_time_limit, preempt],
    "killed": [kill_the_scheduler, kill_the_driver, kill_the_task, cut_a_node_off_its_power],
}


@pytest.mark.parametrize("faults", FAULTS)
def test_a_run_that_is_disturbed_ends_with_the_bits_of_one_that_is_not(
    cluster, bucket, undisturbed, faults
):
    expected = straight(cluster, bucket, undisturbed)
    name, starts, saved = faults.replace(" ", "-"), 1, 0
    job = bucket.train(cluster, name)
    for fault in FAULTS[faults]:
        job.await_(lambda saved=saved: bucket.last(name) > saved)
        asked = asked_to_stop(job)
        with bucket.slow():
            fault(cluster, job)
            if faults == "told to stop":
                job.await_(lambda asked=asked: asked_to_stop(job) > asked)
        starts += fault is not kill_the_scheduler
        job.await_(lambda starts=starts: len(job.attempts()) == starts)
        saved = bucket.last(name)
        assert saved < STEPS and job.task.exit_code() is None, "it was on its way"
    assert job.finish(LONG_S) == 0, job.account()
    assert len(job.attempts()) == starts and job.restarts == starts - 1, "each fault did happen"
    assert job.said().count(f"resumed {name} after step") == starts - 1
    assert bucket.last(name) == STEPS and bucket.weights(name) == expected


def test_a_run_that_may_shrink_goes_on_without_a_node_that_is_lost(cluster, bucket, undisturbed):
    expected = load(straight(cluster, bucket, undisturbed))
    job = bucket.train(cluster, "shrinks", "--min-workers=1", on_node_loss="shrink")
    job.await_(lambda: bucket.last("shrinks"))
    cut_a_node_off_its_power(cluster, job)
    assert bucket.last("shrinks") < STEPS
    assert job.finish(LONG_S) == 0, job.account()
    assert len(job.attempts()) == 1 and bucket.last("shrinks") == STEPS
    assert "workers: 2" in job.said() and "workers: 1" in job.said(), "the loss was noticed"
    found = load(bucket.weights("shrinks"))
    assert found.keys() == expected.keys()
    # Sums over other shares of a batch round otherwise, and training makes more of it: of single
    # elements, those that are nearly zero differ most.
    ours, theirs = (
        torch.cat([one[key].double().flatten() for key in expected]) for one in (found, expected)
    )
    assert 0 < (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_a_sweep_that_is_preempted_goes_on_with_the_trials_that_it_has(cluster, bucket):
    search = ["--space=size", "--num-samples=4", "--seed-trials=0", "--validations=2"]
    where = [f"--data={bucket.uri}/shards", f"--storage={bucket.uri}/sweeps", "--run-name=sweep"]
    job = cluster.submit(["tune/sweep.py", *SHORT, *search, *where], ray=(), nodes=1)
    ledger = Ledger(at(f"{bucket.uri}/sweeps/sweep"))
    before = job.await_(lambda: Board.of(ledger.events()).with_status("finished"), LONG_S)
    with bucket.slow():
        preempt(cluster, job)
        job.await_(lambda: asked_to_stop(job))
    job.await_(lambda: len(job.attempts()) == 2)
    assert job.finish(LONG_S) == 0, job.account()
    board = Board.of(ledger.events())
    assert board.starts == 2 and board.ended == "finished" and job.restarts == 1
    ended = board.with_status("finished", "stopped")
    assert len(board.trials) == len(ended) == 4 and {t.name for t in before} <= {*board.trials}
    told = [(e["trial"], e["step"]) for e in ledger.events() if e["event"] == "report"]
    assert len(told) == len({*told}), "what a finished trial told is not told again"


def test_an_evaluation_that_is_preempted_makes_the_rows_that_are_missing(
    cluster, bucket, undisturbed
):
    straight(cluster, bucket, undisturbed)
    out = f"{bucket.uri}/results"
    job = cluster.submit(
        ["jobs/evaluate.py", f"--checkpoint={bucket.uri}/runs/straight", f"--out={out}",
         f"--data={bucket.uri}/shards", "--lpips=none", "--nfe", "2", "50", "100", "--at-nfe=2",
         "--fills", "linear", "--known-shares", "0.1", "0.3"], ray=(),
    )  # fmt: skip
    made = job.await_(lambda: at(out).list("rows/"), LONG_S)
    with bucket.slow():
        preempt(cluster, job)
        job.await_(lambda: asked_to_stop(job))
    job.await_(lambda: len(job.attempts()) == 2)
    assert job.finish(LONG_S) == 0 and job.restarts == 1, job.account()
    assert {*made} < {*at(out).list("rows/")}, "it was on its way"
    (asked, done) = re.findall(
        r"(\d+) rows asked = (\d+) done \+ 0 failed, all unique", job.said()
    )[-1]
    assert asked == done


def test_rays_ports_answer_only_with_the_token(cluster, bucket, tmp_path):
    job = bucket.train(cluster, "guarded")
    attempt = job.await_(lambda: [p for p in job.attempts() if (p / "address").exists()])[0]
    look = tmp_path / "look.py"
    look.write_text(
        "import sys, ray\nray.init(address=sys.argv[1], logging_level='ERROR')\nprint('inside')\n"
    )
    address = (attempt / "address").read_text()
    # On the head's own machine, where nothing but the token is in the way.
    node = run("squeue", "-h", "-j", job.number, "-o", "%B").strip()
    stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        ["ip", "netns", "exec", f"mfl{node}", sys.executable, str(look), address],
        capture_output=True, text=True, timeout=180,
        env=stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    )  # fmt: skip
    assert done.returncode and "inside" not in done.stdout
    assert "InvalidAuthToken" in done.stderr or "authentication" in done.stderr.lower()
    assert job.finish(LONG_S) == 0


def test_paths_are_short_enough_for_unix_sockets():
    from mambaflow.launch.ray_node import temp_root

    # Ray's own part: /session_2026-11-29_03-00-00_123456_1234567/sockets/plasma_store
    assert len(f"{temp_root()}/123456789.999") + 70 < 107
    assert Path(temp_root()).is_absolute()
