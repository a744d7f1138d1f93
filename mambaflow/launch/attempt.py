"""One attempt at a command: what runs on each node of an allocation, from its start to its end.

The first node has Ray's head and runs the command; the others join, and leave when it says that all
is over. Whatever ends differently is a fault: the attempt ends with REQUEUE, and the batch script
asks the scheduler for another one. No wait is without a deadline, or without somebody whose sign of
life it watches.
"""

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import submitit

from mambaflow.launch.beat import Beat, Watch, longest_silence_s
from mambaflow.launch.command import Command, Running, resumed
from mambaflow.launch.node import Node
from mambaflow.launch.ray_node import NodeFailed, RayNode, room
from mambaflow.launch.scheduler import usable_nodes
from mambaflow.launch.task_folder import TaskFolder
from mambaflow.launch.turn import Turn, take
from mambaflow.local_storage import LocalStorage
from mambaflow.signals import STOPPED, stopping

RAY = (sys.executable, "-m", "ray.scripts.scripts")
REQUEUE = STOPPED  # above 128: what a killed task has too, and the batch script looks for
LOCAL_REQUEUE = 144  # what submitit's local executor takes for it, a few times
FAILED = 1
FAULTS = 3  # so many are made good
JOIN_S, LEAVE_S, LOOK_S = 300.0, 20.0, 0.25

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """What submitit calls on every node."""

    folder: str
    """Of the task (see `task_folder`)."""
    command: Command
    code: str
    """Folder of the code that was submitted."""
    cwd: str
    shrink: bool
    """Go on with fewer nodes where one is lost; else end, to be started with all."""
    grace_s: float
    """How long the command may take to save when it is asked to stop."""
    ray: tuple[str, ...] = RAY

    def __call__(self) -> int:
        _log_to_stdout()
        node, task = Node.here(), TaskFolder(Path(self.folder))
        if (code := _ended(task)) is None:
            asked: list[str] = []
            part = Head if node.rank == 0 else Member
            # Only noted: what is due is done by the loops, which look. Nothing ends us at once:
            # for that a batch system has SIGKILL.
            with stopping(lambda number: asked.append(number.name), insist=False):
                code = part(self, node, task, asked).run()
        if code and node.rank == 0:
            # Not an exception, which submitit would turn into 1: the real code reaches Slurm.
            sys.stdout.flush()
            again = node.local and code == REQUEUE and _ended(task) is None
            raise SystemExit(LOCAL_REQUEUE if again else code)
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same again: what submitit's own handler wants in the moment before ours is there."""
        return submitit.helpers.DelayedSubmission(self)


def _ended(task: TaskFolder) -> int | None:
    """The code of a command that is not to be started again."""
    if (code := task.exit_code()) is not None:
        return code
    return STOPPED if task.files.exists(task.CANCELLED) else None


def _log_to_stdout() -> None:
    """What is told here goes into the log that submitit keeps of this node's output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    # Of this file alone: submitit has handlers of its own for its own.
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


class Replaced(Exception):
    """Another attempt has taken this one for lost, and runs the command."""


class Part:
    """A node's part in an attempt, and the files by which the parts know of one another."""

    def __init__(self, plan: Attempt, node: Node, task: TaskFolder, asked: list[str]) -> None:
        self.plan, self.node, self.task, self.asked = plan, node, task, asked
        self.folder = task.path / task.ATTEMPTS / node.attempt
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files = LocalStorage(self.folder)
        self.token = self.folder / "token"
        self.beat = Beat(self.folder / f"beat-{node.rank}")
        log = self.folder / f"node-{node.rank}.log"
        self.ray = RayNode(plan.ray, node, log, self.token)

    def has(self, name: str) -> bool:
        # Listed, not looked up: a network file system remembers that a name was not there.
        with contextlib.suppress(FileNotFoundError):
            return name in os.listdir(self.folder)
        return False

    def put(self, name: str, text: str = "") -> None:
        self.files.write(name, (text or name).encode())


class Over(Exception):
    """There is nothing to go on with; why, and who is to blame for it, if somebody."""

    def __init__(self, why: str, nodes: list[str] | None = None) -> None:
        super().__init__(why)
        self.nodes = nodes or []


class Member(Part):
    """A node that joins: it ends when the head says so, or is silent."""

    def run(self) -> int:
        self.head = Watch(self.folder / "beat-0")
        code = 0
        try:
            with room(self.node):
                self._serve()
        except NodeFailed as error:
            code = FAILED
            self.put(f"failed-{self.node.rank}", f"{self.node.name} {error}")
            log.info("%s", error)
            # The head is to end first: the end of any task ends all others at once.
            with contextlib.suppress(Over):
                while not self.has("over"):
                    self._look()
        except Over as error:
            log.info("%s", error)
            code = REQUEUE
        self.put(f"left-{self.node.rank}")
        return code

    def _serve(self) -> None:
        deadline = time.monotonic() + longest_silence_s() + JOIN_S
        # While the head waits for its turn it lives, and so do we.
        while not self.has("address"):
            if self.has("over") or _ended(self.task) is not None:
                return
            self._look()
            if not (self.folder / "beat-0").exists() and time.monotonic() > deadline:
                raise Over(f"no head for {JOIN_S:.0f} s")
        self.ray.join(self.files.read("address").decode(), self._look)
        self.put(f"joined-{self.node.rank}", self.node.name)
        while not self.has("over"):
            self._look()
            if not self.ray.alive():
                raise NodeFailed(f"Ray ended on {self.node.name}; see {self.ray.log}")

    def _look(self) -> None:
        """Say that we live, and see that the head does."""
        self.beat.tick()
        limit = longest_silence_s() if self.head.path.exists() else JOIN_S
        if self.head.silent_s() > limit:
            raise Over(f"the head has been silent for {limit:.0f} s")
        time.sleep(LOOK_S)


class Head(Part):
    """The node that runs the command."""

    turn: Turn | None = None

    def run(self) -> int:
        self.others = {
            rank: Watch(self.folder / f"beat-{rank}") for rank in range(1, self.node.size)
        }
        try:
            with self._turn():
                return self._run()
        finally:
            self.put("over")
            self._await_leaving()
            self.token.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The right to run the command; waits until another attempt that has it is gone."""
        self.turn = take(self.task, self.node.attempt, self._may_wait)
        try:
            yield
        finally:
            if self.turn is not None:
                self.turn.give_back()

    def _may_wait(self) -> bool:
        self.beat.tick()
        return not self.asked

    def _run(self) -> int:
        """Carry the command out; the code for the scheduler."""
        if self.turn is None:
            code = _ended(self.task)
            return REQUEUE if code is None else code
        # Of attempts that were killed: with the turn ours, nobody lives who needs theirs.
        for attempt in self.task.attempts():
            (attempt / "token").unlink(missing_ok=True)
        try:
            code, fault = self._on_cluster(), None
        except Replaced as error:
            log.info("%s", error)
            return FAILED  # below 128: nobody is to start us again
        except (NodeFailed, Over) as error:
            nodes = error.nodes if isinstance(error, Over) else [self.node.name]
            code, fault = REQUEUE, (str(error), nodes)
        return self._settled(code, fault)

    def _settled(self, code: int, fault: tuple[str, list[str]] | None) -> int:
        """Note what came of it, if it is final."""
        if fault is not None and not self.asked:
            why, nodes = fault
            count = self.task.fault(self.node.attempt, why, self._dispensable(nodes))
            log.info("fault %d: %s", count, fault[0])
            if count > FAULTS:
                return self.task.finish(FAILED, self.node.attempt, f"gave up: {fault[0]}")
            return REQUEUE
        if fault is not None or (code != 0 and self.asked):
            log.info("%s: not done; the command ended with %d", self.asked[0], code)
            return REQUEUE
        return self.task.finish(code, self.node.attempt)

    def _on_cluster(self) -> int:
        """Ray on all nodes, and the command on it; its exit code.

        Raises:
            NodeFailed, Over: not the command was at fault.
        """
        with room(self.node):
            handle = os.open(self.token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            address = self.ray.start_head(self._tick)
            self.put("address", address)
            self._await_members()
            log.info("Ray at %s on %d node(s)", address, self.node.size)
            return self._carried_out(address)

    def _await_members(self) -> None:
        end = time.monotonic() + JOIN_S
        while waited := [r for r in self.others if not self.has(f"joined-{r}")]:
            self._tick()
            self._require_nodes()
            if time.monotonic() > end:
                # Who never came is not known by name: nobody is left out.
                raise Over(f"nodes of rank {waited} did not join within {JOIN_S:.0f} s")
            time.sleep(LOOK_S)

    def _carried_out(self, address: str) -> int:
        begun = self.task.begun()
        environment = self.ray.environment | {"RAY_ADDRESS": address}
        command = resumed(self.plan.command, begun)
        log.info("python %s", command)
        running = Running(
            command, Path(self.plan.code), self.plan.cwd, self.folder / TaskFolder.LOG, environment
        )
        try:
            return self._watched(running)
        finally:
            if running.code is None:
                running.kill()

    def _watched(self, running: Running) -> int:
        """The command's exit code, unless something else ends the attempt before."""
        while running.code is None:
            self._tick(may_stop=False)
            if self.asked:
                return self._stopped(running)
            self._require_nodes()
            time.sleep(LOOK_S)
        if running.code < 0:
            raise Over(f"the command was killed by signal {-running.code}")
        # A run that fails because a node was lost is the first to notice it.
        if running.code not in (0, STOPPED):
            self._require_nodes_now()
        return running.code

    def _stopped(self, running: Running) -> int:
        """The exit code of the command after it has been asked to stop."""
        log.info("%s: the command is asked to stop", self.asked[0])
        running.stop()
        end = time.monotonic() + self.plan.grace_s
        while running.code is None and time.monotonic() < end:
            self._tick(may_stop=False)
            time.sleep(LOOK_S)
        if running.code is None:
            running.kill()
        code = running.code
        return REQUEUE if code is None or code < 0 else code

    def _tick(self, may_stop: bool = True) -> None:
        """Say that we live, and see that nobody has taken our place or asks to stop."""
        self.beat.tick()
        # Slurm sends a signal as well; where there is none, the mark is all.
        if not self.asked and self.task.files.exists(self.task.CANCELLED):
            self.asked.append("cancelled")
        if self.turn is not None and not self.turn.held():
            raise Replaced(f"another attempt than {self.node.attempt} has taken over")
        if may_stop and self.asked:
            raise Over(f"{self.asked[0]} before the command had begun")

    def _require_nodes(self) -> None:
        """Every node, unless the command can go on without."""
        if self.plan.shrink and self.has("address") and self._all_joined():
            return
        for rank, watch in self.others.items():
            if self.has(f"failed-{rank}"):
                name, _, why = self.files.read(f"failed-{rank}").decode().partition(" ")
                raise Over(why, [name])
            if watch.path.exists() and watch.silent_s() > longest_silence_s():
                # Not left out: one that is down is no node for the scheduler, until it is mended.
                raise Over(f"{self._name(rank)} has been silent for {longest_silence_s():.0f} s")

    def _require_nodes_now(self) -> None:
        """As `_require_nodes`, after having waited until each has shown that it lives."""
        end = time.monotonic() + longest_silence_s() + LOOK_S
        since = {rank: time.monotonic() for rank in self.others}
        while time.monotonic() < end:
            self._require_nodes()
            if all(w.silent_s() < time.monotonic() - since[r] for r, w in self.others.items()):
                return
            self._tick(may_stop=False)
            time.sleep(LOOK_S)
        self._require_nodes()

    def _all_joined(self) -> bool:
        return all(self.has(f"joined-{rank}") for rank in self.others)

    def _name(self, rank: int) -> str:
        try:
            return self.files.read(f"joined-{rank}").decode()
        except FileNotFoundError:
            return f"node {rank}"

    def _dispensable(self, nodes: list[str]) -> list[str]:
        """Those of the nodes without which the job can still start."""
        partition = os.environ.get("SLURM_JOB_PARTITION")
        if not nodes or partition is None:
            return []
        excluded = {*self.task.excluded(), *nodes}
        return nodes if usable_nodes(partition) - len(excluded) >= self.node.size else []

    def _await_leaving(self) -> None:
        """Until the others have tidied up: the scheduler ends them when we are gone."""
        end = time.monotonic() + LEAVE_S
        while time.monotonic() < end and not all(
            self.has(f"left-{rank}") or watch.silent_s() > longest_silence_s() / 2
            for rank, watch in self.others.items()
        ):
            self.beat.tick()
            time.sleep(LOOK_S)
