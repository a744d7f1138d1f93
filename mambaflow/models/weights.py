"""Reading a run's checkpoints: what they hold, and the model of the best.

    step_0000400/
      model.safetensors      weights
      ema.safetensors        their exponential average, which is what is evaluated
      optimizer.safetensors  moments and step counts of the optimiser
      checkpoint.json        format, step, configuration, scores; sha256 of the others and of
                             itself; written last and removed first

A directory without its checkpoint.json is no checkpoint; one with a file that it does not
describe, or that differs from what it says, is refused. `training.checkpoint` writes them.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from torch import Tensor, nn

from mambaflow.config import RunConfig, from_dict
from mambaflow.models.velocity_field import VelocityField
from mambaflow.run_paths import RunPaths
from mambaflow.storage import at
from mambaflow.storage_base import Storage

# Raised where names of files or tensors change; below stands what the format before called them.
FORMAT = 2
INDEX = "checkpoint.json"
# What format 1 called otherwise: a part's file, and parts of the names of tensors.
FILES_OF_1 = {"ema": "averaged"}
TENSORS_OF_1 = {
    ".among.": ".self_attn.",
    ".cross.": ".cross_attn.",
    "surroundings.": "local_linear.",
}
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and what is wrong."""


class DamagedCheckpointError(CheckpointError):
    """Its bytes are not those that were written: an older checkpoint may still do."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What checkpoint.json says."""

    step: int
    config: RunConfig
    scores: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    """Whether this was the run's last step."""
    format: int = FORMAT
    uri: str = field(default="", compare=False)
    """Where it is; empty for one that is not written yet."""

    def file(self, part: str) -> str:
        """The file of a part: model, ema or optimizer."""
        name = FILES_OF_1.get(part, part) if self.format == 1 else part
        return f"{name}.safetensors"


def digest(values: dict[str, Any]) -> str:
    """sha256 of JSON values, however they are laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def where(run: Storage, step: int) -> str:
    """What messages call a checkpoint."""
    return f"checkpoint {run.uri}/{RunPaths.checkpoint(step)}"


def saved_steps(run: Storage) -> list[int]:
    """Steps of the run's complete checkpoints, oldest first."""
    # By their indexes: a folder that is half written, or half removed, has none.
    indexes = [key for key in run.list(RunPaths.CHECKPOINTS) if key.endswith(f"/{INDEX}")]
    steps = (RunPaths.step(key) for key in indexes if key.count("/") == 1)  # none from deeper down
    return sorted(step for step in steps if step is not None)


def read_info(run: Storage, step: int) -> CheckpointInfo:
    """What the checkpoint after `step` holds, its weights unread.

    Raises:
        CheckpointError: another version of mambaflow wrote it, or it is damaged.
    """
    values = _read_values(run, step)
    try:
        config = from_dict(values["config"])
    # Not damaged: the seal has been verified, so that these are the words of another version.
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where(run, step)} has a configuration that this mambaflow does not know: {error}; "
            "use the version that wrote it"
        ) from error
    return CheckpointInfo(
        step=step,
        config=config,
        scores=values["scores"],
        files=values["files"],
        finished=values["finished"],
        format=values["format"],
        uri=f"{run.uri}/{RunPaths.checkpoint(step)}",
    )


def _read_values(run: Storage, step: int) -> dict[str, Any]:
    told = where(run, step)
    try:
        values = json.loads(run.read(f"{RunPaths.checkpoint(step)}/{INDEX}"))
        # The seal is of all else, and is taken out before it is compared.
        version, seal = values["format"], values.pop("sha256", None)
    except FileNotFoundError as error:
        raise CheckpointError(f"{told} is not there; there are steps {saved_steps(run)}") from error
    # No JSON, or no object with these fields.
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedCheckpointError(
            f"{told} has an unreadable {INDEX}: {error!r}; remove the folder to go back"
        ) from error
    # Before the seal: another version may seal otherwise, and should be named, not called damage.
    if version not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{told} has format {version}, this mambaflow reads 1 to {FORMAT}; "
            "use the version that wrote it"
        )
    if seal != digest(values) or values["step"] != step:  # a folder that was renamed, too
        raise DamagedCheckpointError(
            f"{told} has an {INDEX} that was not written so; remove the folder to go back"
        )
    return values


def require_fit(saved: dict[str, Tensor], module: nn.Module, told: str) -> None:
    """Refuse tensors of other names or shapes: the same configuration under changed code."""
    have = {key: list(value.shape) for key, value in saved.items()}
    want = {key: list(value.shape) for key, value in module.state_dict().items()}
    odd = sorted(key for key in have.keys() | want.keys() if have.get(key) != want.get(key))
    if odd:
        key = odd[0]
        raise CheckpointError(
            f"{told} does not fit this model in {len(odd)} tensors, first {key}: "
            f"{have.get(key)} saved, {want.get(key)} wanted; use the version that wrote it"
        )


def read_parts(
    run: Storage, info: CheckpointInfo, parts: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by part and name, every file verified before any is parsed.

    Raises:
        CheckpointError: a file that the checkpoint does not describe, or that is damaged.
    """
    folder = RunPaths.checkpoint(info.step)
    there = {key.removeprefix(f"{folder}/") for key in run.list(f"{folder}/")}
    # Refused, not passed over: nobody knows whether such a file belongs to what is restored. Hidden
    # ones do not count, as in local storage.
    strange = sorted(file for file in there - {INDEX, *info.files} if not file.startswith("."))
    if strange:
        raise CheckpointError(
            f"{where(run, info.step)} holds {strange}, which its {INDEX} does not describe; "
            "move them elsewhere"
        )
    # All are verified before the first is parsed.
    data = {part: _verified(run, info, info.file(part)) for part in parts}
    return {part: _renamed(parse(found), info.format) for part, found in data.items()}


def _renamed(tensors: dict[str, Tensor], version: int) -> dict[str, Tensor]:
    """Tensors of an earlier format by today's names."""
    if version == FORMAT:
        return tensors
    found = {}
    for name, tensor in tensors.items():
        for old, new in TENSORS_OF_1.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def _verified(run: Storage, info: CheckpointInfo, file: str) -> bytes:
    told = where(run, info.step)
    try:
        data = run.read(f"{RunPaths.checkpoint(info.step)}/{file}")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{told} lacks {file}; remove the folder to go back"
        ) from error
    # Read once: what is verified is what is parsed.
    found = hashlib.sha256(data).hexdigest()
    if found != info.files[file]:
        raise DamagedCheckpointError(
            f"{told}: {file} ({len(data)} bytes) has sha256 {found[:12]}…, {INDEX} says "
            f"{info.files[file][:12]}…; it is damaged, remove the folder to go back"
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
            # A checkpoint of a stop between two validations has no scores.
            value = read_info(run, step).scores.get(score, math.nan)
        # A damaged index costs one candidate, not the choice.
        except DamagedCheckpointError as error:
            log.warning("%s; passed over", error)
            continue
        if value > highest:  # never of nan
            best, highest = step, value
    return best


def read_best(run: str | Path, score: str = "val/psnr") -> CheckpointInfo:
    """What a run's best checkpoint holds, its weights unread.

    Args:
        run: the folder or s3:// address of the run, or of one of its checkpoints.
        score: what "best" means; every checkpoint carries its scores.

    Raises:
        CheckpointError: there is none, or it is of another version.
    """
    storage, step = _found(run)
    # An address may name the checkpoint itself.
    step = best_step(storage, score) if step is None else step
    if step is None:
        raise CheckpointError(f"{storage.uri} holds no complete checkpoint; train a run first")
    return read_info(storage, step)


def _found(address: str | Path) -> tuple[Storage, int | None]:
    """The run at an address, and the step of the checkpoint that it leads to, if it does."""
    # By the name alone, without a look: step_0000400 is a checkpoint's folder and nothing else.
    parent, _, name = at(address).uri.rpartition("/")
    step = RunPaths.step(name)
    return (at(address), None) if step is None else (at(parent), step)


def load_model(
    run: str | Path, *, score: str = "val/psnr", device: str = "cpu"
) -> tuple[VelocityField, CheckpointInfo]:
    """The averaged weights (EMA) of a run's best checkpoint, ready to sample; see `read_best`."""
    storage, info = _found(run)[0], read_best(run, score)
    # The caller's generator stays where it was.
    with torch.random.fork_rng(devices=[]):  # its first weights, replaced at once
        model = VelocityField(info.config.model)
    ema = read_parts(storage, info, ("ema",))["ema"]
    require_fit(ema, model, f"{where(storage, info.step)}: ema")
    model.load_state_dict(ema)
    return model.to(device).eval().requires_grad_(False), info  # on CPU until it is whole
