"""Checkpoints: directories that are whole or are not there.

    step_0000400/
      model.safetensors      weights
      ema.safetensors        their exponential average, which is what is evaluated
      optimizer.safetensors  moments and step counts of the optimiser
      checkpoint.json        format, step, configuration, scores; sha256 of the others and of
                             itself; written last and removed first

A directory without its checkpoint.json is no checkpoint; one with a file that it does not
describe, or that differs from what it says, is refused.
"""

import hashlib
import json
import logging
import re

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from mambaflow.config import differences, to_dict
from mambaflow.models.weights import (
    FORMAT,
    INDEX,
    CheckpointError,
    DamagedCheckpointError,
    Index,
    _digest,
    _read_parts,
    _require_fit,
    _where,
    name,
    read_index,
    saved_steps,
)
from mambaflow.storage import Storage
from mambaflow.training.loop import TrainState

log = logging.getLogger(__name__)
PARTS = ("model", "ema", "optimizer")


def save(state: TrainState, index: Index, run: Storage) -> str:
    """Write a checkpoint into the run's storage, its index last; returns its folder name."""
    folder = name(index.step)
    _remove(run, folder)  # what an interrupted save, or another past of this run, left there
    digests = {}
    for part, tensors in _parts(state).items():
        data = serialise({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
        run.write(f"{folder}/{part}.safetensors", data)
        digests[f"{part}.safetensors"] = hashlib.sha256(data).hexdigest()
    values = {
        "format": FORMAT,
        "step": index.step,
        "scores": index.scores,
        "finished": index.finished,
        "torch": torch.__version__,
        "config": to_dict(index.config),
        "files": digests,
    }
    text = json.dumps(values | {"sha256": _digest(values)}, indent=2)
    run.write(f"{folder}/{INDEX}", text.encode())
    return folder


def _remove(run: Storage, folder: str) -> None:
    """The index goes first, so that a half-removed checkpoint is no checkpoint."""
    run.delete(f"{folder}/{INDEX}")
    run.delete_tree(f"{folder}/")


def _parts(state: TrainState) -> dict[str, dict[str, Tensor]]:
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": {
            f"{i}.{key}": torch.as_tensor(value)
            for i, moments in state.optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        },
    }


def restore(state: TrainState, run: Storage, step: int) -> Index:
    """Put the checkpoint after `step` into `state`, every file verified before any is used."""
    index = read_index(run, step)
    where = _where(run, step)
    other = list(differences(index.config.model, state.model.config, "model."))
    if other:
        raise CheckpointError(
            f"{where} is of another model ({'; '.join(other)}); build the model that it is of"
        )
    parts = _read_parts(run, index, PARTS)
    for part, module in (("model", state.model), ("ema", state.ema)):
        _require_fit(parts[part], module, f"{where}: {part}")
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        number, moment = key.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    state.model.load_state_dict(parts["model"])
    state.ema.load_state_dict(parts["ema"])
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = index.step
    return index


def restore_newest(state: TrainState, run: Storage) -> Index | None:
    """Restore the newest sound checkpoint; a damaged one is logged and passed over.

    Raises:
        CheckpointError: one is of another model or version, or all are damaged.
    """
    steps = saved_steps(run)
    for step in reversed(steps):
        try:
            return restore(state, run, step)
        except DamagedCheckpointError as error:
            log.warning("%s; trying the one before", error)
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints in {run.uri} are damaged (steps {steps}); "
            "start anew under another --run-name"
        )
    return None


def prune(run: Storage, newest: int, best: int | None) -> None:
    """Keep the checkpoints after `newest` and `best`, and remove all else of their kind: older
    ones, those past `newest`, which the run went back from, and what interrupted saves left."""
    found = {match.group() for key in run.list("step_") if (match := re.match(r"step_\d+", key))}
    for folder in sorted(found - {name(step) for step in (newest, best) if step is not None}):
        _remove(run, folder)
