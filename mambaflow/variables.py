"""Environment variables: the rule of every one that is read, which is done here and nowhere else.

An empty variable counts as unset: job files often set what they have no value for. What breaks its
rule is refused by name before anything starts; a secret's value is never told. torchrun's variables
are read where torchrun starts the processes, and nowhere on Ray: pods set some of them too.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambaflow.checks import require

# Ray's word for a private cluster.
LOCAL = "local"
# What torchrun tells each of its processes, and what finds the first of them.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Ours, and those of which other programs read more than we do.
FAMILIES = ("MAMBAFLOW_", "AWS_", "RAY_", "TUNE_")
NAMED = 3  # refused variables in a message


@dataclass(frozen=True)
class Rule:
    """What a variable must hold."""

    holds: Callable[[str], object]
    words: str
    cure: str = "mend or unset it"
    secret: bool = False

    def refusal(self, name: str, text: str) -> str:
        """Why a value is refused; "" where it is not."""
        # Control characters first: most often the end of a line that was copied with it.
        if not text.isprintable():
            rule = f"{self.words}, and must not" if self.words else "not"
            return (
                f"{name} ({self.shown(text)}) must {rule} hold control characters, such as the end "
                "of a line that was copied with it; set it again"
            )
        if self.holds(text):
            return ""
        return f"{name} ({self.shown(text)}) must {self.words}; {self.cure}"

    def shown(self, text: str) -> str:
        """A value as messages have it."""
        # Before an @ in an address stand a name and a password.
        hidden = re.sub(r"//[^/\s]*@", "//(hidden)@", text)
        return f"of {len(text)} characters" if self.secret else f"={hidden!r}"


def _matches(pattern: str) -> Callable[[str], object]:
    # ASCII: int() and float() alone would take the digits of other scripts.
    return re.compile(pattern, re.ASCII).fullmatch


def _is_port(text: str) -> bool:
    return bool(_matches(r"\d{1,5}")(text)) and 0 < int(text) < 2**16


def _is_ray_address(text: str) -> bool:
    if text in (LOCAL, "auto"):
        return True
    # http:// and ray:// are other programs' to use, and are met by `cluster_address`.
    found = _matches(r"(https?://|ray://)?([\w.-]+|\[[0-9a-fA-F:.%\w]+\])(:(\d+))?/?")(text)
    if not isinstance(found, re.Match):
        return False
    scheme, _, _, port = found.groups()
    return _is_port(port) if port else bool(scheme)


def _is_job(text: str) -> bool:
    try:
        job = json.loads(text)
    except ValueError:
        return False
    env = job.get("runtime_env") or {} if isinstance(job, dict) else None
    return isinstance(env, dict) and isinstance(env.get("env_vars") or {}, dict)


def _is_silence(text: str) -> bool:
    return bool(SECONDS.holds(text)) and float(text) >= 5


def _is_trimmed(text: str) -> bool:
    return text == text.strip()


COUNT = Rule(_matches(r"0*[1-9]\d{0,5}"), "be a whole number above 0 and below 1,000,000")
RANK = Rule(_matches(r"\d{1,6}"), "be a whole number from 0 up", "start processes by torchrun")
SECONDS = Rule(_matches(r"\d{1,9}(\.\d+)?"), "be a number of seconds", "use 60")
SWITCH = Rule(_matches("[01]"), "be 0 or 1")
PLACE = Rule(_is_trimmed, "be a path, without blanks around it")
TEXT = Rule(_is_trimmed, "have no blanks around it")
# A value that may be one: of these no message shows it.
SECRET = Rule(_matches("[!-~]+"), "be one word of ASCII, without blanks", "set it again",
              secret=True)  # fmt: skip
ADDRESS = Rule(_is_ray_address, "be the head's host:port, auto or local",
               "use HOST:6379, or unset it for a private Ray on this machine")  # fmt: skip
# Without a name and a password, which every message of a request that fails would tell.
ENDPOINT = Rule(_matches(r"https?://[^\s/?#@]+(/\S*)?"), "be http://HOST or https://HOST")
SWITCHES = ("when_supported", "when_required")
RETRY_MODES = ("legacy", "standard", "adaptive")
CHECKSUMS = Rule(lambda text: text.lower() in SWITCHES, f"be one of {', '.join(SWITCHES)}")

RULES: dict[str, Rule] = {
    "MAMBAFLOW_THREADS": COUNT,
    "MAMBAFLOW_CORES": COUNT,
    "MAMBAFLOW_GROWTH_S": SECONDS,
    "MAMBAFLOW_SILENCE_S": Rule(_is_silence, "be 5 seconds or more", "use 30"),
    "MAMBAFLOW_NATIVE": SWITCH,
    "MAMBAFLOW_ONEDNN": SWITCH,
    "MAMBAFLOW_CACHE": PLACE,
    # As its specification has it.
    "XDG_CACHE_HOME": Rule(lambda text: _is_trimmed(text) and Path(text).is_absolute(),
                           "be an absolute path"),
    "CXX": TEXT,
    "OMP_NUM_THREADS": Rule(_matches(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*"),
                            "be a whole number above 0, or several between commas"),
    "WORLD_SIZE": Rule(COUNT.holds, COUNT.words, RANK.cure),
    "LOCAL_WORLD_SIZE": Rule(COUNT.holds, COUNT.words, RANK.cure),
    "RANK": RANK,
    "LOCAL_RANK": RANK,
    "MASTER_ADDR": Rule(_matches(r"[\w.:%-]+"), "be a host's name or address", RANK.cure),
    "MASTER_PORT": Rule(_is_port, "be a port, 1 to 65535", RANK.cure),
    "RAY_ADDRESS": ADDRESS,
    "RAY_AUTH_MODE": Rule(lambda text: text.lower() in ("token", "disabled", "k8s"),
                          "be token or disabled, as on the cluster"),
    "RAY_AUTH_TOKEN": SECRET,
    "RAY_AUTH_TOKEN_PATH": PLACE,
    # Jobs are given secrets in it.
    "RAY_JOB_CONFIG_JSON_ENV_VAR": Rule(
        _is_job, "be JSON as `ray job submit` writes it", "unset it", secret=True),
    "AWS_MAX_ATTEMPTS": Rule(COUNT.holds, COUNT.words, "use 5"),
    "AWS_RETRY_MODE": Rule(lambda text: text in RETRY_MODES, f"be one of {', '.join(RETRY_MODES)}"),
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ENDPOINT_URL_S3": ENDPOINT,
    "AWS_REGION": Rule(_matches(r"[\w-]+"), "be a region's name", "use us-east-1"),
    "AWS_DEFAULT_REGION": Rule(_matches(r"[\w-]+"), "be a region's name", "use us-east-1"),
    "AWS_REQUEST_CHECKSUM_CALCULATION": CHECKSUMS,
    "AWS_RESPONSE_CHECKSUM_VALIDATION": CHECKSUMS,
    "AWS_ACCESS_KEY_ID": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": SECRET,
}  # fmt: skip


def rule_of(name: str) -> Rule:
    """The rule of a variable; of others of the families only that they can be passed on."""
    kept = re.search("KEY|SECRET|TOKEN|PASS|CREDENTIAL", name)
    return RULES.get(name) or Rule(lambda text: True, "", secret=bool(kept))


def stated(name: str) -> str:
    """A variable's value; "" where it is unset or empty.

    Raises:
        ValueError: it breaks its rule.
    """
    text = os.environ.get(name, "")
    refusal = rule_of(name).refusal(name, text) if text else ""
    require(not refusal, refusal)
    return text


def number(name: str, otherwise: int = 0) -> int:
    """A whole number; `otherwise` where it is unset or empty."""
    return int(stated(name) or otherwise)


def seconds(name: str, otherwise: float) -> float:
    """A number of seconds; `otherwise` where it is unset or empty."""
    return float(stated(name) or otherwise)


def _ours() -> Iterator[str]:
    """The variables that are looked at, but for torchrun's."""
    names = set(RULES) | {name for name in os.environ if name.startswith(FAMILIES)}
    yield from sorted(names - set(TORCHRUN))


def check_variables() -> None:
    """Refuse variables that break their rules, and take the empty ones away, which other programs
    (boto3, Ray) would read as a value; for the beginning of a job.

    Raises:
        ValueError: naming each variable, its rule, its value unless that is secret, and a cure.
    """
    refused(_ours())
    drop_empty(_ours())


def refused(names: Iterable[str]) -> None:
    """Refuse those that break their rules, several at one go.

    Raises:
        ValueError: as `check_variables`.
    """
    given = ((name, os.environ.get(name, "")) for name in names)
    found = [rule_of(name).refusal(name, text) for name, text in given if text]
    told = [refusal for refusal in found if refusal]
    more = f"; and {len(told) - NAMED} more" if len(told) > NAMED else ""
    require(not told, "; ".join(told[:NAMED]) + more)


def drop_empty(names: Iterable[str]) -> None:
    """Unset those that are empty."""
    for name in names:
        if os.environ.get(name) == "":
            os.environ.pop(name, None)


def as_it_is(name: str) -> str:
    """A variable's value by no rule, for messages that must not hold it."""
    return os.environ.get(name, "")


def state(name: str, value: str) -> str:
    """Give a variable a value, for this process and its children; returns it."""
    os.environ[name] = value
    return value


def forget(names: Iterable[str]) -> None:
    """Unset variables, for this process and its children."""
    for name in names:
        os.environ.pop(name, None)


def family(*prefixes: str) -> dict[str, str]:
    """The variables with a value whose names begin so."""
    return {name: text for name, text in os.environ.items() if name.startswith(prefixes) and text}


def empty(prefix: str) -> list[str]:
    """The variables without a value whose names begin so."""
    return [name for name, text in os.environ.items() if name.startswith(prefix) and not text]


def job_environment() -> dict[str, Any]:
    """The runtime environment that `ray job submit` gave the job that this process is; empty where
    it is none."""
    found: dict[str, Any] = json.loads(stated("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return found.get("runtime_env") or {}


@dataclass(frozen=True)
class Launched:
    """This process among those that torchrun started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Launched:
    """What torchrun says of this process. What is unset means what a process alone has: of rank 0
    of 1, on a node where it is 0 of 1.

    Raises:
        ValueError: variables that break their rules or contradict one another, or that are missing
            beside a WORLD_SIZE above 1.
    """
    size, local_size = number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1)
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if size > 1 and not stated(name)]
    require(
        not missing,
        f"{', '.join(missing)} (unset) must be set beside WORLD_SIZE (={size}); start the "
        "processes by torchrun, or unset WORLD_SIZE for a process alone",
    )
    rank, local_rank = number("RANK"), number("LOCAL_RANK")
    for name, value, whole, most in (
        ("RANK", rank, "WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
        ("LOCAL_WORLD_SIZE", local_size - 1, "WORLD_SIZE", size),
    ):
        rule = "below" if name.endswith("RANK") else "at most"
        require(
            value < most,
            f"{name} (={os.environ.get(name)!r}) must be {rule} {whole} (={most}); start the "
            f"processes by torchrun, or unset {name}",
        )
    return Launched(rank, size, local_rank, local_size)
