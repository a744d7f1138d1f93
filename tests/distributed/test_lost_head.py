"""The head of a cluster is lost while a job is at work: the job says so, and goes on on another."""

import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from heads import start_head
from PIL import Image
from processes import kill, processes, wait_for
from small import FLAGS, staged

from mambaflow.data.shard_reader import ShardSet
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.evaluation.rows import Results
from mambaflow.models.weights import saved_steps
from mambaflow.storage import at

set_ray_environment()

from mambaflow.distributed import cluster  # noqa: E402

ROOT = Path(__file__).parents[2]
PICTURES, SIDE = 100, 2048
# More than are made before the head is lost, which is as soon as there is a first one.
COMPARED = [
    "--lpips=none", "--samplers", "heun", "--nfe", "20", "--samples=40", "--fills", "linear",
    "--limit=8", "--resolutions", "24", "--at-nfe=20", "--known-shares", "0.2", "--asked", "20",
    "--num-workers=1",
]  # fmt: skip


def new_head(monkeypatch) -> str:
    """A cluster at RAY_ADDRESS; the mark of its processes, which a job's own lacks."""
    its_own = uuid.uuid4().hex
    flags = ("--num-cpus=1", "--include-dashboard=false")
    # Ray's workers wait for all else on a machine, which here may be busy with other tests.
    ports = start_head(uuid.uuid4().hex, *flags, HEAD_MARK=its_own, RAY_worker_niceness="0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{ports['port']}")
    return its_own


def staging(tmp_path: Path) -> list[str]:
    """Of pictures that take a while each."""
    for number in range(PICTURES):
        file = tmp_path / "images" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(file)
    flags = [f"--reduce={SIDE // 32}", "--validation=5", "--rows-per-shard=1"]
    return ["jobs/stage.py", f"--source={tmp_path}/images", *flags]


def comparing(tmp_path: Path) -> list[str]:
    """Which is evaluating, too."""
    shards = staged(tmp_path)
    where = [f"--data={shards}", f"--storage={tmp_path / 'runs'}", "--run-name=one"]
    train = [sys.executable, "jobs/train.py", *FLAGS, "--epochs=1", "--test-images=0", *where]
    subprocess.run(train, check=True, capture_output=True, timeout=240, cwd=ROOT)
    run = tmp_path / "runs/one"
    return ["jobs/compare.py", f"--v1={run}", f"--v2={run}", f"--data={shards}", *COMPARED]


def all_staged(said: str, out: Path) -> bool:
    """Whether all pictures are in shards."""
    if not at(out).list("test/manifest"):
        return False
    splits = [ShardSet(str(out), split) for split in ("train", "validation", "test")]
    return [*map(len, splits)] == [PICTURES - 10, 5, 5]


def all_compared(said: str, out: Path) -> bool:
    """Whether all rows that were asked for are there."""
    rows = Results(at(out)).read().num_rows
    return f"{rows} rows asked = {rows} done + 0 failed, all unique" in said


CASES = {staging: ("train/shard-", all_staged), comparing: ("rows/", all_compared)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("job", CASES)
def test_a_job_whose_head_is_lost_says_so_and_goes_on_on_another(
    job, tmp_path, marked, monkeypatch
):
    (first, whole), out = CASES[job], tmp_path / "out"
    command = [sys.executable, *job(tmp_path), f"--out={out}"]
    said = lost_under(command, lambda: at(out).list(first), tmp_path / "log", monkeypatch)
    assert said.rstrip().endswith("the same command goes on"), said
    kept = {key: at(out).read(key) for key in at(out).list(first)}
    assert kept and not whole(said, out)

    new_head(monkeypatch)
    again = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert whole(again.stdout, out)
    assert {key: at(out).read(key) for key in kept} == kept


def lost_under(command: list[str], begun: Callable[[], object], log: Path, monkeypatch) -> str:
    """What a job says whose head is killed once it has begun."""
    head = new_head(monkeypatch)
    with log.open("w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
    wait_for(lambda: driver.poll() is not None or begun(), 300)
    killed = kill(head)
    assert driver.poll() is None, log.read_text()
    assert any("gcs_server" in title for title in killed)
    wait_for(lambda: not processes(head))
    assert driver.wait(300) == 1, log.read_text()
    said = log.read_text()
    # Ray's own calls may notice it first, and in words of theirs.
    assert re.search(
        r"^error: .*cluster at RAY_ADDRESS .* is lost: .*see that its head", said, re.M
    )
    assert "Traceback" not in said, said
    return said


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_head_is_lost_says_so_and_resumes_on_another(tmp_path, marked, monkeypatch):
    runs = tmp_path / "runs"
    flags = [*(flag for flag in FLAGS if flag != "--no-ray"), "--run-name=one", "--test-images=0"]
    where = [f"--data={staged(tmp_path)}", f"--storage={runs}"]
    train = [sys.executable, "jobs/train.py", *flags, *where]

    def steps() -> list[int]:
        return saved_steps(at(runs / "one"))

    said = lost_under([*train, "--epochs=100000"], steps, tmp_path / "log", monkeypatch)
    assert said.rstrip().endswith("go on with --resume --run-name one"), said
    reached = steps()[-1]

    new_head(monkeypatch)
    resumed = [*train, f"--epochs={reached // 5 + 2}", "--resume"]
    again = subprocess.run(resumed, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps()[-1] == 5 * (reached // 5 + 2) > reached


# Without a cluster


@pytest.fixture
def gone(monkeypatch) -> None:
    """A head that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(cluster, "head_watch", lambda: cluster.HeadWatch(address))
    monkeypatch.setattr(cluster, "HEAD_LOOK_S", 0.0)
    monkeypatch.setattr(cluster, "HEAD_LOST_S", 0.0)


def test_a_call_that_never_returns_is_given_up_with_its_head(gone):
    with pytest.raises(ConnectionError, match="its head .* does not answer"):
        cluster.answered(Event().wait)


def test_who_connects_is_told_of_a_lost_head_until_it_leaves(gone, monkeypatch):
    told, heard = [], Event()

    def lost(why: str) -> None:
        told.append(why)
        heard.set()

    with cluster._watching(lost):
        assert heard.wait(60)
    (why,) = told
    assert "is lost: its head (127.0.0.1:" in why
    over: list[str] = []
    monkeypatch.setattr(cluster, "HEAD_LOST_S", 60.0)
    with cluster._watching(over.append):
        pass
    assert not over


def test_a_call_that_ends_gives_what_it_returns_or_raises_whatever_the_head_does(gone):
    looks: list[int] = []
    assert cluster.answered(lambda: 7, lambda: looks.append(1)) == 7 and looks

    def fail() -> None:
        raise KeyError("third")

    with pytest.raises(KeyError, match="third"):
        cluster.answered(fail)


LEAVING = """
import sys, threading
from mambaflow.host import leave
threading.Thread(target=threading.Event().wait).start()  # the interpreter would wait for it
print("said")
leave(1)
"""


def test_a_job_that_failed_waits_for_no_thread_and_loses_no_word():
    left = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=60
    )
    assert (left.returncode, left.stdout) == (1, "said\n"), left.stderr
