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

import sys
from pathlib import Path

import tyro

from mambaflow.checks import lookup
from mambaflow.launch.command import parsed
from mambaflow.launch.scheduler import SchedulerError
from mambaflow.launch.submission import (
    SubmitConfig,
    batch_file,
    check,
    planned,
    read_lines,
    submit,
)

FAILED, BAD_INPUT = 1, 2
ROOT = Path(__file__).resolve().parents[1]


def submitted(argv: list[str]) -> int:
    """submit FLAGS -- COMMAND."""
    at = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(SubmitConfig, args=argv[:at], description=__doc__, prog="slurm.py submit")
    plan = planned(config, parsed(argv[at + 1 :], ROOT), read_lines(config.array), ROOT)
    if config.dry_run and not config.local:
        print(batch_file(plan))
        return 0
    if not config.local:
        check(plan)
    jobs = submit(plan)
    for job, command in zip(jobs, plan.commands, strict=True):
        print(f"{job}  {command}")
    print(f"in {plan.folder.path}; see it by: python cluster/slurm.py logs {jobs[0]} --follow")
    return 0


ACTIONS = {"submit": submitted}


def main(argv: list[str] | None = None) -> int:
    """Do what is asked for; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if given else BAD_INPUT
    try:
        return lookup(ACTIONS, given[0], "action")(given[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except SchedulerError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
