"""Training on real Ray clusters: the same numbers as without, and faults that it outlives.

A cluster starts in about ten seconds, so that each test here carries several claims.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from unittest.mock import Mock

import pytest
from heads import start_head, start_node
from processes import kill, processes, wait_for
from small import FLAGS, staged

from mambaflow.config import RunConfig, ScaleConfig, to_dict
from mambaflow.distributed.environment import cluster_address, set_ray_environment
from mambaflow.models import weights
from mambaflow.run_paths import RunPaths
from mambaflow.storage import at
from mambaflow.training import preflight, run

set_ray_environment()

import ray  # noqa: E402
import ray.train  # noqa: E402

from mambaflow.distributed import cluster, train  # noqa: E402

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, str(ROOT / "jobs/train.py")]
ON_RAY = [flag for flag in FLAGS if flag != "--no-ray"]
WEIGHTS = "ema.safetensors"


@pytest.fixture
def shards(tmp_path) -> Path:
    return staged(tmp_path)


def finish(command: list[str], code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def final_weights(uri: str) -> bytes:
    folder = at(uri)
    return folder.read(f"{RunPaths.checkpoint(weights.saved_steps(folder)[-1])}/{WEIGHTS}")


def test_a_worker_on_ray_trains_bitwise_as_a_process_alone(shards, tmp_path, marked):
    where = [f"--data={shards}", f"--storage={tmp_path / 'runs'}"]
    home = tmp_path / "home"
    home.mkdir()
    os.environ["HOME"], before = str(home), os.environ["HOME"]
    try:
        said = finish([*TRAIN, *ON_RAY, *where, "--run-name=ray"])
    finally:
        os.environ["HOME"] = before
    finish([*TRAIN, *FLAGS, *where, "--run-name=alone"])
    assert final_weights(tmp_path / "runs/ray") == final_weights(tmp_path / "runs/alone")
    assert "posterior mean" in said and "tensorboard --logdir" in said
    assert not (home / ".ray").exists(), "a private cluster keeps its token to itself"
    taken = finish([*TRAIN, *ON_RAY, *where, "--run-name=ray"], code=2)
    assert "is taken by a finished run" in taken


def test_a_worker_takes_the_threads_of_its_configuration(monkeypatch):
    class Over(Exception):
        pass

    def share(*given: int) -> None:
        raise Over(*given)

    context = Mock(**{"get_local_world_size.return_value": 4})
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(train, "RayProcessGroup", Mock())
    monkeypatch.setattr(train, "share_threads", share)
    config = RunConfig(scale=ScaleConfig(threads=3))
    with pytest.raises(Over) as given:
        train.train_worker(
            {"run": to_dict(config), "progress": Mock(), "score_test": False, "owner": None}
        )
    assert given.value.args == (4, 3)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_undisturbed(
    shards, tmp_path, bucket, marked
):
    flags = [*ON_RAY, "--epochs=120", "--eval-every=60", f"--data={shards}", "--num-workers=2"]
    disturbed = at(f"{bucket}/runs/disturbed")
    job = subprocess.Popen(
        [*TRAIN, *flags, f"--storage={bucket}/runs", "--run-name=disturbed"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    wait_for(lambda: job.poll() is not None or weights.saved_steps(disturbed))
    workers = [pid for pid, title in processes(marked) if title.startswith("ray::RayTrainWorker")]
    assert len(workers) == 2 and weights.saved_steps(disturbed)[-1] < 600
    os.kill(workers[1], signal.SIGKILL)
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert "failed" in said and "resumed disturbed after step" in said, said
    finish([*TRAIN, *flags, f"--storage={tmp_path / 'runs'}", "--run-name=straight"])
    assert final_weights(disturbed.uri) == final_weights(tmp_path / "runs/straight")


@pytest.mark.slow
def test_two_elastic_runs_each_on_its_own_ray_stop_at_ctrl_c_with_a_checkpoint(
    shards, tmp_path, marked
):
    runs = tmp_path / "runs"
    flags = [*ON_RAY, f"--data={shards}", f"--storage={runs}", "--epochs=100000"]
    elastic = ["--num-workers=2", "--min-workers=1"]
    jobs = {
        name: subprocess.Popen(
            [*TRAIN, *flags, *elastic, f"--run-name={name}"], text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for name in ("one", "other")
    }  # fmt: skip
    metrics = {name: runs / name / "metrics.jsonl" for name in jobs}
    wait_for(
        lambda: (
            any(job.poll() is not None for job in jobs.values())
            or all(m.exists() and m.read_text().count("\n") > 3 for m in metrics.values())
        )
    )
    titles = [title for _, title in processes(marked)]
    assert sum(title.startswith("ray::RayTrainWorker") for title in titles) == 4
    for job in jobs.values():
        assert job.poll() is None, job.communicate()
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    for name, job in jobs.items():
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 128 + signal.SIGTERM, said
        step = weights.saved_steps(at(runs / name))[-1]
        assert f"stopped after step {step}; go on with --resume --run-name {name}" in said


@pytest.mark.slow
def test_damage_found_by_a_worker_ends_the_run_by_name_and_code(shards, tmp_path, marked):
    last = sorted((shards / "train").glob("*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:-9])
    flags = [*ON_RAY, f"--data={shards}", f"--storage={tmp_path / 'runs'}", "--max-failures=1"]
    said = finish([*TRAIN, *flags, "--run-name=damaged"], code=3)
    assert f"shard {last} is damaged" in said and "go on with --resume" in said


@pytest.mark.slow
def test_a_full_disk_ends_the_run_by_name_and_is_not_tried_again(shards, small_disk, marked):
    # Room for the log, and for no checkpoint.
    room = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(room.f_bavail * room.f_frsize - 100_000))
    flags = [*ON_RAY, f"--data={shards}", f"--storage={small_disk}", "--num-workers=2"]
    said = finish([*TRAIN, *flags, "--run-name=full"], code=1)
    assert f"error: {small_disk}/full/" in said and "No space left on device; free space" in said
    assert "go on with --resume --run-name full" in said and "--storage" in said
    assert said.count("training full after step 0") == 1 and "Traceback" not in said
    assert not list((small_disk / "full").glob("step_*"))


def test_an_account_of_failures_names_the_count_the_worker_and_the_cause():
    cause = RuntimeError("Traceback …\n  line 3\nOSError: no space left on device")
    error = ray.train.WorkerGroupError("lost", {1: cause})
    said = train._account(error, ScaleConfig(max_failures=1))
    assert said == (
        "workers failed 2 times (max_failures=1); "
        "the last time worker 1: OSError: no space left on device"
    )


@pytest.mark.slow
def test_ray_jobs_run_stop_with_a_checkpoint_and_go_on(shards, tmp_path, head):
    ray = str(Path(sys.executable).parent / "ray")
    runs = tmp_path / "runs"
    where = [f"--data={shards}", f"--storage={runs}", "--run-name=job"]
    submit = [ray, "job", "submit"]
    train = ["--", sys.executable, "jobs/train.py", *ON_RAY, *where]

    endless = [*submit, "--no-wait", "--submission-id=long", "--working-dir=.", *train]
    finish([*endless, "--epochs=100000"])
    metrics = runs / "job/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    finish([ray, "job", "stop", "long"])
    steps = weights.saved_steps(at(runs / "job"))
    assert steps and "was stopped" in finish([ray, "job", "status", "long"])
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert steps[-1] >= last, "the checkpoint is of the last step"

    # Literally as in README, from the checkout; a wrong flag ends the job with code 2.
    said = finish([*submit, *train, "--batch-size=7", "--num-workers=2"], code=1)
    assert "batch_size (=7) must be divisible" in said and "exit code 2" in said
    said = finish(
        [*submit, "--working-dir=.", *train, f"--epochs={steps[-1] // 5 + 4}", "--resume"]
    )
    assert "posterior mean" in said
    assert run.reported_steps(at(runs / "job")) > steps[-1]


# A connection refused five times in 2.5 s is a dead node (Ray's own: half a minute); a slow answer
# is none. What waits for a lost node is given up after 5 s (60), and growth is thought of every
# second (60).
HASTE = {
    "RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "10000", "RAY_health_check_failure_threshold": "5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "MAMBAFLOW_GROWTH_S": "1",
}  # fmt: skip

# Ray Train learns of nodes from an actor that looks for them every 20 s, a number that nothing
# sets; whoever asks it to recompute makes it look.
LOOK = """
import time, ray
ray.init("auto", log_to_driver=False)
while True:
    time.sleep(1)
    try:
        actor = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
        ray.get(actor.get_reserved_resources.remote("", recompute=True), timeout=10)
    except (ValueError, ray.exceptions.GetTimeoutError):
        pass  # no run has begun
"""


@pytest.fixture
def growing(marked, monkeypatch) -> str:
    """The address of a cluster of one node, to which others come and go, and are soon missed."""
    for name, value in HASTE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ports = start_head(marked, "--num-cpus=1", "--include-dashboard=false")
    address = f"127.0.0.1:{ports['port']}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    subprocess.Popen([sys.executable, "-c", LOOK], stderr=subprocess.DEVNULL)
    return address


def add_node(head: str) -> str:
    """One more node, of one CPU; the mark of its processes, its workers among them."""
    mark = uuid.uuid4().hex
    start_node(f"--address={head}", "--num-cpus=1", NODE_MARK=mark)
    return mark


def starts(job: subprocess.Popen, output: Path, count: int) -> list[tuple[int, int]]:
    """(step, workers) of each time that training began, once there are `count`, in its words."""

    def found() -> list[tuple[int, int]]:
        lines = re.findall(r"training \w+ after step (\d+); workers: (\d+)", output.read_text())
        return [(int(step), int(workers)) for step, workers in lines]

    wait_for(lambda: job.poll() is not None or len(found()) >= count)
    assert job.poll() is None, output.read_text()
    return found()


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """What was logged under a tag, by step, in the order of the file."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[tag]) for line in lines if tag in line]


@pytest.mark.slow
def test_an_elastic_run_shrinks_when_a_node_is_lost_and_grows_when_one_comes(
    shards, tmp_path, growing
):
    # A report waits for Ray's next look, twice a second: the 60 checkpoints make the run last
    # while nodes come and go, on a fast machine too.
    steps, runs, output = 120, tmp_path / "runs", tmp_path / "output"
    flags = [f"--data={shards}", f"--storage={runs}", f"--epochs={steps // 5}", "--eval-every=2"]
    elastic = [*TRAIN, *ON_RAY, *flags, "--run-name=elastic", "--num-workers=2", "--min-workers=1"]
    node = add_node(growing)
    with output.open("w") as file:
        job = subprocess.Popen(elastic, stdout=file, stderr=file, cwd=ROOT)

    assert starts(job, output, 1) == [(0, 2)]
    saved = wait_for(lambda: weights.saved_steps(at(runs / "elastic")))
    lost = kill(node)
    assert sum(title.startswith("ray::RayTrainWorker") for title in lost) == 1
    assert any("raylet/raylet" in title for title in lost)
    resumed, workers = starts(job, output, 2)[1]
    assert workers == 1 and saved[-1] <= resumed < steps

    # The one left goes on by itself, however slow the machine, before there are two again.
    wait_for(lambda: max(weights.saved_steps(at(runs / "elastic"))) > resumed)
    came = add_node(growing)
    grown, workers = starts(job, output, 3)[2]
    assert workers == 2 and resumed < grown < steps
    working = [title for _, title in processes(came) if title.startswith("ray::RayTrainWorker")]
    assert len(working) == 1
    assert job.wait(120) == 0, output.read_text()
    assert output.read_text().count("; workers: ") == 3
    assert run.reported_steps(at(runs / "elastic")) == steps
    straight = [*TRAIN, *FLAGS, *flags, "--run-name=straight"]
    subprocess.run(straight, check=True, timeout=120, cwd=ROOT)
    for tag, every in (("train/loss", 4), ("val/psnr", 2)):
        logged, expected = curve(runs / "elastic", tag), curve(runs / "straight", tag)
        assert [step for step, _ in logged] == list(range(every, steps + 1, every))
        assert dict(logged) == pytest.approx(dict(expected), rel=1e-3)


def test_a_head_that_does_not_answer_is_lost_after_a_while_and_a_run_says_so(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(cluster, "HEAD_LOOK_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = cluster.HeadWatch(f"127.0.0.1:{server.getsockname()[1]}")
        head.look()
    head.look()  # it may be back soon
    monkeypatch.setattr(cluster, "HEAD_LOST_S", 0.0)
    lost = pytest.raises(run.RunFailed, match="cluster at RAY_ADDRESS .* is lost: its head")
    with lost as said, cluster.loss_named():
        head.look()
    assert "see that its head runs" in str(said.value)
    monkeypatch.delenv("RAY_ADDRESS")
    private = pytest.raises(run.RunFailed, match="this machine's private Ray is lost: its head")
    with private as said, cluster.loss_named():
        head.look()
    assert "ray start" not in str(said.value), "a new start of the job brings its own"


def test_what_ray_raises_of_a_lost_cluster_is_a_run_that_failed():
    for error in (ray.exceptions.RpcError("gone"), ray.exceptions.RaySystemError("gone")):
        with pytest.raises(run.RunFailed, match="is lost: .*gone"), cluster.loss_named():
            raise error


def test_what_ray_raises_of_a_cluster_that_answers_is_not_called_its_loss(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = cluster.HeadWatch(f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(cluster, "head_watch", lambda: head)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        with pytest.raises(run.RunFailed) as said, cluster.loss_named():
            raise ray.exceptions.OutOfMemoryError("no memory on node 7")
    told = "Ray failed, and its head answers: OutOfMemoryError: no memory on node 7"
    assert str(said.value) == told
    # The same of one that has stopped listening.
    lost = pytest.raises(run.RunFailed, match="is lost: no memory on node 7")
    with lost, cluster.loss_named():
        raise ray.exceptions.OutOfMemoryError("no memory on node 7")


def test_the_address_of_jobs_is_told_from_that_of_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match="is where jobs are submitted; use `ray job submit"):
        cluster_address()
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster_address() == "local"


def test_a_run_folder_that_a_node_does_not_share_is_refused(tmp_path):
    config = RunConfig(storage=str(tmp_path), run_name="elsewhere", scale=ScaleConfig())
    with pytest.raises(ValueError, match=r"must be seen by every node; use a shared folder or s3"):
        preflight.check_storage(config)
