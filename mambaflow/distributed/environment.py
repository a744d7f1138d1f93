"""What Ray needs in the environment, stated by a call, before Ray is imported.

Ray reads how it authenticates as it is imported, and takes a default that depends on what lies in
the home folder where nothing is stated. So whoever is to use Ray calls `set_ray_environment` first,
and imports the rest of this wing afterwards; `cluster.connect` refuses where that was forgotten.
"""

import secrets
import sys
from pathlib import Path

from mambaflow.checks import require
from mambaflow.host import KEEP_MEMORY
from mambaflow.variables import (
    LOCAL,
    TORCHRUN,
    drop_empty,
    family,
    forget,
    job_environment,
    state,
    stated,
)

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

# What a worker needs of the driver's environment, whichever node it starts on.
FORWARDED = ("AWS_", "MAMBAFLOW_", "RAY_TRAIN_", "RAY_ADDRESS")

# How Ray Train and its workers behave unless the environment says otherwise.
SETTINGS = {
    **KEEP_MEMORY,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints each line twice otherwise
}
# And on a Ray of our own: nobody drains its one node, and the actor that would watch for it takes
# of the cores that train.
PRIVATE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def cluster_address() -> str:
    """Where RAY_ADDRESS points: host:port or auto; "local", a private cluster, without it.

    Raises:
        ValueError: it is no address, or that of jobs, or of a Ray client.
    """
    address = stated("RAY_ADDRESS") or LOCAL
    require(
        "://" not in address,
        f"RAY_ADDRESS (={address!r}) is where jobs are submitted; use `ray job submit -- python "
        "…`, or set RAY_ADDRESS to the head's host:port (6379 by default), or unset it for a "
        "private Ray on this machine",
    )
    return address


def set_ray_environment() -> None:
    """State Ray's authentication, and leave torchrun's variables out, which Ray's processes would
    take over from this one, and which mean nothing there; a second call changes nothing.

    Without a cluster to join we shall start our own: it asks for a token that only this process
    and its children know, so that nobody else on the machine can run code in it, and no token is
    written to the home folder. A cluster that exists has its own mode, which its users state in
    RAY_AUTH_MODE; a job of the cluster inherits it.

    Raises:
        RuntimeError: Ray is imported already, and has settled on a mode that nobody stated.
        ValueError: RAY_ADDRESS, or what states the authentication, breaks its rule.
    """
    forget(TORCHRUN)
    # Read as Ray is imported. A thread whose call outlives its cluster (see `cluster.answered`)
    # would otherwise start a Ray of its own, unasked, as the process ends.
    state("RAY_ENABLE_AUTO_CONNECT", "0")
    drop_empty(AUTH)  # Ray reads an empty mode as one
    mode = stated("RAY_AUTH_MODE").lower()
    if cluster_address() != LOCAL or stated("RAY_AUTH_TOKEN"):
        _require_token_file(mode)
        return
    # Ray keeps the mode that it read as it was imported: stated now, it would reach children alone.
    if not mode and "ray" in sys.modules:
        raise RuntimeError(
            "ray was imported before its authentication was stated; call set_ray_environment() "
            "before `import ray`, or start the process with RAY_AUTH_MODE=token or disabled"
        )
    # Without a token in the environment Ray would make one, in ~/.ray, and leave it there.
    if (mode or state("RAY_AUTH_MODE", "token")) == "token":
        state("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _require_token_file(mode: str) -> None:
    # A token in the environment goes first; without a mode Ray may still look for the file.
    path = "" if stated("RAY_AUTH_TOKEN") or mode == "disabled" else stated("RAY_AUTH_TOKEN_PATH")
    require(
        not path or Path(path).expanduser().is_file(),
        f"RAY_AUTH_TOKEN_PATH (={path!r}) must be a file that is there, with the cluster's token; "
        "name that file, or set RAY_AUTH_MODE=disabled if the cluster asks for none",
    )


def is_set() -> bool:
    """Whether Ray's authentication is stated, or left to the cluster that is joined."""
    return cluster_address() != LOCAL or stated("RAY_AUTH_MODE") != ""


def worker_environment(address: str) -> dict[str, str]:
    """What workers get of the driver's environment, less what they have of their job: Ray refuses
    a variable that is given twice."""
    # Where Ray tells a job's driver what `ray job submit` was given.
    known = job_environment().get("env_vars") or {}
    given = family(*FORWARDED, *SETTINGS)
    # Neither names a cluster that another node would find.
    if address in (LOCAL, "auto"):
        given.pop("RAY_ADDRESS", None)
    ours = SETTINGS | (PRIVATE if address == LOCAL else {})
    # What a user states wins over ours.
    return {k: v for k, v in (ours | given).items() if k not in known}
