"""The command of a submission: what is added to it, how it is resumed, and its process."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambaflow.checks import require
from mambaflow.run_paths import RunPaths
from mambaflow.search.sweep_paths import SweepPaths
from mambaflow.signals import withheld
from mambaflow.storage import at

# Commands that take --run-name, --storage and --resume, and what is there once they have begun.
# All others are resumed by being started again.
RESUMED: dict[str, str] = {"jobs/train.py": RunPaths.CONFIG, "tune/sweep.py": SweepPaths.CONFIG}


@dataclass(frozen=True)
class Command:
    """A Python script and its arguments."""

    script: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.script, *self.arguments])

    @property
    def begun_with(self) -> str:
        """The file that tells that it has begun; "" for a command without --resume."""
        return RESUMED.get(self.script, "")

    def value(self, flag: str) -> str | None:
        """What a flag is given; None where it is not there."""
        found: str | None = _parser(flag).parse_known_args(self.arguments)[0].found
        return found

    def has(self, flag: str) -> bool:
        """Whether a flag stands there, or its opposite."""
        names = {f"--{flag}", f"--no-{flag}"}
        given = {a.partition("=")[0].replace("_", "-") for a in self.arguments}
        return bool(names & given)

    def plus(self, *arguments: str) -> "Command":
        return Command(self.script, (*self.arguments, *arguments))

    def without(self, flag: str) -> "Command":
        """The same without a flag that takes a value."""
        return Command(self.script, tuple(_parser(flag).parse_known_args(self.arguments)[1]))


def _parser(flag: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{flag}", f"--{flag.replace('-', '_')}", dest="found")
    return parser


def with_own_space(command: Command, root: Path, code: Sequence[str]) -> Command:
    """The same command, with the file of a --space called by its place in the checkout: so the one
    that was submitted is read, and not the one that is there when the job starts.

    Args:
        code: folders of the checkout of which a submission has a snapshot.

    Raises:
        ValueError: the file is in none of these.
    """
    space = command.value("space") or ""
    file, colon, function = space.rpartition(":")
    if command.script != "tune/sweep.py" or not colon:
        return command
    path = next((p.resolve() for p in (Path(file), root / file) if p.is_file()), None)
    inside = path is not None and any(path.is_relative_to((root / c).resolve()) for c in code)
    require(
        inside,
        f"space (={space}) must be a file of the code that is submitted; put it into {root}/tune",
    )
    assert path is not None
    place = path.relative_to(root.resolve()).as_posix()
    return command.without("space").plus(f"--space={place}:{function}")


def named(command: Command, name: str, nodes: int, gpus_per_node: int) -> Command:
    """The same command, with what it would else choose anew at every start: its run's name, and
    where the run is kept; and a worker for each GPU, or for each node, unless it says how many."""
    if not command.begun_with:
        return command
    if command.value("run-name") is None:
        command = command.plus(f"--run-name={name}")
    command = command.plus(f"--storage={at(storage(command)).uri}")
    if command.script == "jobs/train.py" and not command.has("num-workers"):
        command = command.plus(f"--num-workers={nodes * max(gpus_per_node, 1)}")
        if gpus_per_node and not command.has("use-gpu"):
            command = command.plus("--use-gpu")
    return command


def storage(command: Command) -> str:
    """Where a run is kept: as its flags say, or its --config."""
    if (given := command.value("storage")) is not None:
        return given
    if (config := command.value("config")) is None:
        return "runs"
    folder, _, name = at(config).uri.rpartition("/")
    try:
        found: str = json.loads(at(folder or "/").read(name))["storage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"config (={config!r}) must be a configuration that can be read: {error}; "
            "name a run's config.json"
        ) from error
    return found


def resumed(command: Command, begun: bool) -> Command:
    """The command to start now.

    Args:
        begun: an attempt of this submission has started it before. A run of this name that others
            began is not ours to go on with: the command itself refuses it.
    """
    if not begun or not command.begun_with or command.has("resume"):
        return command
    run = at(storage(command)).child(str(command.value("run-name")))
    return command.plus("--resume") if run.exists(command.begun_with) else command


def parsed(argv: Sequence[str], root: Path) -> Command:
    """The command of a command line.

    Args:
        root: of the checkout, whose scripts are called by their path in it.

    Raises:
        ValueError: there is no such script.
    """
    require(
        bool(argv),
        "command (empty) must follow after --; use -- jobs/train.py --arch v2 …",
    )
    script = argv[1] if Path(argv[0]).name.startswith("python") and len(argv) > 1 else argv[0]
    rest = list(argv[argv.index(script) + 1 :])
    found = next((p for p in (Path(script), root / script) if p.is_file()), None)
    if found is None:
        known = ", ".join(sorted(RESUMED) + ["jobs/evaluate.py"])
        raise ValueError(f"command (={script}) must be a Python file that is there; use {known}, …")
    require(found.suffix == ".py", f"command (={script}) must be a Python file, called *.py")
    path = found.resolve()
    inside = path.is_relative_to(root.resolve())
    name = path.relative_to(root.resolve()).as_posix() if inside else str(path)
    return Command(name, tuple(rest))


class Running:
    """The command's process."""

    def __init__(
        self, command: Command, code: Path, cwd: str, log: Path, environment: Mapping[str, str]
    ) -> None:
        script = Path(command.script)
        path = script if script.is_absolute() else code / script
        # SIGTERM alone reaches it, from us and from the scheduler: a script that has no handler for
        # the others would die of them before it could save.
        with (
            log.open("ab") as out,
            withheld(signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP),
        ):
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(path), *command.arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd,
                env={**os.environ, **environment},
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs; negative where a signal ended it."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.code is None:
            self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
