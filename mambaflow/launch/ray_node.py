"""Ray on this node of an attempt: started with all that it would else guess, and ended for good."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mambaflow.distributed.reaper import VARIABLE, reap, reaper
from mambaflow.launch.node import Node
from mambaflow.signals import ASKING, withheld
from mambaflow.variables import TORCHRUN, stated

STARTED = "Ray runtime started"
START_S, TRIES = 180.0, 3
LOOK_S = 0.2
OBJECT_STORE_SHARE = 0.3  # of the node's memory, as Ray has it


class NodeFailed(RuntimeError):
    """Ray does not run on a node; the message says why."""


def temp_root() -> Path:
    """Where this user's Rays keep their sockets: short, since a Unix socket's name holds 107
    bytes, and on the node's own disk."""
    return Path(f"/tmp/mf-{os.getuid()}")


def temp_folder(node: Node) -> Path:
    """That of this attempt: another one on the same node, of another job, has its own."""
    return temp_root() / f"{node.job}.{node.restarts}"


def environment(node: Node, token: Path) -> dict[str, str]:
    """What Ray and the command are started with."""
    left_out = ("RAY_AUTH_TOKEN", "RAY_ADDRESS", *TORCHRUN)
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    return kept | {
        # Stated, since Ray would else look for a token in the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # By these a reaper finds whatever is left (see distributed.reaper).
        VARIABLE: str(temp_folder(node)),
        "SPT_NOENV": "1",
        "MAMBAFLOW_CORES": stated("MAMBAFLOW_CORES") or str(node.cpus),
    }


@contextlib.contextmanager
def room(node: Node) -> Iterator[Path]:
    """The attempt's folder of Ray on this node; in the end it is gone, and so is all that names it,
    however we end."""
    root, folder = temp_root(), temp_folder(node)
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise NodeFailed(f"{root} on {node.name} is another user's; have it removed")
    # What an attempt before left here that was killed with its reaper.
    for old in root.glob(f"{node.job}.*"):
        reap(str(old), {os.getpid()}, grace_s=0)
    folder.mkdir(mode=0o700)
    # Masked: the reaper has to outlive what ends us.
    with withheld(*ASKING), contextlib.ExitStack() as stack:
        stack.enter_context(reaper(str(folder)))
        watched = stack.pop_all()
    with watched:
        try:
            yield folder
        finally:
            # At once, instead of in seconds: nothing on this Ray is wanted any more.
            reap(str(folder), _spared(), grace_s=0)
    with contextlib.suppress(OSError):  # another attempt is here
        root.rmdir()


def _spared() -> set[int]:
    """This process and all reapers: ours has the folder in its command line."""
    spared = {os.getpid()}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"reaper.py" in (entry / "cmdline").read_bytes():
                spared.add(int(entry.name))
    return spared


class RayNode:
    """`ray start --block` on this node."""

    def __init__(self, ray: Sequence[str], node: Node, log: Path, token: Path) -> None:
        self.ray, self.node, self.log = list(ray), node, log
        self.environment = environment(node, token)
        self.process: subprocess.Popen[bytes] | None = None

    def start_head(self, wait: Callable[[], None]) -> str:
        """The head; returns its address once it answers.

        Raises:
            NodeFailed: it does not start.
        """
        for last in (*[False] * (TRIES - 1), True):
            address, port, client = self.node.address(), free_port(), free_port()
            more = ["--head", f"--port={port}", f"--ray-client-server-port={client}",
                    "--include-dashboard=false"]  # fmt: skip
            try:
                self._start(more, wait)
                return f"{address}:{port}"
            except NodeFailed:  # most likely somebody else took the port meanwhile
                if last:
                    raise
        raise AssertionError("unreachable")

    def join(self, address: str, wait: Callable[[], None]) -> None:
        """A node of the cluster at an address; NodeFailed where it is not let in."""
        self._start([f"--address={address}"], wait)

    def _start(self, more: list[str], wait: Callable[[], None]) -> None:
        memory = object_store_bytes()
        command = [
            *self.ray, "start", "--block", "--disable-usage-stats", f"--num-cpus={self.node.cpus}",
            f"--num-gpus={self.node.gpus}", f"--node-ip-address={self.node.address()}",
            f"--temp-dir={temp_folder(self.node)}", f"--object-store-memory={memory}",
            # By the system: two Rays on a node would else take the same range.
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", *more,
        ]  # fmt: skip
        began = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out, withheld(*ASKING):
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment
            )
        self._await(began, wait)

    def _await(self, began: int, wait: Callable[[], None]) -> None:
        end = time.monotonic() + START_S
        while STARTED not in self._said(began):
            if not self.alive() or time.monotonic() > end:
                self.end()
                raise NodeFailed(f"Ray did not start on {self.node.name}: {self._last(began)}")
            wait()
            time.sleep(LOOK_S)

    def _said(self, began: int) -> str:
        return self.log.read_bytes()[began:].decode(errors="replace")

    def _last(self, began: int) -> str:
        lines = [line for line in self._said(began).splitlines() if line.strip()]
        return f"{lines[-1].strip() if lines else 'it said nothing'} (in {self.log})"

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        """Its first process; the others end with the attempt's folder (see `room`)."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def object_store_bytes() -> int:
    """A share of the job's memory on this node, of which /dev/shm must have room for half again."""
    text = os.environ.get("SLURM_MEM_PER_NODE", "")
    memory = int(text) * 2**20 if text.isdigit() and int(text) else _host_memory()
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").exists() else os.statvfs("/tmp")
    room = shm.f_bavail * shm.f_frsize // 2
    return max(80 * 2**20, int(min(OBJECT_STORE_SHARE * memory, room)))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
