"""What the batch system says of this node: its part in the job, its address, what it may use."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from mambaflow.checks import require

# Set by the batch script, once for each start of it: a copy of a job that is started twice has
# another one, while all its nodes have the same.
ATTEMPT = "MAMBAFLOW_ATTEMPT"


@dataclass(frozen=True)
class Node:
    """This node's place in the attempt."""

    job: str
    attempt: str
    rank: int
    size: int
    name: str
    cpus: int
    gpus: int
    local: bool = False
    """Without a batch system, by submitit's local executor."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Node":
        """As Slurm tells it, or submitit's local executor."""
        if "SLURM_JOB_ID" in environment and environment.get("SUBMITIT_EXECUTOR") != "local":
            return _of_slurm(environment)
        job = environment.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        given = environment.get("CUDA_VISIBLE_DEVICES", "")
        gpus = len([d for d in given.split(",") if d])
        name = socket.gethostname()
        return cls(job, f"{job}.0-{name}-{os.getpid()}", 0, 1, name, _cores(), gpus, True)

    @property
    def restarts(self) -> int:
        """How often the scheduler has requeued the job."""
        return int(self.attempt.partition("-")[0].rpartition(".")[2])

    def address(self) -> str:
        """The address at which the job's other nodes find this one.

        Raises:
            ValueError: its name leads to the node itself alone.
        """
        if self.size == 1:
            return "127.0.0.1"
        found = socket.gethostbyname(self.name)
        require(
            not found.startswith("127."),
            f"{self.name} (={found}) must have an address that other nodes reach; have "
            "/etc/hosts or the name server name it by its network's",
        )
        return found


def _of_slurm(environment: Mapping[str, str]) -> Node:
    job, restarts = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    name = environment.get("SLURMD_NODENAME") or socket.gethostname()
    attempt = environment.get(ATTEMPT) or f"{job}.{restarts}-{name}-0"
    return Node(
        job, attempt, int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), name,
        cpus=_cpus(environment), gpus=_gpus(environment),
    )  # fmt: skip


def _cpus(environment: Mapping[str, str]) -> int:
    """CPUs of the job on this node: neither Ray's own count nor the host's."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return _cores()


def _cores() -> int:
    # Here, since it imports torch: that takes seconds, and Slurm has told already.
    from mambaflow import host

    return host.cores()


def _gpus(environment: Mapping[str, str]) -> int:
    if environment.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(environment["SLURM_GPUS_ON_NODE"])
    given = environment.get("SLURM_JOB_GPUS") or environment.get("SLURM_STEP_GPUS", "")
    return len([d for d in given.split(",") if d])
