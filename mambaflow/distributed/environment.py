"""What Ray needs in the environment, stated by a call, before Ray is imported.

Ray reads how it authenticates as it is imported, and takes a default that depends on what lies in
the home folder where nothing is stated. So whoever is to use Ray calls `set_ray_environment` first,
and imports the rest of this wing afterwards; `cluster.connect` refuses where that was forgotten.
"""

import json
import os
import secrets
import sys

from mambaflow.checks import require
from mambaflow.host import KEEP_MEMORY

LOCAL = "local"

# What a worker needs of the driver's environment, whichever node it starts on.
FORWARDED = ("AWS_", "MAMBAFLOW_", "RAY_TRAIN_", "RAY_ADDRESS")

# How Ray Train and its workers behave unless the environment says otherwise.
SETTINGS = {
    **KEEP_MEMORY,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints each line twice otherwise
}


def cluster_address() -> str:
    """Where RAY_ADDRESS points: host:port or auto; "local", a private cluster, without it.

    Raises:
        ValueError: it is the address of jobs, or of a Ray client.
    """
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    require(
        "://" not in address,
        f"RAY_ADDRESS (={address}) is where jobs are submitted; use `ray job submit -- python "
        "…`, or set RAY_ADDRESS to the head's host:port (6379 by default), or unset it for a "
        "private Ray on this machine",
    )
    return address


def set_ray_environment() -> None:
    """State Ray's authentication; a second call changes nothing.

    Without a cluster to join we shall start our own: it asks for a token that only this process
    and its children know, so that nobody else on the machine can run code in it, and no token is
    written to the home folder. A cluster that exists has its own mode, which its users state in
    RAY_AUTH_MODE; a job of the cluster inherits it.

    Raises:
        RuntimeError: Ray is imported already, and has settled on a mode that nobody stated.
    """
    if os.environ.get("RAY_ADDRESS", LOCAL) not in ("", LOCAL) or "RAY_AUTH_TOKEN" in os.environ:
        return
    # Ray keeps the mode that it read as it was imported: stated now, it would reach children alone.
    if "RAY_AUTH_MODE" not in os.environ and "ray" in sys.modules:
        raise RuntimeError(
            "ray was imported before its authentication was stated; call set_ray_environment() "
            "before `import ray`, or start the process with RAY_AUTH_MODE=token or disabled"
        )
    # Without a token in the environment Ray would make one, in ~/.ray, and leave it there.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def is_set() -> bool:
    """Whether Ray's authentication is stated, or left to the cluster that is joined."""
    return cluster_address() != LOCAL or "RAY_AUTH_MODE" in os.environ


def worker_environment(address: str) -> dict[str, str]:
    """What workers get of the driver's environment, less what they have of their job: Ray refuses
    a variable that is given twice."""
    # Where Ray tells a job's driver what `ray job submit` was given.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    known = job.get("runtime_env", {}).get("env_vars", {})
    given = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) or k in SETTINGS}
    # Neither names a cluster that another node would find.
    if address in (LOCAL, "auto"):
        given.pop("RAY_ADDRESS", None)
    # What a user states wins over SETTINGS.
    return {k: v for k, v in (SETTINGS | given).items() if k not in known}
