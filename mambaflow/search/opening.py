"""The rules of names of a sweep: a new one, or one that goes on as it was begun."""

from dataclasses import replace

from mambaflow.checks import require
from mambaflow.config import differences
from mambaflow.run_paths import require_free
from mambaflow.search.config import SweepConfig, from_json, to_json
from mambaflow.search.sweep_paths import SweepPaths
from mambaflow.training.preflight import require_same_data

# What may change when a sweep goes on: how much is tried and how fast, not what a trial is.
MAY_CHANGE = ("num_samples", "max_concurrent", "max_hours", "max_early_failures")


def check_sweep(config: SweepConfig) -> None:
    """Refuse a sweep by its flags and its name; nothing is written.

    Raises:
        ValueError: naming the flag, the rule and the cure.
    """
    run, paths = config.run, SweepPaths.of(config.run)
    require(run.scale.ray, "ray (=False): a sweep runs on Ray Tune; leave --no-ray out")
    require(
        not run.scale.min_workers,
        f"min_workers (={run.scale.min_workers}) must be 0 in a sweep: trials of different sizes "
        "do not compare; leave it out",
    )
    what = f"run_name (={run.run_name!r}) in {run.storage}"
    require_free(paths.folder, SweepPaths.CONFIG, what, "use another --run-name")
    taken = paths.folder.exists(SweepPaths.CONFIG)
    require(
        run.resume or not taken,
        f"run_name (={run.run_name!r}) is taken by a sweep in {run.storage}; use --resume to go "
        "on, or another --run-name",
    )
    require(
        taken or not run.resume,
        f"run_name (={run.run_name!r}) has no sweep to resume in {run.storage}; leave --resume "
        "out, or name one that is there",
    )
    if taken:
        _require_same(config, read_sweep(paths))


def open_sweep(config: SweepConfig) -> None:
    """Write down what is asked for, of a new sweep or of one that goes on.

    Raises:
        ValueError: another process has taken the name.
    """
    # Checked again: data were staged meanwhile, and embedded ones have their address now.
    check_sweep(config)
    folder, text = SweepPaths.of(config.run).folder, to_json(config).encode()
    if config.run.resume:
        folder.write(SweepPaths.CONFIG, text)
        return
    require(
        folder.create(SweepPaths.CONFIG, text),
        f"run_name (={config.run.run_name!r}) was taken by another sweep; use another --run-name",
    )


def read_sweep(paths: SweepPaths) -> SweepConfig:
    """What a sweep was asked for.

    Raises:
        ValueError: there is none, or another version wrote it.
    """
    where = f"{paths.folder.uri}/{SweepPaths.CONFIG}"
    try:
        return from_json(paths.folder.read(SweepPaths.CONFIG))
    except FileNotFoundError as error:
        raise ValueError(
            f"{where} is not there: no sweep was begun here; give its --run-name and --storage"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is not of this version of mambaflow: {error}; use the version that wrote it"
        ) from error


def _require_same(config: SweepConfig, before: SweepConfig) -> None:
    changed = [
        line for line in differences(before.search, config.search)
        if line.split(":")[0] not in MAY_CHANGE
    ]  # fmt: skip
    # The command differs by --resume; data are told by what they hold.
    theirs = before.run
    # So are weights; those of an earlier version's sweep by their address.
    known = theirs.init_hash and config.run.init_hash
    same = known and theirs.init_hash == config.run.init_hash
    ours = replace(
        config.run,
        command=theirs.command,
        resume=theirs.resume,
        take_over=theirs.take_over,
        data=theirs.data,
        data_hash=theirs.data_hash,
        init_from=theirs.init_from if same else config.run.init_from,
        init_hash=config.run.init_hash if known else theirs.init_hash,
    )
    changed += differences(theirs, ours)
    require(
        not changed,
        f"run_name (={config.run.run_name!r}) cannot resume with another configuration "
        f"({'; '.join(changed)}); give the same flags, or another --run-name",
    )
    require_same_data(config.run, theirs)
