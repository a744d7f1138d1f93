"""Jobs of two users on one node at once: each has its own Ray, and nothing of the other's."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, run
from processes import wait_for
from submitted import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.timeout(600)]

USERS = ("games", "news")  # that Debian always has
LOGIN, ENDS_S = "node3", 300

# Both wait for each other, so that they surely run at once; then each tries the other's Ray.
MEETING = """
import os, subprocess, sys, time
from pathlib import Path
import ray
me, other, both = sys.argv[1], sys.argv[2], Path(sys.argv[3])
ray.init(logging_level="ERROR")
there = ray.get(ray.remote(lambda: os.getuid()).remote())
print("begins as", there, "with", int(ray.cluster_resources()["CPU"]), "CPUs", flush=True)
(both / me).write_text(os.environ["RAY_ADDRESS"])
end = time.monotonic() + 200
while not (both / other).exists() or not (both / other).read_text():
    assert time.monotonic() < end, "the other did not come"
    time.sleep(0.1)
look = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print('inside')"
address = (both / other).read_text()
tried = subprocess.run([sys.executable, "-c", look, address], capture_output=True, text=True)
print("other's Ray:", tried.returncode != 0 and "oken" in tried.stderr, "inside" in tried.stdout)
for place in sys.argv[4:]:
    try:
        print("read:", os.listdir(place))
    except PermissionError:
        print("shut:", place)
(both / (me + "-done")).touch()
while not (both / (other + "-done")).exists():
    assert time.monotonic() < end, "the other did not end"
    time.sleep(0.1)
"""


@pytest.fixture
def homes(lab: Lab) -> Iterator[Path]:
    """A folder for each user, and one for both, on the disk that nodes share."""
    made = Path(tempfile.mkdtemp(prefix="mambaflow-users-"))
    made.chmod(0o755)
    (made / "both").mkdir()
    (made / "both").chmod(0o777)
    (made / "meeting.py").write_text(MEETING)
    for user in USERS:
        (made / user).mkdir(mode=0o700)
        shutil.chown(made / user, user, pwd.getpwnam(user).pw_gid)
    yield made
    shutil.rmtree(made)


def as_user(lab: Lab, user: str, home: Path, *command: str) -> str:
    """What a command prints, run by a user on the login node."""
    kept = (
        "SLURM_CONF",
        "PATH",
        "MAMBAFLOW_TEST_MARK",
        "MAMBAFLOW_SILENCE_S",
        "RAY_worker_niceness",
    )
    environment = {name: os.environ[name] for name in kept}
    environment |= {"HOME": str(home), "LANG": "C.UTF-8"}
    variables = [f"{k}={v}" for k, v in environment.items()]
    line = lab.on_node(LOGIN, user, "env", "-i", f"--chdir={home}", *variables)
    done = subprocess.run([*line, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{user}: {done.stdout}{done.stderr}"
    return done.stdout


def test_jobs_of_two_users_on_one_node_do_not_meet(cluster, lab, homes):
    cli = [sys.executable, str(ROOT / "cluster/slurm.py")]
    roots = {user: f"/tmp/mf-{pwd.getpwnam(user).pw_uid}" for user in USERS}
    jobs = {}
    for user, other in (USERS, USERS[::-1]):
        home = homes / user
        private = [str(homes / other), roots[other]]
        out = as_user(
            lab, user, home, *cli, "submit", "--nodes=1", "--cpus-per-node=1", "--time=30",
            f"--folder={home}/slurm", "--", str(homes / "meeting.py"), user, other,
            str(homes / "both"), *private,
        )  # fmt: skip
        jobs[user] = out.split()[0]

    def ended() -> bool:
        return all(list((homes / user).glob("slurm/*/tasks/0/done.json")) for user in USERS)

    try:
        wait_for(ended, ENDS_S)
    finally:
        said = {user: as_user(lab, user, homes / user, *cli, "logs", jobs[user],
                              f"--folder={homes / user}/slurm") for user in USERS}  # fmt: skip
        print(said)  # noqa: T201
    where = {run("squeue", "-h", "-t", "all", "-j", job, "-o", "%N %u").strip()
             for job in jobs.values()}  # fmt: skip
    assert where == {"node1 games", "node1 news"}, "one node, two users"
    for user, other in (USERS, USERS[::-1]):
        assert f"begins as {pwd.getpwnam(user).pw_uid} with 1 CPUs" in said[user]
        assert "other's Ray: True False" in said[user]
        assert f"shut: {homes / other}\nshut: {roots[other]}\n" in said[user]
        status = as_user(lab, user, homes / user, *cli, "status", jobs[user],
                         f"--folder={homes / user}/slurm")  # fmt: skip
        assert "done, exit code 0" in status
        assert not list((homes / user).rglob("token"))
        assert not Path(roots[user]).exists(), "nothing of Ray is left"
