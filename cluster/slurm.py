"""Run any job of the suite on a Slurm cluster, and come back to a finished run.

    python cluster/slurm.py submit --nodes 4 --gpus-per-node 8 --time 24:00:00 -- \\
        jobs/train.py --arch v2 --data s3://bucket/cifar10 --storage s3://bucket/runs
    python cluster/slurm.py submit … --dry-run -- …      the batch file, and no more
    python cluster/slurm.py submit --local -- …          on this machine, without Slurm
    python cluster/slurm.py status [JOB …]               where the submissions stand
    python cluster/slurm.py logs JOB [--follow]          what the command prints, over all attempts
    python cluster/slurm.py cancel JOB …                 for good: it is not requeued
    python cluster/slurm.py doctor [--nodes 2 …]         what this cluster lacks
    python cluster/slurm.py tensorboard JOB              how to see the curves of a running job

Exit codes: 0 done; 1 Slurm failed; 2 bad input, nothing changed. `status JOB --wait` returns the
command's own.
"""

import argparse
import getpass
import shlex
import socket
import sys
import time
from pathlib import Path

import tyro

from mambaflow.checks import lookup, require
from mambaflow.launch import doctor as doctors
from mambaflow.launch import scheduler
from mambaflow.launch.command import parsed, storage
from mambaflow.launch.scheduler import SchedulerError
from mambaflow.launch.standing import Standing, cancel, log, silence, standings
from mambaflow.launch.submission import (
    SubmitConfig,
    batch_file,
    check,
    planned,
    read_lines,
    submit,
)
from mambaflow.variables import check_variables

FAILED, BAD_INPUT = 1, 2
LOOK_S = 5.0
ROOT = Path(__file__).resolve().parents[1]


def submitted(argv: list[str]) -> int:
    """submit FLAGS -- COMMAND."""
    at = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(SubmitConfig, args=argv[:at], description=__doc__, prog="slurm.py submit")
    plan = planned(config, parsed(argv[at + 1 :], ROOT), read_lines(config.array), ROOT)
    if config.dry_run:
        print(batch_file(plan) if not config.local else "\n".join(map(str, plan.commands)))
        return 0
    if not config.local:
        check(plan)
    jobs = submit(plan)
    for job, command in zip(jobs, plan.commands, strict=True):
        print(f"{job}  {command}")
    where = "" if config.folder == "slurm" else f" --folder {config.folder}"
    print(f"in {plan.folder.path}; python cluster/slurm.py logs {jobs[0]} --follow{where}")
    return 0


def flags(
    action: str, argv: list[str], *, jobs: str | int = "*", wait: str = ""
) -> argparse.Namespace:
    """Jobs, the folder of their submissions, and a flag of the action's own."""
    parser = argparse.ArgumentParser(prog=f"slurm.py {action}")
    parser.add_argument("jobs", nargs=jobs, help="numbers of jobs, or names of submissions")
    parser.add_argument("--folder", default="slurm", help="that of submit")
    if wait:
        parser.add_argument(f"--{wait}", action="store_true")
    return parser.parse_args(argv)


def found(given: argparse.Namespace) -> list[Standing]:
    return standings(Path(given.folder).expanduser().resolve(), given.jobs)


def status(argv: list[str]) -> int:
    """status [JOB …] [--wait]."""
    given = flags("status", argv, wait="wait")
    while given.wait and not all(one.over for one in found(given)):
        time.sleep(LOOK_S)
    shown = found(given)
    for one in shown:
        print(f"{one.job:>12}  {one}; {len(one.task.attempts())} attempt(s); {one.command}")
    if not given.wait:
        return 0
    return max((FAILED if one.code is None else one.code for one in shown), default=0)


def logs(argv: list[str]) -> int:
    """logs JOB [--follow]."""
    given = flags("logs", argv, jobs="+", wait="follow")
    for one in found(given):

        def over(job: str = one.job) -> bool:
            again = standings(Path(given.folder).expanduser().resolve(), [job])
            return all(s.over for s in again if s.job == job)

        some = False
        for text in log(one.task, given.follow, over):
            sys.stdout.write(text)
            sys.stdout.flush()
            some = True
        if not some:
            print(silence(one, one.task.path.parents[1]), file=sys.stderr)
    return 0


def cancelled(argv: list[str]) -> int:
    """cancel JOB …"""
    shown = found(flags("cancel", argv, jobs="+"))
    cancel(shown)
    for one in shown:
        print(f"{one.job}  {'cancelled' if one.code is None else one}")
    return 0


def doctor(argv: list[str]) -> int:
    """doctor [--nodes N] [--folder FOLDER] [flags of srun]."""
    parser = argparse.ArgumentParser(prog="slurm.py doctor", description="other flags: srun's")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--folder", default="slurm")
    given, more = parser.parse_known_args(argv)
    require(given.nodes > 0, f"nodes (={given.nodes}) must be positive; use 1 or more")
    findings = [*doctors.settings(scheduler.configuration())]
    findings += doctors.nodes(Path(given.folder).expanduser().resolve(), given.nodes, more)
    for finding in findings:
        print(finding)
    return 0 if all(f.good for f in findings) else FAILED


def tensorboard(argv: list[str]) -> int:
    """tensorboard JOB."""
    (one, *_) = found(flags("tensorboard", argv, jobs=1))
    where = storage(parsed(one.command.split(), ROOT))
    here = socket.getfqdn()
    print(f"here:             tensorboard --logdir {shlex.quote(where)} --port 6006")
    print(f"on your machine:  ssh -N -L 6006:localhost:6006 {getpass.getuser()}@{here}")
    print("then open         http://localhost:6006")
    return 0


ACTIONS = {
    "submit": submitted,
    "status": status,
    "logs": logs,
    "cancel": cancelled,
    "doctor": doctor,
    "tensorboard": tensorboard,
}


def main(argv: list[str] | None = None) -> int:
    """Do what is asked for; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if given else BAD_INPUT
    try:
        check_variables()
        return lookup(ACTIONS, given[0], "action")(given[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except SchedulerError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
