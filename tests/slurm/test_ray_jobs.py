"""Runs on a real Ray, over the nodes of a real Slurm, on data and storage in S3."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from lab import NET, run
from processes import wait_for
from small import FLAGS, staged
from submitted import Job

from mambaflow.models import weights
from mambaflow.run_paths import RunPaths
from mambaflow.storage import at

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.timeout(600)]

# 500 steps, so that a run can be disturbed on its way.
LONG = [f for f in FLAGS if f != "--no-ray" and not f.startswith(("--epochs", "--eval-every"))]
LONG += ["--epochs=100", "--eval-every=50", "--threads=1"]
S3_PORT = 36899


@dataclass
class Bucket:
    """Shards and runs in S3."""

    uri: str

    def train(self, cluster, name: str, **config: object) -> Job:
        where = [f"--data={self.uri}/shards", f"--storage={self.uri}/runs", f"--run-name={name}"]
        return cluster.submit(["jobs/train.py", *LONG, *where], ray=(), **config)

    def steps(self, name: str) -> list[int]:
        return weights.saved_steps(at(f"{self.uri}/runs/{name}"))

    def weights(self, name: str) -> bytes:
        folder = RunPaths.checkpoint(self.steps(name)[-1])
        return at(f"{self.uri}/runs/{name}").read(f"{folder}/ema.safetensors")


@pytest.fixture(scope="module")
def bucket(lab, tmp_path_factory) -> Iterator[Bucket]:
    """moto's S3 at the address at which nodes reach this machine, with a data set."""
    command = [sys.executable, "-m", "moto.server", f"-H{NET}.1", f"-p{S3_PORT}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    given = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{NET}.1:{S3_PORT}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "TESTKEYID", "AWS_SECRET_ACCESS_KEY": "TESTSECRET",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        given.setenv(name, value)
    try:
        wait_for(lambda: _answers(server))
        shards = at(str(staged(tmp_path_factory.mktemp("data"))))
        for key in shards.list():
            at("s3://lab/shards").write(key, shards.read(key))
        yield Bucket("s3://lab")
    finally:
        given.undo()
        server.terminate()
        server.wait(30)


def _answers(server: subprocess.Popen) -> bool:
    assert server.poll() is None, f"{server.args} ended"
    try:
        boto3.client("s3").create_bucket(Bucket="lab")
        return True
    except Exception:
        return False


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """The weights of the run that nobody disturbs, once a test has made them."""
    return {}


def straight(cluster, bucket: Bucket, undisturbed: dict[str, bytes]) -> bytes:
    """The weights that the other runs are to have, to the bit."""
    if not undisturbed:
        job = bucket.train(cluster, "straight")
        assert job.finish() == 0, job.account()
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


def requeue(cluster, job: Job) -> None:
    run("scontrol", "requeue", job.number)


def preempt(cluster, job: Job) -> None:
    run("sbatch", "-p", "urgent", "-N3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def warn(cluster, job: Job) -> None:
    run("scancel", "--signal=USR2", job.number)


def kill_the_driver(cluster, job: Job) -> None:
    (driver,) = cluster.processes("python", "code/jobs/train.py")
    os.kill(driver, signal.SIGKILL)


def kill_the_task(cluster, job: Job) -> None:
    os.kill(cluster.tasks()[0], signal.SIGKILL)


def cut_a_node_off_its_power(cluster, job: Job) -> None:
    cluster.lab.kill_node("node2")


FAULTS = [requeue, warn, preempt, kill_the_driver, kill_the_task, cut_a_node_off_its_power]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_is_disturbed_ends_with_the_bits_of_one_that_is_not(
    cluster, bucket, undisturbed, fault
):
    expected = straight(cluster, bucket, undisturbed)
    name = fault.__name__
    job = bucket.train(cluster, name)
    job.await_(lambda: bucket.steps(name))
    assert bucket.steps(name)[-1] < 500 and job.task.exit_code() is None
    fault(cluster, job)
    job.await_(lambda: len(job.attempts()) == 2)
    assert job.finish() == 0, job.account()
    assert job.restarts == 1, "the fault happened, and once"
    assert f"resumed {name} after step" in job.said()
    assert bucket.steps(name)[-1] == 500 and bucket.weights(name) == expected


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
    assert job.finish() == 0


def test_paths_are_short_enough_for_unix_sockets():
    from mambaflow.launch.ray_node import temp_root

    # Ray's own part: /session_2026-11-29_03-00-00_123456_1234567/sockets/plasma_store
    assert len(f"{temp_root()}/123456789.999") + 70 < 107
    assert Path(temp_root()).is_absolute()
