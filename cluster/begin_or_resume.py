"""Start a job, with --resume where its run has begun: for a scheduler that can only give the same
command again, as Kubernetes does.

    python cluster/begin_or_resume.py jobs/train.py --arch v2 --storage s3://bucket/runs \\
        --run-name NAME …                                also: tune/sweep.py, jobs/evaluate.py

It becomes the job: signals reach that, and its exit code is this one's. A run of that name that
others began is gone on with as well, if its flags and its data are the same; else the job refuses
it. Exit codes: the job's; 2 bad input.
"""

import os
import sys
from pathlib import Path

from mambaflow.checks import require
from mambaflow.launch.command import Command, parsed, resumed
from mambaflow.variables import check_variables

BAD_INPUT = 2
ROOT = Path(__file__).resolve().parents[1]


def to_start(argv: list[str]) -> Command:
    """The command to start now.

    Raises:
        ValueError: there is no such script, or its run has no name to be found by.
    """
    command = parsed(argv, ROOT)
    require(
        not command.begun_with or bool(command.value("run-name")),
        "run_name (unset) must be given: the same command, started again, goes on with the run of "
        "that name; add --run-name NAME",
    )
    return resumed(command, begun=True)


def main(argv: list[str] | None = None) -> int:
    """Check, then become the job; returns an exit code only for bad input."""
    try:
        check_variables()
        command = to_start(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"starting {command}", flush=True)  # exec drops what is not written yet
    script = str(ROOT / command.script)
    os.execv(sys.executable, [sys.executable, "-u", script, *command.arguments])


if __name__ == "__main__":
    sys.exit(main())
