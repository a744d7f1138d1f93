"""What Slurm says, read tolerantly: of versions 22 to 25, with accounting and without.

A state that is not known here is passed on as it came. Every call has a deadline.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CALL_S = 60
# After these a job does not go on; a job that is requeued is in squeue again, as PENDING.
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip


class SchedulerError(RuntimeError):
    """Slurm does not answer, or refuses; the message has its words."""


@dataclass(frozen=True)
class JobState:
    """A job as the scheduler sees it."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER


def ask(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        SchedulerError: it is not there, fails, or does not end.
    """
    if shutil.which(command[0]) is None:
        raise SchedulerError(
            f"{command[0]} not found: there is no Slurm on this machine; run this on a login node, "
            "or use --local"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_S)
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]} did not answer in {CALL_S} s") from error
    if done.returncode:
        raise SchedulerError((done.stderr or done.stdout).strip() or f"{command[0]} failed")
    return done.stdout


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of jobs, as far as anybody remembers them: squeue first, which alone tells that a
    lost job waits again; then sacct, where there is accounting; then the controller's memory."""
    found: dict[str, JobState] = {}
    numbers = sorted({job.partition("_")[0] for job in jobs})
    if not numbers:
        return found
    queue = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N"]
    found |= {s.job: s for s in parse_squeue(_tolerant(*queue, "-j", ",".join(numbers)))}
    lost = [job for job in jobs if job not in found]
    if lost:
        accounts = ["sacct", "-X", "-n", "-P", "-D", "-o", "JobID,State,NodeList"]
        found |= parse_sacct(_tolerant(*accounts, "-j", ",".join(numbers)), lost)
    for job in [job for job in jobs if job not in found]:
        fields = parse_scontrol(_tolerant("scontrol", "show", "job", "-o", job))
        if "JobState" in fields:
            found[job] = JobState(
                job, fields["JobState"], fields.get("Reason", ""), fields.get("NodeList", "")
            )
    return found


def _tolerant(*command: str) -> str:
    """As `ask`; "" where there is no answer: squeue and sacct refuse a job that they forgot."""
    try:
        return ask(*command)
    except SchedulerError:
        return ""


def parse_squeue(text: str) -> Iterable[JobState]:
    """Lines of `%i|%T|%r|%N`; a line that is none of these is passed over."""
    for line in text.splitlines():
        parts = [p.strip() for p in line.split("|")]
        if len(parts) >= 2 and re.match(r"\d", parts[0]):
            job, state, reason, nodes = (parts + ["", ""])[:4]
            yield JobState(job, _word(state), "" if reason == "None" else reason, nodes)


def parse_sacct(text: str, jobs: Sequence[str]) -> dict[str, JobState]:
    """Lines of JobID|State|NodeList; of a job that was requeued, the last."""
    found = {}
    for line in text.splitlines():
        parts = [p.strip() for p in line.split("|")]
        if len(parts) >= 2 and parts[0] in jobs:
            nodes = parts[2] if len(parts) > 2 else ""
            found[parts[0]] = JobState(parts[0], _word(parts[1]), "", nodes)
    return found


def _word(state: str) -> str:
    """CANCELLED of "CANCELLED by 1000" and "CANCELLED+"."""
    return (state.split() or [""])[0].rstrip("+").upper()


def parse_scontrol(text: str) -> dict[str, str]:
    """The fields of `scontrol show … -o`, or of its lines `Name = value`."""
    fields = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\w+)\s+=\s*(.*?)\s*$", line):
            fields[match.group(1)] = match.group(2)
            continue
        # A value may hold spaces, and ends where the next name begins.
        for name, value in re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", line):
            fields.setdefault(name, value.strip())
    return fields


def configuration() -> dict[str, str]:
    """The cluster's settings by name."""
    return parse_scontrol(ask("scontrol", "show", "config"))


def partitions() -> list[str]:
    """Their names."""
    names = ask("sinfo", "-h", "-o", "%R").split()
    return sorted(set(names))


def usable_nodes(partition: str) -> int:
    """How many nodes of a partition are not down; 0 where nobody tells."""
    up = "idle,allocated,mixed,completing"
    lines = _tolerant("sinfo", "-h", "-p", partition, "-t", up, "-o", "%D").split()
    return sum(int(n) for n in lines if n.isdigit())


def largest_array() -> int:
    """The most commands that an array may hold."""
    text = configuration().get("MaxArraySize", "")
    return int(text) if text.isdigit() and int(text) > 1 else 1001


def cancel(jobs: Sequence[str]) -> None:
    """End jobs; one that is over already is no error."""
    ask("scancel", *jobs)
