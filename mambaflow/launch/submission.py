"""A submission: what it is refused for, its folder with a snapshot of the code, its batch file."""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import submitit

from mambaflow.checks import require, require_not_negative, require_positive, require_types
from mambaflow.launch import scheduler
from mambaflow.launch.attempt import RAY, Attempt
from mambaflow.launch.command import Command, named, with_own_space
from mambaflow.launch.node import ATTEMPT
from mambaflow.launch.scheduler import SchedulerError
from mambaflow.launch.task_folder import SubmissionFolder, TaskFolder

CODE = ("mambaflow", "jobs", "tune")  # what commands are made of
SHORT_MIN = 5  # a job that is shorter has no time to save


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """What a job asks of the cluster."""

    nodes: int = 1
    """Nodes, with one Ray over all of them."""
    gpus_per_node: int = 0
    """GPUs of each node."""
    cpus_per_node: int = 0
    """CPUs of each node; 0: what the cluster gives."""
    mem_gb: int = 0
    """GB of memory of each node; 0: what the cluster gives."""
    time: str = "01:00:00"
    """Longest time until the job is requeued, as Slurm writes it: minutes, H:M:S or D-H:M:S."""
    partition: str = ""
    """Slurm's partition; empty: the cluster's default. So the next ones."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that nodes must have."""
    exclude: str = ""
    """Nodes to leave out."""
    sbatch: list[str] = field(default_factory=list)
    """Any other option of sbatch, such as reservation=course."""
    setup: list[str] = field(default_factory=list)
    """Shell commands before ours on the first node, such as 'module load cuda'."""
    on_node_loss: Literal["requeue", "shrink"] = "requeue"
    """requeue: start again, with all nodes; shrink: go on with those left, as an elastic run can
    (--min-workers)."""
    grace_s: int = 120
    """Seconds before the time limit in which the command saves; Slurm may take up to 60 more."""
    max_restarts: int = 1000
    """Times that the job is started again."""
    name: str = ""
    """Name of the job, and of its run; empty: the command's and the time."""
    folder: str = "slurm"
    """Where submissions are kept: a folder that all nodes share."""
    array: str = ""
    """A file with a line of further flags for each of many commands; each is a job of its own."""
    array_parallelism: int = 256
    """Jobs of an array that run at once."""
    local: bool = False
    """On this machine, without Slurm: the same through submitit's local executor."""
    dry_run: bool = False
    """Show the batch file; submit nothing, write nothing."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "nodes", "grace_s", "array_parallelism")
        require_not_negative(self, "gpus_per_node", "cpus_per_node", "mem_gb", "max_restarts")
        least = SHORT_MIN + self.grace_s // 60
        require(
            minutes(self.time) >= least,
            f"time (={self.time}) must be {SHORT_MIN} minutes or more beside grace_s "
            f"(={self.grace_s}), in which the command saves; use {least}",
        )
        require(
            re.fullmatch(r"[\w.-]*", self.name) is not None,
            f"name (={self.name!r}) must be a plain name; use letters, digits, '-' and '_'",
        )
        require(
            not (self.local and self.nodes > 1),
            f"nodes (={self.nodes}) must be 1 with --local, which is this machine; "
            "use --nodes 1, or leave --local out",
        )
        for option in self.sbatch:
            require(
                re.fullmatch(r"[a-z][a-z-]*(=.*)?", option) is not None,
                f"sbatch (={option!r}) must be an option of sbatch; use reservation=course",
            )


def minutes(text: str) -> int:
    """A time of Slurm: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; rounded up.

    Raises:
        ValueError: it is none.
    """
    good = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if good is None:
        raise ValueError(f"time (={text!r}) must be a time as Slurm has it; use 24:00:00 or 1-12")
    days, *parts = good.groups()
    numbers = [int(p) for p in parts if p is not None]
    if days is not None:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, mins, seconds = 0, *[*numbers, 0][:2]
    whole = 60 * (24 * int(days or 0) + hours) + mins
    return whole + (seconds > 0)


@dataclass(frozen=True)
class Planned:
    """A submission before anything is written."""

    config: SubmitConfig
    commands: list[Command]
    folder: SubmissionFolder
    root: Path
    """Of the checkout."""
    ray: tuple[str, ...] = RAY

    @property
    def name(self) -> str:
        return self.folder.path.name


def planned(config: SubmitConfig, command: Command, lines: Sequence[str], root: Path) -> Planned:
    """The submission that flags describe.

    Args:
        lines: further flags, for each command of an array.
        root: of the checkout, whose code is to run.

    Raises:
        ValueError: naming the flag, the rule and the cure.
    """
    require(
        config.on_node_loss != "shrink"
        or (command.script == "jobs/train.py" and command.has("min-workers")),
        "on_node_loss (='shrink') needs a run that goes on with fewer workers; use jobs/train.py "
        "with --min-workers, or --on-node-loss requeue",
    )
    stem = config.name or f"{Path(command.script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    unique = f"{stem}-{secrets.token_hex(2)}"
    commands = []
    for number, line in enumerate(lines or [""]):
        own = with_own_space(command.plus(*shlex.split(line)), root, CODE)
        name = (config.name or unique) + (f"-{number}" if lines else "")
        commands.append(named(own, name, config.nodes, config.gpus_per_node))
    folder = Path(config.folder).expanduser().resolve() / unique
    return Planned(config, commands, SubmissionFolder(folder), root)


def read_lines(array: str) -> list[str]:
    """The lines of an --array.

    Raises:
        ValueError: the file is not there, or is empty.
    """
    if not array:
        return []
    require(Path(array).is_file(), f"array (={array}) must be a file with a line for each command")
    lines = [line.strip() for line in Path(array).read_text().splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    require(bool(found), f"array (={array}) must hold a line for each command; it is empty")
    return found


@contextlib.contextmanager
def outside_of_a_job() -> Iterator[None]:
    """The environment without the allocation that we may be in: a job that is submitted from a job
    has its own. Where Slurm's configuration is stays, which submitit would take for the job's."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def batch_file(plan: Planned) -> str:
    """What sbatch is given, as `submit` would have it."""
    with outside_of_a_job():
        executor = _executor(plan, 0, len(plan.commands))
    # Not public, and the one way to the text without submitting it.
    inner: Any = executor._executor
    text: str = inner._make_submission_file_text(inner._submitit_command_str, "dry-run")
    return text


def check(plan: Planned) -> None:
    """Have the scheduler look at the request, before anything is written.

    Raises:
        ValueError: it refuses, in its users' words.
        SchedulerError: it does not answer.
    """
    config = plan.config
    known = scheduler.partitions()
    require(
        not config.partition or set(config.partition.split(",")) <= set(known),
        f"partition (={config.partition}) must be one of this cluster's; valid: {', '.join(known)}",
    )
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in _asked(config).items()]
    with outside_of_a_job():
        try:
            scheduler.ask("sbatch", "--test-only", *flags, "--wrap=true")
        except SchedulerError as error:
            raise ValueError(_in_their_words(str(error), config)) from error


def _asked(config: SubmitConfig) -> dict[str, Any]:
    """What is asked of the cluster, by sbatch's names."""
    given = {
        "nodes": config.nodes, "ntasks-per-node": 1, "time": minutes(config.time),
        "gpus-per-node": config.gpus_per_node, "cpus-per-task": config.cpus_per_node,
        "mem": f"{config.mem_gb}G" if config.mem_gb else "", "partition": config.partition,
        "account": config.account, "qos": config.qos, "constraint": config.constraint,
        "exclude": config.exclude,
    }  # fmt: skip
    return {k: v for k, v in given.items() if v} | _further(config)


def _further(config: SubmitConfig) -> dict[str, Any]:
    pairs = [option.partition("=") for option in config.sbatch]
    return {name: value if equals else True for name, equals, value in pairs}


# What Slurm says, what it means, and what to do.
REFUSALS = {
    "node configuration is not available|More processors requested|Node count specification|"
    "Requested nodes are busy|more nodes|[Ii]nvalid generic resource|"
    "[Ii]nvalid gres": "nodes (={c.nodes}), gpus_per_node "
    "(={c.gpus_per_node}), cpus_per_node (={c.cpus_per_node}) and mem_gb (={c.mem_gb}) must be had "
    "in one partition; see `sinfo -o '%R %D %c %m %G'` and ask for less",
    "[Ii]nvalid account": "account (={c.account!r}) must be one of yours, for this partition; see "
    "`sacctmgr show associations user=$USER`",
    "[Ii]nvalid qos": "qos (={c.qos!r}) must be one that you may use; see `sacctmgr show qos`",
    "[Ii]nvalid feature": "constraint (={c.constraint!r}) must be of features that nodes have; see "
    "`sinfo -o '%n %f'`",
    "time limit": "time (={c.time}) must be within the partition's limit; see `sinfo -o '%R %l'`",
    "[Ii]nvalid partition": "partition (={c.partition!r}) must be one of this cluster's; see "
    "`sinfo`",
}


def _in_their_words(said: str, config: SubmitConfig) -> str:
    for pattern, meaning in REFUSALS.items():
        if re.search(pattern, said):
            return f"{meaning.format(c=config)} (Slurm: {_last(said)})"
    return f"Slurm refuses the job: {_last(said)}"


def _last(said: str) -> str:
    return said.strip().splitlines()[-1]


def submit(plan: Planned) -> list[str]:
    """Take the snapshot and submit; the jobs, one for each command.

    Raises:
        SchedulerError: Slurm refuses; nothing is left.
    """
    plan.folder.make()
    try:
        snapshot(plan.root, plan.folder.path / SubmissionFolder.CODE)
        jobs = _submitted(plan)
    except BaseException:
        shutil.rmtree(plan.folder.path, ignore_errors=True)
        raise
    plan.folder.write_record(
        {
            "jobs": jobs,
            "local": plan.config.local,
            "commands": [str(c) for c in plan.commands],
            "submitted": time.strftime("%Y-%m-%d %H:%M:%S"),
            "nodes": plan.config.nodes,
        }
    )
    return jobs


def _submitted(plan: Planned) -> list[str]:
    most = 1 if plan.config.local else len(plan.commands)
    if len(plan.commands) > 1 and not plan.config.local:
        most = scheduler.largest_array()
    jobs: list[str] = []
    with outside_of_a_job():
        for first in range(0, len(plan.commands), most):
            part = plan.commands[first : first + most]
            jobs += _submit_part(plan, first, part)
    return jobs


def _submit_part(plan: Planned, first: int, commands: list[Command]) -> list[str]:
    executor = _executor(plan, first, len(commands))
    attempts = [_attempt(plan, first + i, c) for i, c in enumerate(commands)]
    try:
        if len(attempts) == 1:
            return [executor.submit(attempts[0]).job_id]
        with executor.batch():
            jobs = [executor.submit(attempt) for attempt in attempts]
        return [job.job_id for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        raise SchedulerError(f"Slurm refuses the job: {_last(str(error))}") from error


def _attempt(plan: Planned, number: int, command: Command) -> Attempt:
    task = plan.folder.task(number)
    task.path.mkdir(parents=True)
    return Attempt(
        folder=str(task.path), command=command, code=str(plan.folder.path / SubmissionFolder.CODE),
        cwd=os.getcwd(), shrink=plan.config.on_node_loss == "shrink",
        grace_s=float(plan.config.grace_s), ray=plan.ray,
    )  # fmt: skip


def _executor(plan: Planned, first: int, count: int) -> submitit.AutoExecutor:
    """submitit's, for commands `first` to `first + count`."""
    config, folder = plan.config, plan.folder.path / SubmissionFolder.SUBMITIT
    cluster = "local" if config.local else "slurm"
    # Our own rule counts restarts: submitit's takes every preemption of a short job for a time-out.
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=10**6)
    setup = [*config.setup, *_setup(plan)]
    shared = {
        "name": plan.name, "timeout_min": minutes(config.time), "nodes": config.nodes,
        "tasks_per_node": 1, "gpus_per_node": config.gpus_per_node or None,
        "cpus_per_task": config.cpus_per_node or None, "mem_gb": config.mem_gb or None,
    }  # fmt: skip
    if config.local:
        executor.update_parameters(**shared, local_setup=setup)
        return executor
    executor.update_parameters(
        **shared,
        slurm_partition=config.partition or None,
        slurm_account=config.account or None,
        slurm_qos=config.qos or None,
        slurm_constraint=config.constraint or None,
        slurm_exclude=config.exclude or None,
        slurm_signal_delay_s=config.grace_s,
        slurm_array_parallelism=config.array_parallelism,
        slurm_setup=setup,
        slurm_teardown=_teardown(plan, first, count),
        slurm_srun_args=_srun(config),
        slurm_additional_parameters={"requeue": True, **_no_kill(config), **_further(config)},
    )
    return executor


def _no_kill(config: SubmitConfig) -> dict[str, Any]:
    return {"no-kill": True} if config.on_node_loss == "shrink" else {}


def _srun(config: SubmitConfig) -> list[str]:
    """One call, whatever the nodes. Ray's threads are not to be bound to a core; the end of one
    node's task is that of all, unless fewer will do."""
    shrink = config.on_node_loss == "shrink"
    ends = ["--no-kill", "--kill-on-bad-exit=0"] if shrink else ["--kill-on-bad-exit=1"]
    return ["--cpu-bind=none", *ends]


def _setup(plan: Planned) -> list[str]:
    code = shlex.quote(str(plan.folder.path / SubmissionFolder.CODE))
    if plan.config.local:
        return [f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"]
    return [
        # The shell outlives what ends its srun, so that it can ask for another start.
        "trap : TERM USR1 USR2 HUP",
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f'export {ATTEMPT}="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}-$(hostname -s)-$$"',
    ]


def _teardown(plan: Planned, first: int, count: int) -> list[str]:
    """The end of the batch script: another start, where the code is one of what is not over, nobody
    wants an end, and the scheduler has not requeued the job itself."""
    tasks = shlex.quote(str(plan.folder.path / SubmissionFolder.TASKS))
    number = f"$(({first} + ${{SLURM_ARRAY_TASK_ID:-0}}))" if count > 1 else str(first)
    most = plan.config.max_restarts
    return [
        "code=$?",
        f"task={tasks}/{number}",
        # Where the task was killed before it could.
        f'rm -f "$task/{TaskFolder.ATTEMPTS}/${ATTEMPT}/token"',
        # The command's own: srun's is the highest, and tasks that end with the first's are killed.
        f'if [ -s "$task/{TaskFolder.DONE}" ]; then',
        f"""  exit "$(sed -n 's/.*"code": *\\([0-9]*\\).*/\\1/p' "$task/{TaskFolder.DONE}")\"""",
        "fi",
        "if [ $code -gt 128 ] \\",
        f'  && [ ! -e "$task/{TaskFolder.CANCELLED}" ] \\',
        f'  && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ] \\',
        '  && scontrol show job -o "$SLURM_JOB_ID" | grep -q "JobState=RUNNING"; then',
        "  # Slurm ends what runs here as it requeues, and a trap does not protect scontrol.",
        "  trap '' TERM",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "  # While it waits, nodes can be left out; while it ran they could not.",
        f'  if [ -s "$task/{TaskFolder.EXCLUDED}" ]; then',
        '    scontrol update JobId="$SLURM_JOB_ID" '
        f'ExcNodeList="{_with_comma(plan.config.exclude)}$(cat "$task/{TaskFolder.EXCLUDED}")"',
        "  fi",
        "fi",
        "exit $code",
    ]


def _with_comma(names: str) -> str:
    return f"{names}," if names else ""


def snapshot(root: Path, target: Path) -> None:
    """The code as it is now, so that an edit while the job waits changes nothing."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in CODE:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=unwanted)


def with_ray(plan: Planned, ray: Sequence[str]) -> Planned:
    """The same with another program for Ray."""
    return replace(plan, ray=tuple(ray))
