"""Writing and restoring checkpoints: directories that are whole or are not there.

What is in one, and how it is read, stands in `models.weights`.
"""

import hashlib
import json
import logging
import re

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from mambaflow.config import differences, to_dict
from mambaflow.disk import FullError
from mambaflow.models.weights import (
    FORMAT,
    INDEX,
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpointError,
    digest,
    read_info,
    read_parts,
    require_fit,
    saved_steps,
    where,
)
from mambaflow.run_paths import RunPaths
from mambaflow.storage_base import Storage
from mambaflow.training.loop import TrainState

PARTS = ("model", "ema", "optimizer")
log = logging.getLogger(__name__)


def save(state: TrainState, info: CheckpointInfo, run: Storage) -> str:
    """Write a checkpoint into the run's storage, its index last; returns its folder name.

    Raises:
        FullError: there is no room for it; nothing of it is left, and earlier ones stay.
    """
    folder = RunPaths.checkpoint(info.step)
    _remove(run, folder)  # what an interrupted save, or another past of this run, left there
    try:
        _write(state, info, run, folder)
    except FullError:
        # Its parts would take the room that somebody frees.
        _remove(run, folder)
        raise
    return folder


def _write(state: TrainState, info: CheckpointInfo, run: Storage, folder: str) -> None:
    digests = {}
    for part, tensors in _parts(state).items():
        # safetensors takes dense tensors alone. The digest is of the bytes as they are meant to be,
        # not of what a disk gives back.
        data = serialise({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
        run.write(f"{folder}/{info.file(part)}", data)
        digests[info.file(part)] = hashlib.sha256(data).hexdigest()
    values = {
        "format": FORMAT,
        "step": info.step,
        "scores": info.scores,
        "finished": info.finished,
        "torch": torch.__version__,
        "config": to_dict(info.config),
        "files": digests,
    }
    # The index seals itself too: scores and digests are believed by whoever reads it.
    text = json.dumps(values | {"sha256": digest(values)}, indent=2)
    # Last: a save that was interrupted before this line has no index, and is no checkpoint.
    run.write(f"{folder}/{INDEX}", text.encode())


def _remove(run: Storage, folder: str) -> None:
    """The index goes first, so that a half-removed checkpoint is no checkpoint."""
    run.delete(f"{folder}/{INDEX}")
    run.delete_tree(f"{folder}/")


def _parts(state: TrainState) -> dict[str, dict[str, Tensor]]:
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": {
            # The optimiser knows parameters by their number alone, in the order of its groups.
            f"{i}.{key}": torch.as_tensor(value)  # safetensors knows no plain numbers
            for i, moments in state.optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        },
    }


def restore(state: TrainState, run: Storage, step: int) -> CheckpointInfo:
    """Put the checkpoint after `step` into `state`, every file verified before any is used."""
    info = read_info(run, step)
    told = where(run, step)
    # Before any tensor is read: fields by name tell more than shapes that do not fit.
    other = list(differences(info.config.model, state.model.config, "model."))
    if other:
        raise CheckpointError(
            f"{told} is of another model ({'; '.join(other)}); build the model that it is of"
        )
    parts = read_parts(run, info, PARTS)
    # All that can refuse comes before the first change: a state is never restored by half, and can
    # be tried with the checkpoint before.
    for part, module in (("model", state.model), ("ema", state.ema)):
        require_fit(parts[part], module, f"{told}: {part}")
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        number, moment = key.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    state.model.load_state_dict(parts["model"])
    state.ema.load_state_dict(parts["ema"])
    # Moments come from the checkpoint, settings such as the weight decay from the configuration.
    # torch moves the moments to the parameters' device.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = info.step
    return info


def restore_newest(state: TrainState, run: Storage) -> CheckpointInfo | None:
    """Restore the newest sound checkpoint; a damaged one is logged and passed over.

    Raises:
        CheckpointError: one is of another model or version, or all are damaged.
    """
    steps = saved_steps(run)
    for step in reversed(steps):
        try:
            return restore(state, run, step)
        # Nothing else is passed over: of another model or version are the older ones too.
        except DamagedCheckpointError as error:
            log.warning("%s; trying the one before", error)
    # Not a fresh start: it would train over a run whose files may still be mended.
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints in {run.uri} are damaged (steps {steps}); "
            "start anew under another --run-name"
        )
    return None


def prune(run: Storage, newest: int, best: int | None) -> None:
    """Keep the checkpoints after `newest` and `best`, and remove all else of their kind: older
    ones, those past `newest`, which the run went back from, and what interrupted saves left."""
    kept = {RunPaths.checkpoint(step) for step in (newest, best) if step is not None}
    keys = run.list(RunPaths.CHECKPOINTS)
    # Folders by name, since an interrupted save left one without an index.
    found = {key.split("/")[0] for key in keys if re.match(rf"{RunPaths.CHECKPOINTS}\d+/", key)}
    for folder in sorted(found - kept):
        _remove(run, folder)
