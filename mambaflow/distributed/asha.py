"""Asynchronous successive halving, as Ray has it."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from mambaflow.search.config import SearchConfig


class Asha:
    """Asynchronous successive halving (Li et al. 2020, 1810.05934), as Ray has it, with trials
    under the names of the ledger.

    Args:
        search: its rungs are at `grace` validations, and `reduction_factor` times as many each.
    """

    def __init__(self, search: SearchConfig) -> None:
        # One bracket: of several, Ray would draw a trial's by chance.
        self._asha: Any = ASHAScheduler(
            time_attr="validations", metric="psnr", mode="max", max_t=search.validations,
            grace_period=search.grace, reduction_factor=search.reduction_factor, brackets=1,
        )  # fmt: skip
        self._known: dict[str, Any] = {}

    def decide(self, trial: str, validations: float, psnr: float) -> str:
        """As `search.conductor.Rungs`."""
        if trial not in self._known:
            # All that it looks at of a trial.
            self._known[trial] = type("Named", (), {"trial_id": trial})()
            self._asha.on_trial_add(None, self._known[trial])
        said = {"validations": validations, "psnr": psnr}
        decision = self._asha.on_trial_result(None, self._known[trial], said)
        return "stop" if decision == TrialScheduler.STOP else "continue"
