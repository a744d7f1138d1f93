"""What a sweep is asked for: its flags, and the run that its trials are variations of."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from mambaflow.checks import (
    require,
    require_not_negative,
    require_positive,
    require_seed,
    require_types,
)
from mambaflow.config import RunConfig, from_dict


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How configurations are proposed, how long each is trained, and which are stopped early."""

    space: str = "size"
    """What may be chosen: size, optim, ablation; or FILE.py:FUNCTION, a function from a run to a
    space."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """Who proposes: Optuna's TPE from what was found so far, chance, or every combination once, in
    an order drawn by --search-seed. Runs that a space lists are taken in their order."""
    num_samples: int = 16
    """Configurations to try."""
    seed_trials: int = 3
    """Trials of the base configuration with other seeds, besides num_samples and never stopped
    early: the noise that a difference must exceed."""
    budget: Literal["samples", "flops", "seconds"] = "samples"
    """What every trial gets as much of: samples, those of --epochs; FLOPs of training, those that
    the base configuration takes for --epochs; or seconds of training, those of --trial-minutes."""
    trial_minutes: float = 0.0
    """Minutes of training of each trial, with --budget seconds."""
    validations: int = 9
    """Validations of a trial, evenly over its budget; each saves a checkpoint and reports."""
    scheduler: Literal["asha", "none"] = "asha"
    """Whether trials that fall behind are stopped early: ASHA, or none."""
    reduction_factor: int = 3
    """ASHA lets about one in this many go on from a rung; each rung is this many times as far."""
    grace: int = 1
    """Validations before a trial may be stopped: the first rung."""
    max_concurrent: int = 0
    """Trials at once; 0: as many as the cluster has room for."""
    max_hours: float = 0.0
    """Hours after which running trials are stopped with a checkpoint, to go on with --resume; 0:
    no limit."""
    max_early_failures: int = 3
    """Trials in a row that fail before their first report after which the sweep ends: they fail
    of one cause."""
    search_seed: int = 0
    """Seed of what is proposed."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "num_samples", "validations", "grace", "max_early_failures")
        require_not_negative(self, "seed_trials", "trial_minutes", "max_concurrent", "max_hours")
        require_seed(self, "search_seed")
        require(
            self.reduction_factor >= 2,
            f"reduction_factor (={self.reduction_factor}) must be 2 or more; use 3, or "
            "--scheduler none",
        )
        require(
            self.grace <= self.validations,
            f"grace (={self.grace}) must be at most validations (={self.validations}); use 1",
        )
        timed, minutes = self.budget == "seconds", self.trial_minutes
        require(
            minutes > 0 or not timed,
            f"trial_minutes (={minutes:g}) must be above 0 with --budget seconds; use 10",
        )
        require(
            timed or not minutes,
            f"trial_minutes (={minutes:g}) is unused with --budget {self.budget}; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep, written beside it as sweep.json. Its folder is `run_name` under `storage`, and
    `run` is the base configuration."""

    search: SearchConfig = field(default_factory=SearchConfig)
    run: RunConfig = field(default_factory=RunConfig)


def to_json(config: SweepConfig) -> str:
    """The configuration as it is written beside a sweep."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes) -> SweepConfig:
    """The configuration that `to_json` wrote.

    Raises:
        ValueError: fields that are unknown or missing, by name, or of another type.
    """
    values: dict[str, Any] = json.loads(text)
    names = {f.name for f in dataclasses.fields(SearchConfig)}
    given = values["search"]
    require(
        given.keys() == names,
        f"search has other fields ({sorted(given.keys() ^ names)}) than this mambaflow's; use the "
        "version that wrote it",
    )
    return SweepConfig(search=SearchConfig(**given), run=from_dict(values["run"]))
