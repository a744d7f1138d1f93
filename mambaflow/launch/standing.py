"""Where submissions stand: what their folders say, and what the scheduler says of the rest."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambaflow.checks import require
from mambaflow.launch import scheduler
from mambaflow.launch.scheduler import OVER, JobState
from mambaflow.launch.task_folder import SubmissionFolder, TaskFolder, submissions

LOOK_S, QUEUE_LOOK_S = 0.5, 10.0  # between two looks into a folder; at the queue
QUIET_S = 60.0  # after the end of a job, until what nodes wrote has surely arrived


@dataclass(frozen=True)
class Standing:
    """A command and how far it is."""

    job: str
    command: str
    task: TaskFolder
    local: bool
    code: int | None = None
    state: str = "UNKNOWN"
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether it has ended, or nobody will go on with it."""
        return self.code is not None or self.state in OVER | {"ENDED"}

    def __str__(self) -> str:
        if self.code is not None:
            why = self.task.why()
            return f"done, exit code {self.code}" + (f": {why}" if why else "")
        lost = "; submit it again, with --resume for a run" if self.state in OVER else ""
        return f"{self.state.lower()}{f' ({self.reason})' if self.reason else ''}{lost}"


def standings(folder: Path, jobs: Sequence[str] = ()) -> list[Standing]:
    """The commands of all submissions in a folder, or those of some jobs or submissions.

    Raises:
        ValueError: there is none like that.
    """
    require(
        folder.is_dir(), f"folder (={folder}) must hold submissions; give the --folder of submit"
    )
    found = [one for made in submissions(folder) for one in _of(made, jobs)]
    known = ", ".join(str(s.record()["jobs"][0]) for s in submissions(folder)[-5:])
    require(
        bool(found) or not jobs,
        f"job (={' '.join(jobs)}) must have been submitted to {folder}; the newest: {known}",
    )
    waiting = [s.job for s in found if s.code is None and not s.local]
    states = scheduler.states(waiting)
    return [_with_state(one, states) for one in found]


def _of(made: SubmissionFolder, jobs: Sequence[str]) -> Iterator[Standing]:
    record = made.record()
    for number, (job, command) in enumerate(zip(record["jobs"], record["commands"], strict=True)):
        if not jobs or {job, job.partition("_")[0], made.path.name} & set(jobs):
            task = made.task(number)
            yield Standing(job, command, task, record["local"], task.exit_code())


def _with_state(one: Standing, states: dict[str, JobState]) -> Standing:
    if one.code is not None:
        return one
    if one.local:
        state, reason = ("RUNNING" if _runs(int(one.job)) else "ENDED"), ""
    else:
        known = states.get(one.job, JobState(one.job, "UNKNOWN", "Slurm has forgotten it"))
        state, reason = known.state, known.reason
    return Standing(one.job, one.command, one.task, one.local, None, state, reason)


def _runs(pid: int) -> bool:
    """Whether a process is there, and is submitit's: numbers are given again."""
    try:
        os.kill(pid, 0)
        title = Path(f"/proc/{pid}/cmdline")
        return b"submitit" in title.read_bytes() if Path("/proc/self").exists() else True
    except OSError:
        return False


def cancel(found: Sequence[Standing]) -> None:
    """End commands for good: none of them is requeued.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    ended = [one for one in found if one.code is None]
    # First: an attempt that is asked to stop looks here before it asks for another start. A local
    # one is asked by this alone: its number may be another process's by now.
    for one in ended:
        one.task.files.write(TaskFolder.CANCELLED, b"cancelled\n")
    if jobs := [one.job for one in ended if not one.local]:
        scheduler.cancel(jobs)


def log(task: TaskFolder, follow: bool, look: Callable[[], bool]) -> Iterator[str]:
    """What a command prints, attempt after attempt.

    Args:
        look: whether the job is over, as the scheduler has it; asked now and then.
    """
    shown: dict[Path, int] = {}
    asked, over = 0.0, False
    while True:
        yield from _news(task, shown)
        over = over or task.exit_code() is not None
        if not follow or over:
            yield from _news(task, shown)
            return
        if time.monotonic() - asked > QUEUE_LOOK_S:
            asked, over = time.monotonic(), look()
        time.sleep(LOOK_S)


def _news(task: TaskFolder, shown: dict[Path, int]) -> Iterator[str]:
    """What was not shown yet."""
    for attempt in task.attempts():
        file = attempt / TaskFolder.LOG
        if not file.exists():
            continue
        if file not in shown:
            shown[file] = 0
            yield f"--- attempt {attempt.name}\n"
        with file.open("rb") as text:
            text.seek(shown[file])
            news = text.read()
        shown[file] += len(news)
        if news:
            yield news.decode(errors="replace")


def silence(one: Standing, made: Path) -> str:
    """Why there is no log yet, for a person."""
    errors = sorted((made / SubmissionFolder.SUBMITIT).glob(f"{one.job}_*_log.err"))
    texts = [p.read_text(errors="replace").strip()[-2000:] for p in errors]
    if any(texts):
        return "\n".join(t for t in texts if t)
    if one.state in OVER:
        return (
            f"job {one.job} ended ({one.state.lower()}) and left nothing in {made}; that folder "
            "must be shared by all nodes: give another --folder, and see `slurm.py doctor`"
        )
    return f"nothing yet: job {one.job} is {one}"
