"""A Ray cluster to work on, the one at RAY_ADDRESS or a private one, and the room on it.

Ray's own defaults are replaced where they are known to hurt: authentication is stated, never
guessed (see `environment`); every wait and every retry is bounded.
"""

import contextlib
import logging
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Event, Thread
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from mambaflow import host
from mambaflow.checks import require
from mambaflow.config import ScaleConfig
from mambaflow.distributed.environment import LOCAL, cluster_address, is_set, worker_environment
from mambaflow.distributed.progress import last_line
from mambaflow.distributed.reaper import named, reaper
from mambaflow.signals import kept
from mambaflow.training.run import RunFailed
from mambaflow.variables import seconds

REACH_S = 10  # until an address where nobody answers is given up
PATIENCE_S, SOON_S = 300.0, 5.0  # until a run without room is given up; until it says that it waits
GROWTH_S = 60.0  # Ray's own default
# Between two looks for the head; without an answer for so long it is lost. After 60 s Ray ends the
# driver itself, without a word that a user could go on by.
HEAD_LOOK_S, HEAD_LOST_S = 5.0, 30.0
WATCH_S = 0.5  # between two looks for the end of a call
log = logging.getLogger(__name__)
T = TypeVar("T")


@contextlib.contextmanager
def connect(lost: Callable[[str], None] | None = None) -> Iterator[None]:
    """The cluster at RAY_ADDRESS, or else a private one on this machine that ends with us, however
    we end, as large as the machine.

    Args:
        lost: called from another thread with the cause if the head is lost, to say it and to end
            the process: calls of Ray wait for it, and after a minute Ray ends us without a word.

    Raises:
        RuntimeError: `set_ray_environment` was not called before Ray was imported.
        ValueError, OSError: RAY_ADDRESS is of another kind, does not answer, or refuses us.
    """
    # Whoever connected first ends it too: a caller inside its `with` takes what is there.
    if ray.is_initialized():
        yield
        return
    if not is_set():
        raise RuntimeError(
            "RAY_AUTH_MODE (unset) must be stated before Ray starts; call "
            "distributed.environment.set_ray_environment() before `import ray`"
        )
    address = cluster_address()
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"address": address}
        naming: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if address == LOCAL:
            # A short path: a Unix socket's name holds 107 bytes, and Ray's lie deep below.
            folder = tempfile.TemporaryDirectory("", "mf-", "/tmp", ignore_cleanup_errors=True)
            temp = stack.enter_context(folder)
            # The cores are ours to state: Ray knows nothing of MAMBAFLOW_CORES.
            settings |= {"num_cpus": host.cores(), "include_dashboard": False, "_temp_dir": temp}
            stack.enter_context(reaper(temp))  # a driver that is killed ends nothing itself
            naming = named(temp)
        with naming, kept():
            _join(settings, {"env_vars": worker_environment(address)})
        if lost is not None:
            stack.enter_context(_watching(lost))  # also while we part from it
        stack.callback(_part)  # undone in reverse: Ray ends before its folder is removed
        yield


@contextlib.contextmanager
def _watching(lost: Callable[[str], None]) -> Iterator[None]:
    head, over = head_watch(), Event()

    def watch() -> None:
        try:
            while not over.wait(WATCH_S):
                head.look()
        except ConnectionError as error:
            lost(_lost(str(error)))

    # A daemon: it must not hold up a process whose main thread ends without leaving.
    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _part() -> None:
    """Leave the cluster; one that is lost as it is: Ray would part from it for long, and crash
    where calls still wait for it (see `host.leave`)."""
    try:
        head_watch().require()
    except ConnectionError as error:
        log.debug("left without a word: %s", error)
        return
    ray.shutdown()


@contextlib.contextmanager
def loss_named() -> Iterator[None]:
    """What a driver does in here with the cluster, whose failures are told by what they are: that
    of the cluster, which is lost with its head, or one of Ray's on a cluster that lives.

    Raises:
        RunFailed: the cluster no longer answers, or Ray failed.
    """
    try:
        yield
    except ConnectionError as error:
        raise RunFailed(_lost(last_line(error))) from error
    except ray.exceptions.RayError as error:
        told = f"Ray failed, and its head answers: {type(error).__name__}: {last_line(error)}"
        raise RunFailed(told if _answers() else _lost(last_line(error))) from error


def _answers() -> bool:
    """Whether we are connected to a cluster whose head does."""
    if not ray.is_initialized():
        return False
    try:
        head_watch().require()
    except (ConnectionError, ray.exceptions.RayError):
        return False
    return True


def _lost(why: str) -> str:
    address = cluster_address()
    if address == LOCAL:
        return f"this machine's private Ray is lost: {why}"
    return (
        f"the Ray cluster at RAY_ADDRESS (={address}) is lost: {why}; see that its head runs, or "
        "start one with `ray start --head`"
    )


class HeadWatch:
    """Whether the head of a cluster still answers.

    Args:
        address: where it does, HOST:PORT.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.answered = self.looked = time.monotonic()

    def look(self) -> None:
        """Look now and then.

        Raises:
            ConnectionError: there was no answer for HEAD_LOST_S.
        """
        if time.monotonic() - self.looked < HEAD_LOOK_S:
            return
        self.looked = time.monotonic()
        try:
            self.require()
        except ConnectionError:
            if time.monotonic() - self.answered > HEAD_LOST_S:
                raise

    def require(self) -> None:
        """Look now.

        Raises:
            ConnectionError: there is no answer.
        """
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), HEAD_LOOK_S).close()
        except OSError as error:
            raise ConnectionError(f"its head ({self.address}) does not answer: {error}") from error
        self.answered = time.monotonic()


def head_watch() -> HeadWatch:
    """Of the connected cluster."""
    return HeadWatch(ray.get_runtime_context().gcs_address)


def answered(call: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
    """What a call of the connected cluster returns or raises. It is made in a thread, while this
    one, which is where signals arrive, looks for the head: of one that is lost Ray's calls wait
    without end.

    Args:
        meanwhile: called about twice a second, and once more at the end.

    Raises:
        ConnectionError: the head is lost.
    """
    ending: Future[T] = Future()

    def run() -> None:
        try:
            ending.set_result(call())
        except BaseException as error:
            ending.set_exception(error)

    head = head_watch()
    # A daemon: as the process ends nobody waits for what may never return.
    Thread(target=run, daemon=True).start()
    while not wait([ending], timeout=WATCH_S).done:
        head.look()
        meanwhile()
    meanwhile()
    return ending.result()


def _join(settings: dict[str, Any], runtime_env: dict[str, Any]) -> None:
    """ray.init; an address where nobody answers is found in seconds, where Ray takes minutes."""
    address = settings["address"]
    name, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # "local" and "auto" have none, and are Ray's to find
            # An address of IPv6 is in brackets, which are no part of it.
            socket.create_connection((name.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS (={address}): {error}; start one with "
            "`ray start --head`, or unset it for a private Ray on this machine"
        ) from error
    try:
        # log_to_driver=False: what workers log comes by the progress actor.
        ray.init(
            logging_level=logging.WARNING, log_to_driver=False, runtime_env=runtime_env, **settings
        )
    # The port has answered: now it is the token that does not fit.
    except (ray.exceptions.AuthenticationError, ConnectionError) as error:
        raise ConnectionError(
            f"Ray at RAY_ADDRESS (={address}) does not let us in: {error}; start it with `ray "
            "start --head`, and set RAY_AUTH_MODE, and RAY_AUTH_TOKEN_PATH for token, as there"
        ) from error


def check_room(scale: ScaleConfig) -> None:
    """Refuse more workers than a private cluster can ever hold; a shared one may still grow.

    Raises:
        ValueError: num_workers, or min_workers, exceeds this machine's cores or GPUs;
            MAMBAFLOW_GROWTH_S is no number of seconds.
    """
    growth_s()  # read early, so that a bad value is refused before workers start
    if cluster_address() == LOCAL:
        require(not missing(scale), missing(scale))


def growth_s() -> float:
    """Seconds between two looks for nodes to grow on. A run that grows repeats the steps since
    its last checkpoint, so that it does not follow every node that joins.

    Raises:
        ValueError: MAMBAFLOW_GROWTH_S is no number of seconds.
    """
    return seconds("MAMBAFLOW_GROWTH_S", GROWTH_S)


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """What one worker asks of Ray: a GPU, or a core. A GPU's worker asks for no core, as Ray Train
    has it by default: a node whose cores others hold would leave its GPUs idle."""
    return {"GPU": 1.0} if scale.use_gpu else {"CPU": 1.0}


def missing(scale: ScaleConfig) -> str:
    """What the connected cluster lacks for the fewest workers of the run; "" for nothing."""
    # All that the cluster has, free or not: what others hold now may be free soon.
    workers, have = scale.world_sizes[0], ray.cluster_resources()
    name = "min_workers" if scale.min_workers else "num_workers"
    for kind in worker_resources(scale):
        count = int(have.get(kind, 0))
        if count < workers:
            return (
                f"{name} (={workers}) needs {workers} {kind}s, and the cluster has {count}; "
                f"use {name}={count} or fewer, or add nodes"
            )
    return ""


def await_room(scale: ScaleConfig, patience_s: float = PATIENCE_S) -> None:
    """Wait until the cluster has room for the fewest workers of the run.

    The request is one that an autoscaler sees and answers with nodes.

    Raises:
        RunFailed: there was no room for `patience_s` seconds.
    """
    bundle = worker_resources(scale)
    # A probe, removed below: Ray Train asks anew, and would find its workers' place taken.
    group = placement_group([bundle] * scale.world_sizes[0])
    try:
        if group.wait(SOON_S):
            return
        why = missing(scale) or "other work holds the CPUs or GPUs of the cluster"
        log.warning("waiting up to %.0f s for room: %s", patience_s, why)
        if not group.wait(patience_s):
            raise RunFailed(f"no room on the cluster for {patience_s:.0f} s: {why}")
    finally:
        remove_placement_group(group)
