"""A folder is of one kind and of one run: what another job has made its own is refused by name."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import small

from jobs.train import main
from mambaflow.config import to_json
from mambaflow.data.claim import stake_claim
from mambaflow.data.sources import open_source
from mambaflow.data.split_plan import plan
from mambaflow.data.stage_config import StageConfig
from mambaflow.evaluation.rows import Results
from mambaflow.run_paths import FIRST_OF
from mambaflow.search.config import SearchConfig, SweepConfig
from mambaflow.search.config import to_json as sweep_json
from mambaflow.search.opening import open_sweep
from mambaflow.search.sweep_paths import SweepPaths
from mambaflow.storage import at

KINDS = {name: kind for kind, name in FIRST_OF.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("data"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def train(data: Path, folder: Path) -> None:
    flags = [f"--data={data}", f"--storage={folder.parent}", f"--run-name={folder.name}"]
    if main([*small.FLAGS, "--max-steps=1", *flags]):
        raise ValueError


def sweep(data: Path, folder: Path, **changes: object) -> SweepConfig:
    run = replace(small.run_config(data, folder.parent, folder.name), **changes)
    return SweepConfig(search=SearchConfig(), run=replace(run, scale=replace(run.scale, ray=True)))


def stage(data: Path, folder: Path) -> None:
    source = open_source(str(data.parent / "images"))
    config = StageConfig(source=source.address, out=str(folder), size=small.SIZE, validation=8)
    stake_claim(str(folder), plan(config, source))


JOBS = {
    "config.json": train,
    "sweep.json": lambda data, folder: open_sweep(sweep(data, folder)),
    "manifest.json": lambda data, folder: Results(at(folder)).claim({"format": 1}),
    "claim.json": stage,
}


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(JOBS, 2)))
def test_a_folder_of_another_kind_is_refused_and_left_alone(data, tmp_path, capsys, ours, theirs):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / theirs).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(ValueError) as refused:
        JOBS[ours](data, tmp_path / "x")
    said = str(refused.value) + capsys.readouterr().err
    assert f"holds {KINDS[theirs]} ({tmp_path}/x/{theirs}); " in said
    assert tree(tmp_path) == before


def test_a_run_is_not_kept_among_the_trials_of_a_sweep(data, tmp_path, capsys):
    """Where the configuration of a trial says that it is kept."""
    asked = sweep(data, tmp_path / "s")
    open_sweep(asked)
    trial = replace(asked.run, storage=SweepPaths.of(asked.run).trials, run_name="0000")
    (tmp_path / "trial.json").write_text(to_json(replace(trial, data_hash="")))
    before = tree(tmp_path)
    new = [f"--config={tmp_path}/trial.json", "--no-ray", "--run-name=again"]
    assert main(new) == 2
    assert "is where a sweep keeps its trials; give another --storage" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_trial_of_a_sweep_that_was_copied_goes_on_in_the_copy(data, tmp_path):
    pytest.importorskip("ray")
    from mambaflow.distributed.trial_actor import TrialActor

    def opened(folder: Path, **train: object):
        run = small.run_config(data, folder / "trials", "0000", **train)
        (actor := object.__new__(TrialActor))._run, actor._search = run, SearchConfig()
        return actor._opened()

    opened(tmp_path / "s")
    first = tree(tmp_path / "s")
    copy = tmp_path / "copy" / "trials" / "0000" / "config.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(first[f"{tmp_path}/s/trials/0000/config.json"])
    run = opened(tmp_path / "copy")
    assert run.resume and run.storage == str(tmp_path / "copy/trials")
    assert tree(tmp_path / "s") == first, "the original is another process's"
    assert json.loads(copy.read_text())["storage"] == str(tmp_path / "copy/trials")
    with pytest.raises(ValueError, match=r"train.lr: 0.002 -> 0.5"):
        opened(tmp_path / "copy", lr=0.5)


def test_a_sweeps_own_resume_is_no_other_kind(data, tmp_path):
    asked = sweep(data, tmp_path / "s")
    open_sweep(asked)
    open_sweep(replace(asked, run=replace(asked.run, resume=True)))
    assert (tmp_path / "s/sweep.json").read_text() != sweep_json(asked)
