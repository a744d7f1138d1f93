"""The copy of --working-dir that a submitted job runs in, where relative addresses are others than
the user meant."""

import logging
import re
from pathlib import Path

from mambaflow.checks import require
from mambaflow.data.sources import EMBEDDED
from mambaflow.variables import job_environment

log = logging.getLogger(__name__)


def is_copied(address: str) -> bool:
    """Whether an address is in Ray's copy of a job's --working-dir."""
    # Ray hands a submitted job its runtime environment, as JSON, in a variable that is called so.
    # With --working-dir its current folder is the copy.
    copied = "working_dir" in job_environment()
    # Relative, and so in that folder: neither from the root, nor of a home, nor with a scheme.
    return copied and not re.match(r"/|~|\w+://", address)


def warn_of_a_copy(storage: str) -> None:
    """Say so if a job would keep what it makes in the copy."""
    if is_copied(storage):
        log.warning(
            "storage (=%s) is in Ray's copy of --working-dir, which Ray removes in time; "
            "use an absolute path that the nodes share, or s3://…",
            storage,
        )


def check_copied(data: str) -> None:
    """Refuse data that did not travel with --working-dir.

    Raises:
        ValueError: they are looked for in the copy, and are not there.
    """
    if data in EMBEDDED or not is_copied(data):
        return
    require(
        Path(data).exists(),
        f"data (={data}) is not in Ray's copy of --working-dir, which leaves out what git ignores; "
        "use an absolute path that the nodes share, or s3://…",
    )
