"""Nothing of a private Ray outlives its driver, however the driver ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import processes, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

# A driver with five children: two name its folder, and one is a fork that holds all its files.
STAND_IN = """
import os, subprocess, sys, time
from mambaflow.distributed.reaper import named, reaper
SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
folder = sys.stdin.readline().strip()
with reaper(folder):
    inside = [subprocess.Popen([*SLEEP, folder])]
    with named(folder):
        inside.append(subprocess.Popen(SLEEP))
    outside = [subprocess.Popen(SLEEP), subprocess.Popen([*SLEEP, os.path.dirname(folder)])]
    fork = os.fork()
    if not fork:
        time.sleep(1000)
    print(*(child.pid for child in [*inside, *outside]), fork, flush=True)
    sys.stdin.readline()
print("on it goes", flush=True)
sys.stdin.readline()
"""

PRIVATE_RAY = """
import sys
from mambaflow.distributed.environment import set_ray_environment
set_ray_environment()
import ray
from mambaflow.distributed.cluster import connect
from mambaflow.signals import leaving

@ray.remote(num_cpus=0)
class Actor:
    def answer(self):
        return "up"

with leaving(), connect():
    actor = Actor.remote()
    print(ray.get(actor.answer.remote()), flush=True)
    sys.stdin.readline()
"""


def driver(code: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def alive(mark: str) -> set[int]:
    return {pid for pid, _ in processes(mark)}


def reapers(mark: str) -> list[int]:
    return [pid for pid, title in processes(mark) if "reaper.py" in title]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


def tell(one: subprocess.Popen, line: str) -> str:
    """Its next line, after ours."""
    one.stdin.write(f"{line}\n")
    one.stdin.flush()
    return one.stdout.readline()


def started(mark: str, folder: Path) -> tuple[subprocess.Popen, set[int], set[int]]:
    """The stand-in of a driver, and its children that name the folder and that do not."""
    one = driver(STAND_IN)
    children = [int(pid) for pid in tell(one, str(folder)).split()]
    assert len(reapers(mark)) == 1 and alive(mark) >= {one.pid, *children}
    return one, set(children[:2]), set(children[2:])


def test_what_names_the_folder_of_a_killed_driver_ends_and_nothing_else(folder, marked):
    one, inside, outside = started(marked, folder)
    one.kill()
    one.wait()
    wait_for(lambda: not inside & alive(marked) and not folder.exists())
    wait_for(lambda: not reapers(marked))
    assert alive(marked) == outside


def test_a_driver_that_ends_it_in_order_goes_on_and_so_do_its_other_children(folder, marked):
    one, inside, outside = started(marked, folder)
    assert tell(one, "end") == "on it goes\n"
    wait_for(lambda: not inside & alive(marked) and not folder.exists())
    wait_for(lambda: not reapers(marked))
    assert alive(marked) == outside | {one.pid}


def test_the_reaper_holds_none_of_its_drivers_streams_nor_is_it_in_its_session(folder, marked):
    one, *_ = started(marked, folder)
    (reaper,) = reapers(marked)
    streams = [os.readlink(f"/proc/{reaper}/fd/{n}") for n in (1, 2)]
    assert streams == ["/dev/null", "/dev/null"]
    assert os.getsid(reaper) != os.getsid(one.pid)


def titles(mark: str) -> str:
    return "\n".join(title for _, title in processes(mark))


@pytest.fixture
def private_ray(marked) -> tuple[subprocess.Popen, Path]:
    """A driver with a private Ray, and Ray's folder."""
    one = driver(PRIVATE_RAY)
    assert one.stdout.readline() == "up\n"
    # The last to be up, and the ones that outlive a killed driver.
    wait_for(lambda: all(f"ray::{a}Agent" in titles(marked) for a in ("Dashboard", "RuntimeEnv")))
    assert {"gcs_server", "raylet"} <= set(re.findall(r"\w+", titles(marked)))
    (folder,) = set(re.findall(r"/tmp/mf-\w+", titles(marked)))
    assert Path(folder).is_dir() and len(reapers(marked)) == 1
    return one, Path(folder)


@pytest.mark.ray
def test_a_private_ray_ends_with_a_driver_that_is_killed(private_ray, marked):
    one, folder = private_ray
    watching = set(reapers(marked))
    one.kill()
    one.wait()
    wait_for(lambda: not folder.exists())
    # Left alone, Ray's agents stay for a minute: they have been made to end.
    assert alive(marked) <= watching
    wait_for(lambda: not processes(marked))


@pytest.mark.ray
def test_a_private_ray_ends_with_a_driver_that_ends_in_order(private_ray, marked):
    one, folder = private_ray
    one.communicate("\n", timeout=120)
    assert one.returncode == 0
    wait_for(lambda: not processes(marked) and not folder.exists())


@pytest.mark.ray
def test_a_private_ray_ends_with_a_driver_that_is_asked_to_stop(private_ray, marked):
    """Ray's own handler of SIGTERM, which it puts in place of ours, would end it with 15."""
    one, folder = private_ray
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=120)
    assert one.returncode == 143
    wait_for(lambda: not processes(marked) and not folder.exists())


@pytest.mark.ray
def test_a_driver_that_is_asked_to_stop_as_its_ray_starts_says_so(marked):
    """The handler is that of Ray's node by then, which ends it with 1."""
    one = driver(PRIVATE_RAY)
    wait_for(lambda: "gcs_server" in titles(marked))
    one.send_signal(signal.SIGTERM)
    told, _ = one.communicate(timeout=120)
    assert (one.returncode, told) == (143, "")
    wait_for(lambda: not processes(marked))
