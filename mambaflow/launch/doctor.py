"""What a cluster lacks for jobs that outlive it, said before they find out."""

import json
import platform
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambaflow.launch import scheduler
from mambaflow.launch.scheduler import SchedulerError

SKEW_S = 5.0
WAIT = "--immediate=120"  # srun gives up where no nodes are free by then
# Run on each node by the Python that jobs will have.
PROBE = """
import json, os, platform, sys, time
print(json.dumps({
    "node": os.environ.get("SLURMD_NODENAME", platform.node()), "time": time.time(),
    "sees": os.path.exists(sys.argv[1]), "python": platform.python_version(),
    "libc": "-".join(platform.libc_ver()), "scontrol": any(
        os.access(os.path.join(p, "scontrol"), os.X_OK) for p in os.environ["PATH"].split(":")),
}))
"""


@dataclass(frozen=True)
class Finding:
    """Something that was looked at."""

    good: bool
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'BAD '} {self.what}" + (
            "" if self.good else f"; {self.cure}"
        )


def settings(config: Mapping[str, str]) -> Iterator[Finding]:
    """What the cluster's configuration means for a job."""
    requeue = config.get("JobRequeue", "") == "1"
    # Jobs are submitted with --requeue, which wins over JobRequeue=0.
    yield Finding(True, f"JobRequeue={config.get('JobRequeue', '?')}" + (
        "" if requeue else ": jobs ask for it themselves, by --requeue"))  # fmt: skip
    mode = config.get("PreemptMode", "OFF")
    yield Finding(
        "CANCEL" not in mode and "SUSPEND" not in mode,
        f"PreemptMode={mode}",
        "preempted jobs are not requeued: submit them again, with --resume",
    )
    if mode != "OFF":
        sent = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
        yield Finding(
            True,
            "a preempted job gets "
            + ("the signal that it asked for" if sent else "SIGTERM")
            + ", if its partition or QOS grants a GraceTime",
        )
    kind = config.get("AccountingStorageType", "")
    yield Finding(
        True, "accounting: " + ("none, the queue is asked" if "none" in kind else f"{kind}, sacct")
    )
    yield Finding(True, f"MaxArraySize={config.get('MaxArraySize', '?')}: larger arrays are split")
    yield Finding(
        True, f"KillWait={config.get('KillWait', '?')}: what a requeue without notice grants"
    )


def nodes(folder: Path, count: int, more: Sequence[str]) -> Iterator[Finding]:
    """What nodes say of themselves.

    Args:
        folder: for submissions, which the nodes must see.
        more: flags of srun that choose the nodes.

    Raises:
        SchedulerError: no nodes were had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".doctor-{secrets.token_hex(4)}"
    mark.touch()
    try:
        before = time.time()
        said = scheduler.ask(
            "srun", f"--nodes={count}", "--ntasks-per-node=1", "--time=2", WAIT, "--quiet", *more,
            sys.executable, "-c", PROBE, str(mark),
        )  # fmt: skip
        after = time.time()
    finally:
        mark.unlink(missing_ok=True)
    told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if len(told) != count:
        raise SchedulerError(f"{len(told)} of {count} nodes answered: {said.strip()[-300:]}")
    for one in sorted(told, key=lambda t: str(t["node"])):
        yield from _node(one, folder, before, after)


def _node(told: dict[str, Any], folder: Path, before: float, after: float) -> Iterator[Finding]:
    name, here = told["node"], "-".join(platform.libc_ver())
    yield Finding(
        told["sees"], f"{name} sees {folder}", "it must be on a file system that all nodes share: "
        "give another --folder",
    )  # fmt: skip
    same = told["python"] == platform.python_version()
    yield Finding(
        same, f"{name} has Python {told['python']}", f"this machine has "
        f"{platform.python_version()}: use an environment on a shared file system",
    )  # fmt: skip
    yield Finding(
        told["libc"] == here,
        f"{name} has {told['libc']}",
        f"this machine has {here}: kernels that are compiled here may not run there; build on a "
        "node",
    )
    skew = max(before - told["time"], told["time"] - after, 0.0)
    yield Finding(
        skew < SKEW_S, f"{name}'s clock is within {skew:.0f} s", "S3 refuses requests from a wrong "
        "clock: have NTP mended",
    )  # fmt: skip
    yield Finding(
        told["scontrol"], f"{name} has scontrol", "a job there cannot ask for another start: "
        "preempted jobs come back, timed-out ones do not",
    )  # fmt: skip
