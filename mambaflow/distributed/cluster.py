"""A Ray cluster to work on: the one at RAY_ADDRESS, or a private one."""

import contextlib
import json
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

LOCAL = "local"


def cluster_address() -> str:
    """Where RAY_ADDRESS points: host:port or auto; "local", a private cluster, without it.

    Raises:
        ValueError: it is the address of jobs, or of a Ray client.
    """
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS (={address}) is where jobs are submitted; use `ray job submit -- python "
            "…`, or set RAY_ADDRESS to the head's host:port (6379 by default), or unset it for a "
            "private Ray on this machine"
        )
    return address


def _settle_authentication() -> None:
    """State Ray's authentication before it is imported, which is when it reads it.

    Without a cluster to join we shall start our own: it asks for a token that only this process
    and its children know, so that nobody else on the machine can run code in it, and no token is
    written to the home folder. A cluster that exists has its own mode, which its users state in
    RAY_AUTH_MODE; a job of the cluster inherits it.
    """
    joining = os.environ.get("RAY_ADDRESS", LOCAL) not in ("", LOCAL)
    if not joining and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


_settle_authentication()

import ray  # noqa: E402

from mambaflow.host import KEEP_MEMORY  # noqa: E402

REACH_S = 10
log = logging.getLogger(__name__)
# What a worker needs of the driver's environment, whichever node it starts on.
FORWARDED = ("AWS_", "MAMBAFLOW_", "RAY_TRAIN_", "RAY_ADDRESS")
# How Ray Train and its workers behave unless the environment says otherwise.
SETTINGS = {
    **KEEP_MEMORY,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints each line twice otherwise
}


@contextlib.contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """The cluster at RAY_ADDRESS, or else a private one on this machine that ends with us.

    Args:
        num_cpus: cores of the private cluster; without it, all that this machine has.

    Raises:
        ValueError, OSError: RAY_ADDRESS is of another kind, does not answer, or refuses us.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address()
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"address": address}
        if address == LOCAL:
            # A short path: a Unix socket's name holds 107 bytes.
            folder = tempfile.TemporaryDirectory("", "mf-", "/tmp", ignore_cleanup_errors=True)
            temp = stack.enter_context(folder)
            settings |= {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": temp}
        _join(settings, {"env_vars": _environment(address)})
        stack.callback(ray.shutdown)
        yield


def _join(settings: dict[str, Any], runtime_env: dict[str, Any]) -> None:
    """ray.init; an address where nobody answers is found in seconds, where Ray takes minutes."""
    address = settings["address"]
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS (={address}): {error}; start one with "
            "`ray start --head`, or unset it for a private Ray on this machine"
        ) from error
    try:
        ray.init(
            logging_level=logging.WARNING, log_to_driver=False, runtime_env=runtime_env, **settings
        )
    except (ray.exceptions.AuthenticationError, ConnectionError) as error:
        raise ConnectionError(
            f"Ray at RAY_ADDRESS (={address}) does not let us in: {error}; start it with `ray "
            "start --head`, and set RAY_AUTH_MODE, and RAY_AUTH_TOKEN_PATH for token, as there"
        ) from error


def _environment(address: str) -> dict[str, str]:
    """What workers get of the driver's environment, less what they have of their job: Ray refuses
    a variable that is given twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    known = job.get("runtime_env", {}).get("env_vars", {})
    given = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) or k in SETTINGS}
    if address in (LOCAL, "auto"):
        given.pop("RAY_ADDRESS", None)
    return {k: v for k, v in (SETTINGS | given).items() if k not in known}
