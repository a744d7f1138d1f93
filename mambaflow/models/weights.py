"""Reading a run's checkpoints: what they hold, and the model of the best.

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
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from torch import Tensor, nn

from mambaflow.config import RunConfig, from_dict
from mambaflow.models.velocity_field import VelocityField
from mambaflow.storage import Storage, at

FORMAT = 1
INDEX = "checkpoint.json"
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and what is wrong."""


class DamagedCheckpointError(CheckpointError):
    """Its bytes are not those that were written: an older checkpoint may still do."""


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


def _digest(values: dict[str, Any]) -> str:
    """sha256 of JSON values, however they are laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def saved_steps(run: Storage) -> list[int]:
    """Steps of the run's complete checkpoints, oldest first."""
    found = (re.fullmatch(rf"step_(\d+)/{re.escape(INDEX)}", key) for key in run.list("step_"))
    return sorted(int(match.group(1)) for match in found if match)


def _where(run: Storage, step: int) -> str:
    return f"checkpoint {run.uri}/{name(step)}"


def read_index(run: Storage, step: int) -> Index:
    """What the checkpoint after `step` holds, its weights unread.

    Raises:
        CheckpointError: another version of mambaflow wrote it, or it is damaged.
    """
    values = _read_values(run, step)
    try:
        config = from_dict(values["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{_where(run, step)} has a configuration that this mambaflow does not know: {error}; "
            "use the version that wrote it"
        ) from error
    return Index(
        step=step,
        config=config,
        scores=values["scores"],
        files=values["files"],
        finished=values["finished"],
    )


def _read_values(run: Storage, step: int) -> dict[str, Any]:
    where = _where(run, step)
    try:
        values = json.loads(run.read(f"{name(step)}/{INDEX}"))
        version, digest = values["format"], values.pop("sha256", None)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{where} is not there; there are steps {saved_steps(run)}"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedCheckpointError(
            f"{where} has an unreadable {INDEX}: {error!r}; remove the folder to go back"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{where} has format {version}, this mambaflow reads {FORMAT}; "
            "use the version that wrote it"
        )
    if digest != _digest(values) or values["step"] != step:
        raise DamagedCheckpointError(
            f"{where} has an {INDEX} that was not written so; remove the folder to go back"
        )
    return values


def _require_fit(saved: dict[str, Tensor], module: nn.Module, where: str) -> None:
    """Refuse tensors of other names or shapes: the same configuration under changed code."""
    have = {key: list(value.shape) for key, value in saved.items()}
    want = {key: list(value.shape) for key, value in module.state_dict().items()}
    odd = sorted(key for key in have.keys() | want.keys() if have.get(key) != want.get(key))
    if odd:
        key = odd[0]
        raise CheckpointError(
            f"{where} does not fit this model in {len(odd)} tensors, first {key}: "
            f"{have.get(key)} saved, {want.get(key)} wanted; use the version that wrote it"
        )


def _read_parts(run: Storage, index: Index, parts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    folder = name(index.step)
    there = {key.removeprefix(f"{folder}/") for key in run.list(f"{folder}/")}
    strange = sorted(file for file in there - {INDEX, *index.files} if not file.startswith("."))
    if strange:
        raise CheckpointError(
            f"{_where(run, index.step)} holds {strange}, which its {INDEX} does not describe; "
            "move them elsewhere"
        )
    return {part: parse(_verified(run, index, f"{part}.safetensors")) for part in parts}


def _verified(run: Storage, index: Index, file: str) -> bytes:
    where = _where(run, index.step)
    try:
        data = run.read(f"{name(index.step)}/{file}")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{where} lacks {file}; remove the folder to go back"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != index.files[file]:
        raise DamagedCheckpointError(
            f"{where}: {file} ({len(data)} bytes) has sha256 {digest[:12]}…, {INDEX} says "
            f"{index.files[file][:12]}…; it is damaged, remove the folder to go back"
        )
    return data


def best_step(run: Storage, score: str, until: int | None = None) -> int | None:
    """Step of the checkpoint with the highest score, the earlier of equals; where none has the
    score, the newest; None where there is no checkpoint.

    Args:
        until: look no further than this step.
    """
    steps = [step for step in saved_steps(run) if until is None or step <= until]
    best, highest = (steps[-1] if steps else None), -math.inf
    for step in steps:
        try:
            value = read_index(run, step).scores.get(score, math.nan)
        except DamagedCheckpointError as error:
            log.warning("%s; passed over", error)
            continue
        if value > highest:  # never of nan
            best, highest = step, value
    return best


def load_model(
    run: str | Path, *, score: str = "val/psnr", device: str = "cpu"
) -> tuple[VelocityField, Index]:
    """The averaged weights (EMA) of a run's best checkpoint, ready to sample.

    Args:
        run: the run's folder or s3:// address.
        score: what "best" means; every checkpoint carries its scores.
    """
    storage = at(run)
    step = best_step(storage, score)
    if step is None:
        raise CheckpointError(f"{storage.uri} holds no complete checkpoint; train a run first")
    index = read_index(storage, step)
    with torch.random.fork_rng(devices=[]):  # its first weights, replaced at once
        model = VelocityField(index.config.model)
    parts = _read_parts(storage, index, ("ema",))
    _require_fit(parts["ema"], model, f"{_where(storage, step)}: ema")
    model.load_state_dict(parts["ema"])
    return model.to(device).eval().requires_grad_(False), index
