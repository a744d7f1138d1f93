"""Jobs on the lab: submitted, watched from outside, disturbed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lab import Lab, run
from processes import processes, wait_for

from mambaflow.launch import scheduler, submission
from mambaflow.launch.command import parsed
from mambaflow.launch.submission import SubmitConfig

ROOT = Path(__file__).parents[2]
STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in_ray.py")))
PATIENCE_S = 240

# A command that counts to a number in a file, saves at SIGTERM and ends with 143, as jobs do. At
# half it waits while another file is there.
COUNTING = """
import os, signal, sys, time
from pathlib import Path
count, held, last, code = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:])
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
step = int(count.read_text()) if count.exists() else 0
print("begins after", step, "on", os.environ["RAY_ADDRESS"], flush=True)
while step < last and not asked:
    time.sleep(0.1)
    if step == last // 2 and held.exists():
        continue
    step += 1
    if step % 10 == 0:
        count.with_suffix(".new").write_text(str(step))
        count.with_suffix(".new").rename(count)
count.write_text(str(step))
print("ends after", step, flush=True)
sys.exit(143 if step < last else code)
"""


@dataclass
class Job:
    """A command that was submitted."""

    number: str
    plan: submission.Planned
    index: int = 0

    @property
    def task(self):
        return self.plan.folder.task(self.index)

    @property
    def state(self) -> str:
        found = scheduler.states([self.number])
        return found[self.number].state if self.number in found else "UNKNOWN"

    @property
    def restarts(self) -> int:
        shown = run("scontrol", "show", "job", "-o", self.number)
        return int(scheduler.parse_scontrol(shown)["Restarts"])

    def attempts(self) -> list[Path]:
        return self.task.attempts()

    def said(self) -> str:
        """What the command printed, in all attempts."""
        logs = [p / self.task.LOG for p in self.attempts()]
        return "\n".join(log.read_text() for log in logs if log.exists())

    def await_(self, what: Callable[[], object], seconds: float = PATIENCE_S):
        try:
            return wait_for(what, seconds)
        except TimeoutError as error:
            raise AssertionError(self.account()) from error

    def running(self, attempts: int = 1) -> Path:
        """Once the command of so many attempts has begun; the newest attempt's folder."""

        def begun() -> Path | None:
            logs = [p for p in self.attempts() if "begins" in _text(p / self.task.LOG)]
            return logs[-1] if len(logs) >= attempts else None

        return self.await_(begun)

    def told(self) -> str:
        """What the first node's task printed, in all attempts."""
        return "".join(_text(p) for p in self.plan.folder.path.glob("submitit/*_0_log.out"))

    def finish(self, seconds: float = PATIENCE_S) -> int:
        """The command's exit code, once the scheduler too sees the job's end."""
        self.await_(lambda: self.task.exit_code() is not None, seconds)
        self.await_(lambda: scheduler.JobState(self.number, self.state).over)
        return self.task.exit_code()

    def account(self) -> str:
        """All that is known, for a failure's message."""
        files = [
            p for p in self.plan.folder.path.rglob("*") if p.suffix in (".log", ".out", ".err")
        ]
        texts = [f"--- {p}\n{_text(p)[-1500:]}" for p in sorted(files)]
        return "\n".join([f"{self.number} is {self.state}", *texts])


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@dataclass
class Cluster:
    """The lab, as one test uses it."""

    lab: Lab
    folder: Path
    mark: str
    jobs: list[Job] = field(default_factory=list)

    def submit(self, command: list[str], *, ray=STAND_IN, lines=(), **config: object) -> Job:
        asked = {"nodes": 2, "time": "30", "folder": str(self.folder / "slurm"), **config}
        settings = SubmitConfig(**asked)
        plan = submission.planned(settings, parsed(command, ROOT), lines, ROOT)
        if ray:
            plan = submission.with_ray(plan, ray)
        submission.check(plan)
        made = [Job(n, plan, i) for i, n in enumerate(submission.submit(plan))]
        self.jobs += made
        return made[0]

    def counting(self) -> list[str]:
        """A command that counts, ten steps a second, to a number that follows, and ends with a
        code that follows it."""
        script = self.folder / "counting.py"
        script.write_text(COUNTING)
        return [str(script), str(self.counter), str(self._held)]

    def count(self, last: int = 50, code: int = 0, **config: object) -> Job:
        """A job that counts."""
        return self.submit([*self.counting(), str(last), str(code)], **config)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing counts beyond its half: however slow the scheduler, it comes in time."""
        self._held.touch()
        try:
            yield
        finally:
            self._held.unlink()

    @property
    def _held(self) -> Path:
        return self.folder / "held"

    @property
    def counter(self) -> Path:
        return self.folder / "count"

    def processes(self, *parts: str) -> list[int]:
        """The pids of what a test's jobs run whose command line has all these parts."""
        return [pid for pid, title in processes(self.mark) if all(p in title for p in parts)]

    def tasks(self) -> list[int]:
        """submitit's tasks, one on each node, that of the first first."""

        def rank(pid: int) -> int:
            found = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            return next(int(v[13:]) for v in found if v.startswith(b"SLURM_PROCID="))

        # srun has the same words in its command line.
        found = {*self.processes("submitit.core._submit")} - {*self.processes("srun\0")}
        return sorted(found, key=rank)

    def nothing_left(self, ports: dict[str, set[int]]) -> None:
        """No process, no folder, no port, no token."""
        wait_for(lambda: not self._left(), 60)
        for name, before in ports.items():
            wait_for(lambda name=name, before=before: not self.lab.listening(name) - before, 30)
            assert not self.lab.own(name), "a folder of Ray is left"
        assert not list(self.folder.rglob("token")), "a token is left"

    def _left(self) -> list[tuple[int, str]]:
        # What Slurm itself started in the test's environment is not ours to end.
        return [(p, t) for p, t in processes(self.mark) if "slurm" not in t.split("\0")[0]]


def batch_files(job: Job) -> str:
    return "".join(p.read_text() for p in job.plan.folder.path.rglob("*_submission.sh"))


def finished(command: list[str], code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def record(job: Job) -> dict:
    return json.loads((job.plan.folder.path / "submission.json").read_text())
