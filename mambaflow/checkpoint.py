"""Checkpoints: directories that are whole or are not there.

    step_0000400/
      model.safetensors      weights
      averaged.safetensors   their exponential average, which is what is evaluated
      optimizer.safetensors  moments and step counts of the optimiser
      checkpoint.json        format, step, configuration, scores; sha256 of the others; written last

A directory without its checkpoint.json, or with a file that it does not describe, is refused.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from mambaflow.config import RunConfig, from_dict, require, to_dict
from mambaflow.model import VelocityField
from mambaflow.storage import Storage, at
from mambaflow.training import TrainState

FORMAT = 1
INDEX = "checkpoint.json"
PARTS = ("model", "averaged", "optimizer")
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message names it and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What checkpoint.json says."""

    step: int
    config: RunConfig
    scores: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    """Whether this was the run's last step."""


def name(step: int) -> str:
    """Folder name of the checkpoint after `step`."""
    return f"step_{step:07d}"


def save(state: TrainState, index: Index, run: Storage) -> str:
    """Write a checkpoint into the run's storage, its index last; returns its folder name."""
    folder = name(index.step)
    digests = {}
    for part, tensors in _parts(state).items():
        data = serialise({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
        run.write(f"{folder}/{part}.safetensors", data)
        digests[f"{part}.safetensors"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(
        {
            "format": FORMAT,
            "step": index.step,
            "scores": index.scores,
            "finished": index.finished,
            "torch": torch.__version__,
            "config": to_dict(index.config),
            "files": digests,
        },
        indent=2,
    )
    run.write(f"{folder}/{INDEX}", text.encode())
    return folder


def _parts(state: TrainState) -> dict[str, dict[str, Tensor]]:
    return {
        "model": state.model.state_dict(),
        "averaged": state.averaged.state_dict(),
        "optimizer": {
            f"{i}.{key}": torch.as_tensor(value)
            for i, moments in state.optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        },
    }


def saved_steps(run: Storage) -> list[int]:
    """Steps of the run's complete checkpoints, oldest first."""
    found = (re.fullmatch(rf"step_(\d+)/{re.escape(INDEX)}", key) for key in run.list("step_"))
    return sorted(int(match.group(1)) for match in found if match)


def read_index(run: Storage, step: int) -> Index:
    """What the checkpoint after `step` holds, its weights unread."""
    where = f"checkpoint {run.uri}/{name(step)}"
    try:
        values = json.loads(run.read(f"{name(step)}/{INDEX}"))
        version = values["format"]
        if version != FORMAT:
            raise CheckpointError(
                f"{where} has format {version}, this mambaflow reads {FORMAT}; "
                "use the version that wrote it"
            )
        return Index(
            step=values["step"],
            config=from_dict(values["config"]),
            scores=values["scores"],
            files=values["files"],
            finished=values["finished"],
        )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where} has an unreadable {INDEX}: {error!r}") from error


def restore(state: TrainState, run: Storage, step: int) -> Index:
    """Put the checkpoint after `step` into `state`, every file verified before any is used."""
    index = read_index(run, step)
    parts = {part: _read_part(run, index, part) for part in PARTS}
    where = f"checkpoint {run.uri}/{name(step)}"
    try:
        state.model.load_state_dict(parts["model"])
        state.averaged.load_state_dict(parts["averaged"])
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit this model: {error}") from error
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        number, moment = key.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = index.step
    return index


def _read_part(run: Storage, index: Index, part: str) -> dict[str, Tensor]:
    file = f"{part}.safetensors"
    where = f"checkpoint {run.uri}/{name(index.step)}"
    if file not in index.files:
        raise CheckpointError(f"{where}: its {INDEX} does not list {file}")
    try:
        data = run.read(f"{name(index.step)}/{file}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} lacks {file}; remove the folder to go back") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != index.files[file]:
        raise CheckpointError(
            f"{where}: {file} ({len(data)} bytes) has sha256 {digest[:12]}…, {INDEX} says "
            f"{index.files[file][:12]}…; it is damaged, remove the folder to go back"
        )
    return parse(data)


def restore_newest(state: TrainState, run: Storage) -> Index | None:
    """Restore the newest sound checkpoint; a damaged one is logged and passed over."""
    steps = saved_steps(run)
    for step in reversed(steps):
        try:
            return restore(state, run, step)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    require(not steps, f"none of the {len(steps)} checkpoints in {run.uri} is sound; start anew")
    return None


def prune(run: Storage, best: int | None) -> None:
    """Keep the newest checkpoint and the best one; the index of the others goes first, so that
    a half-removed checkpoint is no checkpoint."""
    for step in saved_steps(run)[:-1]:
        if step != best:
            run.delete(f"{name(step)}/{INDEX}")
            run.delete_tree(f"{name(step)}/")


def best_step(run: Storage, score: str) -> int | None:
    """Step of the complete checkpoint with the highest score, the earlier of equals."""
    scored = [(read_index(run, s).scores.get(score, -torch.inf), -s) for s in saved_steps(run)]
    return -max(scored)[1] if scored else None


def load_model(
    run: str | Path, *, score: str = "val/psnr", device: str = "cpu"
) -> tuple[VelocityField, Index]:
    """The averaged weights of a run's best checkpoint, ready to sample.

    Args:
        run: the run's folder or s3:// address.
        score: what "best" means; every checkpoint carries its scores.
    """
    storage = at(run)
    step = best_step(storage, score)
    if step is None:
        raise CheckpointError(f"{storage.uri} holds no complete checkpoint; train a run first")
    index = read_index(storage, step)
    model = VelocityField(index.config.model)
    model.load_state_dict(_read_part(storage, index, "averaged"))
    return model.to(device).eval().requires_grad_(False), index
