"""A run goes on with its data wherever they are, and with no others; its captions say which."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import small

from jobs.train import main
from mambaflow.config import from_json, to_json
from mambaflow.data.shard_reader import data_hash
from mambaflow.data.shards import MANIFEST
from mambaflow.evaluation.cells import EvaluateConfig
from mambaflow.evaluation.plan import plan
from mambaflow.models.weights import read_best
from mambaflow.run_paths import RunPaths
from mambaflow.search.config import SearchConfig, SweepConfig
from mambaflow.search.opening import open_sweep, read_sweep
from mambaflow.search.sweep_paths import SweepPaths
from mambaflow.storage import at
from mambaflow.training import run as run_module
from mambaflow.training.preflight import identified

QUICK = [*small.FLAGS, "--max-steps=2"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Data, and runs/r, of two steps."""
    root = tmp_path_factory.mktemp("begun")
    small.staged(root)
    assert main([*QUICK, f"--data={root}/shards", f"--storage={root}/runs", "--run-name=r"]) == 0
    return root


@pytest.fixture
def root(begun, tmp_path) -> Path:
    """A copy, whose run was begun on data in it."""
    shutil.copytree(begun, tmp_path / "d")
    config = tmp_path / "d/runs/r/config.json"
    config.write_text(config.read_text().replace(str(begun), str(tmp_path / "d")))
    return tmp_path / "d"


def go_on(root: Path, data: object, *more: str) -> int:
    flags = [*QUICK, "--max-steps=3", f"--data={data}", f"--storage={root}/runs", "--run-name=r"]
    return main([*flags, "--resume", *more])


def config_of(root: Path):
    return from_json((root / "runs/r/config.json").read_bytes())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def restaged(root: Path, **changes) -> None:
    """Other data at the same address."""
    other = small.staged(root / "new", **changes)
    shutil.rmtree(root / "shards")
    other.rename(root / "shards")


def test_a_run_its_checkpoints_and_its_report_hold_the_hash(begun):
    found = data_hash(str(begun / "shards"))
    assert config_of(begun).data_hash == found
    assert read_best(str(begun / "runs/r")).config.data_hash == found
    folder = at(begun / "runs/r")
    assert f"data hash {found}" in folder.read(RunPaths.TABLE).decode()
    assert json.loads(folder.read(RunPaths.RESULTS))["data hash"] == found


OTHERS = {
    "masks of another seed": ({"mask_seed": 7}, "train: "),
    "fewer training images": ({"limit": 16}, "train: "),
    "another share": ({"known_ratio": 0.1}, "train: "),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_data_at_the_address_of_a_run_are_refused_by_name(root, capsys, case):
    changes, said = OTHERS[case]
    was = config_of(root).data_hash
    restaged(root, **changes)
    before = tree(root)
    assert go_on(root, root / "shards") == 2
    err = capsys.readouterr().err
    assert f"run_name (='r') was begun on other data ({was}, then at {root}/shards)" in err
    assert said in err and "give --data with the address of those, or another --run-name" in err
    assert tree(root) == before


def test_another_test_split_alone_is_refused(root, tmp_path, capsys):
    other = small.staged(tmp_path / "other", mask_seed=7)
    shutil.rmtree(root / "shards/test")
    shutil.copytree(other / "test", root / "shards/test")
    before = tree(root)
    assert go_on(root, root / "shards") == 2
    err = capsys.readouterr().err
    assert "was begun on other data" in err and "(test: " in err
    assert tree(root) == before


def test_the_same_data_elsewhere_go_on(root, tmp_path):
    (root / "shards").rename(tmp_path / "moved")
    assert go_on(root, tmp_path / "moved") == 0
    assert config_of(root).data == str(tmp_path / "moved")
    again = small.staged(tmp_path / "again", rows_per_shard=5)  # from a folder of another address
    assert go_on(root, again, "--max-steps=4") == 0


def test_a_job_that_is_sent_again_with_its_folder_goes_on(root, tmp_path, monkeypatch):
    """As Ray has it: each edit of the checkout is another copy of it, in another folder."""
    for name in ("copy1", "copy2"):
        shutil.copytree(root / "shards", tmp_path / name / "data/shards")
    for name, steps in (("copy1", 3), ("copy2", 4)):
        monkeypatch.chdir(tmp_path / name)
        assert go_on(root, "data/shards", f"--max-steps={steps}") == 0


@pytest.mark.s3
def test_data_that_were_moved_to_a_bucket_go_on(root, bucket):
    far = at(f"{bucket}/data")
    for path in (root / "shards").rglob("*"):
        if path.is_file():
            far.write(path.relative_to(root / "shards").as_posix(), path.read_bytes())
    shutil.rmtree(root / "shards")
    assert go_on(root, far.uri) == 0


def forget(root: Path) -> None:
    """The run as an earlier version wrote it."""
    path = root / "runs/r/config.json"
    values = json.loads(path.read_text())
    del values["data_hash"]
    path.write_text(json.dumps(values))


def test_a_run_of_an_earlier_version_goes_on_where_its_data_were_and_then_anywhere(
    root, tmp_path, capsys
):
    forget(root)
    shutil.copytree(root / "shards", tmp_path / "moved")
    before = tree(root)
    assert go_on(root, tmp_path / "moved") == 2
    said = f"which knew data by their address (data: {root}/shards -> {tmp_path}/moved)"
    assert said in capsys.readouterr().err and tree(root) == before
    assert go_on(root, root / "shards") == 0
    assert config_of(root).data_hash == data_hash(str(root / "shards"))
    assert go_on(root, tmp_path / "moved", "--max-steps=4") == 0


def test_data_of_an_earlier_version_are_the_same_data(root):
    for path in (root / "shards").glob(f"*/{MANIFEST}"):
        about = json.loads(path.read_text())
        del about["contents"], about["data"]
        path.write_text(json.dumps(about))
    assert go_on(root, root / "shards") == 0


def test_a_configuration_brings_its_data_or_says_that_they_are_others(root, tmp_path, capsys):
    new = [f"--config={root}/runs/r/config.json", f"--storage={root}/runs", "--no-ray"]
    assert main([*new, "--run-name=same"]) == 0
    restaged(root, mask_seed=7)
    before = tree(root)
    assert main([*new, "--run-name=other"]) == 2
    err = capsys.readouterr().err
    assert f"other data than data (={root}/shards) holds now (train: " in err
    assert tree(root) == before
    assert main([*new, "--run-name=meant", f"--data={root}/shards"]) == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_data_that_change_while_a_run_trains_end_it(root, tmp_path, capsys, monkeypatch, split):
    other = small.staged(tmp_path / "other", mask_seed=7)
    name = {"train": "train", "test": "score_test"}[split]
    real = getattr(run_module, name)

    def late(*arguments):
        shutil.rmtree(root / "shards" / split)
        shutil.copytree(other / split, root / "shards" / split)
        return real(*arguments)

    monkeypatch.setattr(run_module, name, late)
    assert go_on(root, root / "shards") == 3
    err = capsys.readouterr().err
    assert f"hold others here and now than the run was begun on ({split}: " in err


def test_checkpoints_that_lost_their_configuration_are_not_trained_on_with_other_data(root, capsys):
    (root / "runs/r/config.json").unlink()
    restaged(root, mask_seed=7)
    flags = [*QUICK, "--max-steps=3", f"--data={root}/shards", f"--storage={root}/runs"]
    assert main([*flags, "--run-name=r"]) == 3
    err = capsys.readouterr().err
    assert "is of other data than data" in err and "step_0000002" in err and "(train: " in err


def test_checkpoints_that_lost_their_configuration_are_not_taken_for_another_trainings(
    root, capsys
):
    (root / "runs/r/config.json").unlink()
    flags = [*QUICK, "--max-steps=3", f"--data={root}/shards", f"--storage={root}/runs"]
    assert main([*flags, "--run-name=r", "--lr=1e-3", "--seed=5"]) == 3
    err = capsys.readouterr().err
    assert (
        "step_0000002 is of another training (train.lr: 0.002 -> 0.001; train.seed: 0 -> 5" in err
    )


def results(root: Path) -> dict:
    return json.loads((root / "runs/r/report/results.json").read_bytes())


def test_a_report_is_made_again_where_more_is_asked_of_it(root, capsys):
    assert results(root)["images"] == 4
    assert go_on(root, root / "shards", "--max-steps=2", "--test-images=7") == 0
    assert results(root)["images"] == 7 and "images 7" in capsys.readouterr().out


def test_the_report_of_a_run_that_was_there_before_is_not_taken_for_this_ones(root, capsys):
    before = results(root)
    for name in ("config.json", "metrics.jsonl", "step_0000002"):
        path = root / "runs/r" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = [*QUICK, f"--data={root}/shards", f"--storage={root}/runs", "--run-name=r"]
    assert main([*flags, "--seed=5"]) == 0
    assert results(root)["seed"] == 5 and results(root)["rows"] != before["rows"]


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", None])
def test_a_report_that_is_damaged_is_made_again(root, text):
    before = results(root)
    if text is None:
        (root / "runs/r/report/table.md").unlink()
    else:
        (root / "runs/r/report/results.json").write_bytes(text)
    assert go_on(root, root / "shards", "--max-steps=2") == 0
    again = results(root)
    for found in (before, again):
        for row in found["rows"].values():
            row.pop("seconds", None)
    assert again["rows"] == before["rows"]


# Weights to begin from


@pytest.fixture
def descended(root) -> Path:
    """Also runs/next, two steps from the weights of runs/r."""
    assert begin(root, f"--init-from={root}/runs/r") == 0
    return root


def begin(root: Path, *more: str) -> int:
    flags = [*QUICK, f"--data={root}/shards", f"--storage={root}/runs", "--run-name=next"]
    return main([*flags, *more])


def test_weights_that_were_moved_are_the_same_weights(descended):
    (descended / "runs/r").rename(descended / "moved")
    assert begin(descended, "--resume", "--max-steps=3", f"--init-from={descended}/moved") == 0


def train_anew(root: Path) -> None:
    """Other weights at the address of runs/r."""
    shutil.rmtree(root / "runs/r")
    flags = [*QUICK, f"--data={root}/shards", f"--storage={root}/runs", "--run-name=r"]
    assert main([*flags, "--seed=5"]) == 0


def test_other_weights_at_the_address_are_not_begun_from(descended, capsys):
    train_anew(descended)
    # Before its first checkpoint a run would go on from them.
    for folder in (descended / "runs/next").glob("step_*"):
        shutil.rmtree(folder)
    assert begin(descended, "--resume", f"--init-from={descended}/runs/r") == 3
    assert "holds other weights now than the run was begun from" in capsys.readouterr().err


def test_a_configuration_brings_its_weights_or_says_that_they_are_others(descended, capsys):
    again = [f"--config={descended}/runs/next/config.json", "--run-name=again"]
    assert main(again) == 0
    train_anew(descended)
    again = [again[0], "--run-name=third"]
    assert main(again) == 2
    assert "config is of a run that began from other weights" in capsys.readouterr().err
    assert main([*again, f"--init-from={descended}/runs/r"]) == 0


# A sweep, and an evaluation


@pytest.fixture
def sweep(root) -> SweepConfig:
    run = replace(config_of(root), run_name="s", storage=str(root / "runs"))
    ray = replace(run.scale, ray=True)
    return SweepConfig(search=SearchConfig(), run=replace(run, scale=ray))


def test_a_sweep_goes_on_with_its_data_and_no_others(root, tmp_path, sweep):
    open_sweep(sweep)
    (root / "shards").rename(tmp_path / "moved")
    run = replace(sweep.run, resume=True, data=str(tmp_path / "moved"), data_hash="")
    open_sweep(replace(sweep, run=identified(run)))
    assert read_sweep(SweepPaths.of(run)).run.data == str(tmp_path / "moved")
    other = small.staged(tmp_path / "other", mask_seed=7)
    run = identified(replace(run, data=str(other)))
    with pytest.raises(ValueError, match="was begun on other data"):
        open_sweep(replace(sweep, run=run))


def test_a_sweep_of_an_earlier_version_knows_data_by_their_address(root, sweep):
    old = replace(sweep, run=replace(sweep.run, data_hash=""))
    open_sweep(old)
    with pytest.raises(ValueError, match="which knew data by their address"):
        open_sweep(replace(old, run=replace(sweep.run, resume=True, data=str(root / "x"))))
    open_sweep(replace(old, run=replace(sweep.run, resume=True)))
    assert read_sweep(SweepPaths.of(old.run)).run.data_hash == sweep.run.data_hash


def test_an_evaluation_depends_on_what_data_and_truth_hold_and_not_on_where(root, tmp_path):
    def fingerprint(**changes):
        asked = {"checkpoint": (f"a={root}/runs/r",), "data": str(root / "shards"),
                 "out": str(tmp_path / "out"), "lpips": "none", "samplers": ("mean",),
                 "fills": (), "limit": 2, **changes}  # fmt: skip
        return plan(EvaluateConfig(**asked)).job.fingerprint

    was = fingerprint()
    moved = small.staged(tmp_path / "again", rows_per_shard=5)
    assert fingerprint(data=str(moved)) == was
    assert was["data"]["hash"] == data_hash(str(root / "shards")).split("-")[2]
    half = small.staged(tmp_path / "half", size=6, reduce=2)
    truths = [fingerprint(data=str(half), truth=str(t), resolutions=(12,)) for t in (
        root / "shards", moved, small.staged(tmp_path / "masks", mask_seed=7))]  # fmt: skip
    assert truths[0] == truths[1]
    assert truths[0]["truth"] != truths[2]["truth"], "its known pixels are others"


def test_a_configuration_survives_being_written_with_its_hash(begun):
    assert from_json(to_json(config_of(begun))) == config_of(begun)
