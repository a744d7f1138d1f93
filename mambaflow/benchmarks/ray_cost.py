"""What training on Ray costs: jobs/train.py with one worker against the same without Ray.

The two train at the same time and are stopped and let go in turns of a few seconds, Ray's own
processes with their worker, so that both see the same machine: its speed may drift by more than
the difference that is sought.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mambaflow.benchmarks.bench import BenchmarkConfig
from mambaflow.report.tables import Table

# Seconds of a turn; of what goes before it uncounted, once a job is let go; and, at most, of a
# start and an end.
TURN_S, SETTLE_S, START_S, END_S = 4.0, 0.5, 180.0, 60.0
WARM_POINTS = 10
# Neither job ends, nor validates or saves, while it is measured.
FOREVER = str(10**6)
RECIPE = ["--recipe=first-run"]
CLUSTER = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


class Job:
    """A training run in processes of its own, which can be stopped and let go."""

    def __init__(self, name: str, storage: str, config: BenchmarkConfig, threads: int) -> None:
        command = [
            # As a user starts it, and a point of the curve for every step: that is what is counted.
            sys.executable, "-m", "jobs.train", *RECIPE, "--arch", config.arch,
            "--data", config.data, "--storage", storage, "--run-name", name,
            "--batch-size", str(config.batch_size), "--epochs", FOREVER, "--log-every=1",
            "--eval-every", FOREVER, "--ray" if name == "ray" else "--no-ray",
        ]  # fmt: skip
        self.curve = Path(storage) / name / "metrics.jsonl"
        self.batch_size = config.batch_size
        # A file, since a pipe that nobody reads would fill up and stop the job.
        self.log = tempfile.TemporaryFile()
        # A Ray of its own: the processes of another would not stop for the rival's turn.
        ours = {k: v for k, v in os.environ.items() if k not in CLUSTER}
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log,
            env=ours | {"MAMBAFLOW_THREADS": str(threads)},
        )  # fmt: skip
        # By number and start: the system gives a number again once its process has ended.
        self._members: set[tuple[int, str]] = set()

    def begin(self) -> None:
        """Wait for the first steps.

        Raises:
            RuntimeError: training ended, or did not begin in time.
        """
        deadline = time.monotonic() + START_S
        while len(self.points()) < WARM_POINTS:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"training did not begin: {self.log.read().decode()[-2000:]}")
            time.sleep(0.2)

    def points(self) -> list[tuple[float, int]]:
        """(time, step) of each step so far."""
        if not self.curve.exists():
            return []
        # The last line may be half written, now that the job was stopped anywhere.
        lines = self.curve.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [(p["time"], p["step"]) for p in found if "train/loss" in p]

    def send(self, number: int) -> None:
        """A signal to every process that the job has had, and none to one that has its number."""
        # Looked up each time: Ray starts processes on the way. Those whose parent has ended belong
        # to nobody's family any more, hence the members of before.
        if self.process.poll() is None:
            self._members |= family(self.process.pid)
        for pid, _ in self._members & set(processes().values()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def turn(self) -> float:
        """Samples a second while the job has the machine to itself for a turn."""
        self.send(signal.SIGCONT)
        # By the wall clock, as the points of the curve are. Let go before, stopped after: the rival
        # stands still all the while.
        time.sleep(SETTLE_S)
        start = time.time()
        time.sleep(TURN_S)
        end = time.time()
        self.send(signal.SIGSTOP)
        # From the first step that ended in the turn to the last one: the parts of steps at either
        # end count neither as time nor as samples.
        inside = [p for p in self.points() if start <= p[0] <= end]
        if len(inside) < 2:
            raise RuntimeError(f"{len(inside)} steps in {TURN_S} s; use a smaller --batch-size")
        (first, a), (last, b) = inside[0], inside[-1]
        return self.batch_size * (b - a) / (last - first)

    def end(self) -> None:
        """End the job, and with it a private Ray."""
        # A process that is stopped takes SIGTERM only once it is let go.
        self.send(signal.SIGCONT)
        self.process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=END_S)
        finally:
            # Whatever is left after END_S, Ray's processes among it.
            self.send(signal.SIGKILL)
            self.process.wait()
            self.log.close()


def processes() -> dict[tuple[int, int], tuple[int, str]]:
    """(parent, process) of every process to its number and the time that it started."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which is in brackets and may hold brackets and blanks: state, parent,
            # and as the 20th the time of the start, in ticks since the machine's own (proc(5)).
            fields, pid = stat.read_text().rpartition(")")[2].split(), int(stat.parent.name)
            found[int(fields[1]), pid] = pid, fields[19]
    return found


def family(pid: int) -> set[tuple[int, str]]:
    """A process and its descendants, by number and start."""
    everyone, found = processes(), {pid}
    # Generation after generation, until one has no children.
    while more := {child for parent, child in everyone if parent in found} - found:
        found |= more
    return {member for (_, one), member in everyone.items() if one in found}


@contextlib.contextmanager
def training(name: str, config: BenchmarkConfig, threads: int) -> Iterator[Job]:
    """A job that has taken its first steps and waits for its turn."""
    with tempfile.TemporaryDirectory(prefix="mambaflow-") as storage:
        job = Job(name, storage, config, threads)
        try:
            # Past its start and its first steps before the other one starts: they do not disturb
            # each other's.
            job.begin()
            job.send(signal.SIGSTOP)
            yield job
        finally:
            job.end()


def turns(config: BenchmarkConfig, threads: int) -> tuple[list[float], list[float]]:
    """Samples a second of each turn, with Ray and without."""
    found: tuple[list[float], list[float]] = ([], [])
    with training("ray", config, threads) as one, training("bare", config, threads) as other:
        # Neighbouring turns are compared with each other, seconds apart.
        for _ in range(config.repeats):
            found[0].append(one.turn())
            found[1].append(other.turn())
    return found


def measure(config: BenchmarkConfig) -> list[Table]:
    """With every core in training, and with one left to Ray."""
    # Without this SIGTERM would end this process at once, and leave the jobs stopped for good.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # lets all go first
    cores = config.threads or len(os.sched_getaffinity(0))
    rows = []
    for threads in dict.fromkeys((cores, max(cores - 1, 1))):
        with_ray, without = turns(config, threads)
        # Of the ratios, not the ratio of medians: drift is the same within a pair, and not over
        # all.
        ratio = statistics.median(a / b for a, b in zip(with_ray, without, strict=True))
        medians = (statistics.median(rates) for rates in (with_ray, without))
        rows.append([f"{threads}", *(f"{m:.1f}" for m in medians), f"{ratio:.3f}"])
    heading = ["threads", "samples/s on Ray", "without", "ratio"]
    caption = (
        f"{config.arch}, first-run size, {config.repeats} turns of {TURN_S:.0f} s each; medians, "
        "of the rates and of the ratios of neighbouring turns"
    )
    return [Table(heading, rows, caption)]
