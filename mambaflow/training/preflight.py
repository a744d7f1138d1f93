"""What a run is refused for before anything is written: names, data, weights, storage."""

import logging
import time
from dataclasses import replace

import numpy as np
import torch

from mambaflow.checks import require
from mambaflow.config import RunConfig, ScaleConfig, differences, from_json, to_json
from mambaflow.data.batches import Batches, Layout, require_queries
from mambaflow.data.shard_reader import ShardSet, data_hash, other_splits
from mambaflow.data.shards import ShardError, ShardSpec
from mambaflow.data.sources import EMBEDDED
from mambaflow.data.stage_config import StageConfig
from mambaflow.models.weights import read_best, saved_steps
from mambaflow.run_paths import FIRST_OF, RunPaths, require_free
from mambaflow.storage import at
from mambaflow.storage_base import Storage

# What may change when a run goes on: how long, how often it is looked at, not what it learns.
# With other epochs the learning rate goes on along the other cosine from the step it is at: a
# finished run with more epochs starts again at a higher rate, and ends where no straight run does.
MAY_CHANGE = (
    "epochs", "max_steps", "log_every", "eval_every", "eval_images", "test_images", "sample_steps",
)  # fmt: skip
log = logging.getLogger(__name__)


def total_steps(config: RunConfig, rows: int) -> int:
    """Steps of the whole run, at least one."""
    steps = config.train.epochs * rows // config.train.batch_size or 1
    return min(steps, config.train.max_steps or steps)


def settings_of(address: str) -> RunConfig:
    """A new run with the settings of a configuration that `to_json` wrote: what is another run's
    own, its name, `resume` and its command, is left out.

    Args:
        address: of the file, a path or s3://…; a run's config.json is one.

    Raises:
        ValueError: there is no such file, or it holds no configuration that is understood.
    """
    try:
        folder, _, name = at(address).uri.rpartition("/")
        found = from_json(at(folder or "/").read(name))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"config (={address!r}) must be a configuration that can be read: {error}; "
            "name a run's config.json"
        ) from error
    return replace(found, run_name="", resume=False, command="")


def settle(config: RunConfig, command: str) -> RunConfig:
    """The same run with a name, absolute addresses, and the one checkpoint that it starts from, so
    that it means the same to every worker and tomorrow; nothing is written.

    Raises:
        ValueError: an address that is none, or weights that do not fit.
    """
    # The clock is read once, here: workers that read it themselves would train under several names.
    name = config.run_name or f"{config.arch}-{time.strftime('%Y%m%d-%H%M%S')}"
    # An embedded data set keeps its name until it is staged, and gets its address then.
    data = config.data if config.data in EMBEDDED else at(config.data).uri
    # A relative path is another place for a worker of Ray, which runs in a folder of its own.
    settled = replace(
        config, run_name=name, storage=at(config.storage).uri, data=data, command=command
    )
    return _resolve_init_from(settled)


def check_launch(scale: ScaleConfig, launched: int) -> None:
    """Refuse workers and devices that are not there for a run without Ray.

    Args:
        launched: processes that torchrun started.

    Raises:
        ValueError: naming the flag, the rule and the cure.
    """
    # torchrun has started the processes already: the flag can only agree with it.
    require(
        scale.ray or scale.num_workers == launched,
        f"num_workers (={scale.num_workers}) without Ray must be the number of processes "
        f"(={launched}); start them with torchrun --nproc-per-node {scale.num_workers}",
    )
    # On Ray the GPUs are those of the workers' nodes: the driver's may have none.
    require(
        scale.ray or not scale.use_gpu or torch.cuda.is_available(),
        "use_gpu (=True) needs a CUDA device, and torch sees none here; use --no-use-gpu",
    )


def check_flags(config: RunConfig) -> None:
    """Refuse what can be refused before data are staged, names apart: sizes of embedded data.

    Raises:
        ValueError: naming the flag, the rule and the cure.
    """
    require(
        config.resume or not config.take_over,
        "take_over (=True) takes a run that is there: use it with --resume, or leave it out",
    )
    _require_no_trials(config)
    if config.data in EMBEDDED:
        # It is not staged yet, and its sizes are known: they are the defaults.
        planned = StageConfig(source=config.data)
        require_queries(Layout(planned.size, planned.known, planned.target), config.train)


def _require_no_trials(config: RunConfig) -> None:
    # A configuration of a trial brings it, and the sweep would take the run for one of its own.
    sweep = at(config.storage).uri.rpartition("/")[0]
    require(
        sweep.endswith(":/") or not at(sweep or "/").exists(FIRST_OF["a sweep"]),
        f"storage (={config.storage}) is where a sweep keeps its trials; give another --storage",
    )


def check_storage(config: RunConfig) -> None:
    """Refuse a run's folder that this worker's node does not share with the driver's.

    Raises:
        ValueError: the run's configuration is not there.
    """
    require(
        # `open_run` put it there before any worker started.
        RunPaths.of(config).folder.exists(RunPaths.CONFIG),
        f"storage (={config.storage}) must be seen by every node; use a shared folder or s3://…",
    )


def identified(config: RunConfig) -> RunConfig:
    """The run with the hash of its data, which are there.

    Raises:
        ValueError: a damaged split; or the run has the settings of another one, whose data were
            others.
    """
    found = data_hash(config.data)
    changed = other_splits(config.data_hash, found) if config.data_hash else ""
    require(
        not changed,
        f"config is of a run on other data than data (={config.data}) holds now ({changed}); give "
        "--data, with the address of those that are meant",
    )
    return replace(config, data_hash=found)


def check_same_data(config: RunConfig) -> None:
    """Refuse data that are not what the run was begun on: staged anew meanwhile, or of a node whose
    folder of that name is another.

    Raises:
        ShardError: naming the splits.
    """
    # What the manifests say: shards are verified against them as they are read. Those of earlier
    # versions say nothing, and were read once, by `identified`.
    found = data_hash(config.data, read=False)
    changed = other_splits(config.data_hash, found) if config.data_hash and found else ""
    if changed:
        raise ShardError(
            f"data (={config.data}) hold others here and now than the run was begun on "
            f"({changed}); put those back, or give every node the same"
        )


def check_data(config: RunConfig) -> None:
    """Refuse data that the run could not use, before a worker starts.

    Reads the manifests, the first training shard and the held-out images. A damaged later shard
    is found by the worker that first needs it.

    Raises:
        ValueError: a split is missing, damaged, or does not fit the others or the configuration.
    """
    train = ShardSet(config.data, "train")
    Batches(train, Layout.of(train.spec, config.model), config.train)  # made for what it refuses
    require(
        config.train.masks == "strict" or train.spec.full_images,
        f"masks (={config.train.masks!r}) needs whole training images, and {config.data} holds "
        "only the staged pixels; stage again with --full-images, or use --masks strict",
    )
    train.rows(np.arange(1))  # reading a row verifies its shard
    _check_held_out(config, train, "validation")
    # Looked into for damage, not scored: a run should not find out at its end.
    if config.train.test_images:
        _check_held_out(config, train, "test")


def _check_held_out(config: RunConfig, train: ShardSet, split: str) -> None:
    spec, held_out = train.spec, ShardSet(config.data, split)
    other = held_out.spec
    require(
        len(held_out) > 0
        and (other.size, other.known, other.reduce) == (spec.size, spec.known, spec.reduce),
        f"data (={config.data}) must hold {split} images, staged as the training ones "
        f"({spec.known} known pixels of {spec.size} x {spec.size}{_reduction(spec)}), and holds "
        f"{len(held_out)} ({other.known} of {other.size} x {other.size}{_reduction(other)}); "
        "stage it again",
    )
    # What will be scored is drawn from all, whose shards are read and verified once now.
    held_out.rows(np.arange(len(held_out)), pixels=False, images=False)


def _reduction(spec: ShardSpec) -> str:
    return f", reduced {spec.reduce} times" if spec.reduce > 1 else ""


def _resolve_init_from(config: RunConfig) -> RunConfig:
    """The same run with the one checkpoint that it starts from, where it starts from another run:
    that one may train on, and its best weights be others tomorrow.

    Raises:
        ValueError: the weights are not there, or are of another model: its fields are named.
    """
    if not config.init_from:
        return config
    source, run = RunPaths.at(config.init_from), RunPaths.of(config)
    # A run that goes on keeps the checkpoint that it once began from, while the flag names its run.
    if config.resume and run.folder.exists(RunPaths.CONFIG):
        before = _config_of(run.folder)
        if before.init_from.startswith(f"{source.folder.uri}/"):
            return replace(config, init_from=before.init_from, init_hash=before.init_hash)
    info = read_best(config.init_from)
    other = list(differences(info.config.model, config.model, "model."))
    # Compared by configuration, no tensor read: fields by name tell more than shapes do.
    require(
        not other,
        f"init_from (={config.init_from}) is of another model ({'; '.join(other)}); give the "
        "flags of that model, or leave --init-from out",
    )
    found = info.files[info.file("ema")]
    require(
        config.init_hash in ("", found),
        f"config is of a run that began from other weights than init_from (={config.init_from}) "
        f"holds now ({config.init_hash[:12]} -> {found[:12]}); give --init-from, with the address "
        "of those that are meant",
    )
    return replace(config, init_from=info.uri, init_hash=found)


def open_run(config: RunConfig) -> Storage:
    """The run's folder after the rules of names: a new name, or --resume of the same run.

    Raises:
        ValueError: the name is taken and resume is off; or resume is on and the run is missing,
            was another model or other training, or is already longer.
    """
    run, text = RunPaths.of(config).folder, to_json(config).encode()
    check_opening(config)
    if not config.resume:
        # Of two that looked at once, one creates it.
        require(run.create(RunPaths.CONFIG, text), _taken(config, run))
        return run
    _warn_of_another_cosine(config, _config_of(run))
    # What stopped the run before must not stop it again. It is removed once nothing refuses the
    # resume any more: bad input changes nothing.
    run.delete(RunPaths.STOP)
    run.write(RunPaths.CONFIG, text)
    return run


def check_opening(config: RunConfig) -> None:
    """Refuse what `open_run` would, and write nothing.

    Raises:
        ValueError: as `open_run`.
    """
    check_name(config)
    if config.resume:
        _require_not_longer(config, RunPaths.of(config).folder)


def check_name(config: RunConfig) -> None:
    """Refuse a name that is taken, or with resume one that is not, or that is of another run.

    Raises:
        ValueError: naming the rule and the cure.
    """
    # Asked twice: before data are staged, so that a taken name leaves nothing behind, and again as
    # the run is opened, since another may have taken it meanwhile.
    run = RunPaths.of(config).folder
    what = f"run_name (={config.run_name!r}) in {config.storage}"
    require_free(run, RunPaths.CONFIG, what, "use another --run-name")
    taken = run.exists(RunPaths.CONFIG)
    require(config.resume or not taken, _taken(config, run))
    require(
        taken or not config.resume,
        f"run_name (={config.run_name!r}) has nothing to resume in {config.storage}; "
        "leave --resume out, or name a run that is there",
    )
    if config.resume:
        require_same_run(config, _config_of(run))


def _taken(config: RunConfig, run: Storage) -> str:
    how = "finished" if run.exists(RunPaths.RESULTS) else "begun"
    return (
        f"run_name (={config.run_name!r}) is taken by a {how} run in {config.storage}; "
        "use --resume to go on, or another --run-name"
    )


def _config_of(run: Storage) -> RunConfig:
    try:
        return from_json(run.read(RunPaths.CONFIG))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{run.uri}/{RunPaths.CONFIG} is not of this version of mambaflow: {error}; "
            "resume with the version that wrote it"
        ) from error


def require_same_run(config: RunConfig, before: RunConfig) -> None:
    """Refuse to go on with another model, other training or other data.

    Raises:
        ValueError: naming what is different.
    """
    # All differences in one message, so that flags are mended at one go.
    changed = [*differences(before.model, config.model, "model."), *other_training(config, before)]
    require(
        not changed,
        f"run_name (={config.run_name!r}) cannot resume with another configuration "
        f"({'; '.join(changed)}); give the same flags, or another --run-name",
    )
    require_same_data(config, before)


def other_training(config: RunConfig, before: RunConfig) -> list[str]:
    """Each difference in what a run learns, its data and its model apart."""
    changed = [
        line
        for line in differences(before.train, config.train, "train.")
        if line.split(":")[0].removeprefix("train.") not in MAY_CHANGE  # "train.lr: 0.1 -> 1"
    ]
    # Weights are known by what they are; those of an earlier version's run by their address.
    known = before.init_hash and config.init_hash
    same = before.init_hash == config.init_hash if known else before.init_from == config.init_from
    return changed if same else [*changed, f"init_from: {before.init_from} -> {config.init_from}"]


def require_same_data(config: RunConfig, before: RunConfig) -> None:
    """Refuse to go on with other data, whatever their address.

    Raises:
        ValueError: naming which data they were, and which they are.
    """
    what = f"run_name (={config.run_name!r})"
    if before.data_hash and config.data_hash:
        changed = other_splits(before.data_hash, config.data_hash)
        require(
            not changed,
            f"{what} was begun on other data ({before.data_hash}, then at {before.data}) than "
            f"data (={config.data}) holds ({changed}); give --data with the address of those, or "
            "another --run-name",
        )
    # A run of an earlier version. Embedded data have their address once they are staged; those
    # that were not looked at are asked about again when they are.
    elif not before.data_hash and config.data not in EMBEDDED:
        require(
            before.data == config.data,
            f"{what} is of an earlier version, which knew data by their address (data: "
            f"{before.data} -> {config.data}); give --data {before.data}, once: what they hold is "
            "written down then, and they may be moved",
        )


def _require_not_longer(config: RunConfig, run: Storage) -> None:
    rows, batch_size = len(ShardSet(config.data, "train")), config.train.batch_size
    steps, newest = total_steps(config, rows), max(saved_steps(run), default=0)
    # The cure is rounded up: the fewest epochs that hold the newest checkpoint's step.
    name, value, cure = "epochs", config.train.epochs, -(-newest * batch_size // rows)
    if steps == config.train.max_steps:
        name, value, cure = "max_steps", steps, newest
    require(
        newest <= steps,
        f"{name} (={value}) end at step {steps}, and run_name "
        f"(={config.run_name!r}) is already at step {newest}; "
        f"use --{name.replace('_', '-')} {cure} or more",
    )


def _warn_of_another_cosine(config: RunConfig, before: RunConfig) -> None:
    for name in ("epochs", "max_steps"):
        old, new = getattr(before.train, name), getattr(config.train, name)
        if old != new:
            text = "%s: %d -> %d; the learning rate goes on along the other cosine"
            log.warning(text, name, old, new)
