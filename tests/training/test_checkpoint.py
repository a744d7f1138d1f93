"""A checkpoint is whole or is none, comes back bitwise, and says what is wrong with it."""

import hashlib
import json
import logging
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from small import CPU, FIT, MODEL, run_config
from test_loop import Stream

from mambaflow.config import RunConfig, to_dict, to_json
from mambaflow.local_storage import LocalStorage
from mambaflow.models import weights
from mambaflow.models.weights import (
    INDEX,
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpointError,
)
from mambaflow.run_paths import RunPaths
from mambaflow.storage import at
from mambaflow.training import checkpoint
from mambaflow.training.checkpoint import PARTS
from mambaflow.training.loop import TrainState, fit

RUN = run_config(Path("data"), Path("runs"), "x")
FILES = (*(f"{part}.safetensors" for part in PARTS), INDEX)


def trained(steps: int, run: RunConfig = RUN) -> TrainState:
    state = TrainState(run.model, run.train, CPU)
    for _ in fit(state, Stream(), run.train, 100):
        if state.step == steps:
            break
    return state


def index(step: int, **scores: float) -> CheckpointInfo:
    return CheckpointInfo(step=step, config=RUN, scores={f"val/{k}": v for k, v in scores.items()})


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Every number that the next step depends on."""
    moments = state.optimizer.state_dict()["state"].items()
    return {
        **{f"model.{k}": v for k, v in state.model.state_dict().items()},
        **{f"ema.{k}": v for k, v in state.ema.state_dict().items()},
        **{f"optimizer.{i}.{k}": v for i, of in moments for k, v in of.items()},
        "step": torch.tensor(state.step),
    }


def assert_same(a: TrainState, b: TrainState) -> None:
    one, other = everything(a), everything(b)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and value.shape == other[key].shape, key
        assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def state() -> TrainState:
    return trained(3)


@pytest.fixture
def run(tmp_path: Path) -> LocalStorage:
    return at(tmp_path / "run")


def test_everything_comes_back_bitwise_and_trains_on_as_if_never_saved(state, run):
    checkpoint.save(state, index(3), run)
    back = TrainState(MODEL, replace(FIT, seed=9), CPU)
    assert not torch.equal(back.model.head.weight, state.model.head.weight)
    checkpoint.restore(back, run, 3)
    assert_same(back, state)
    counts = [v for k, v in everything(back).items() if k.endswith(".step")]
    assert len(counts) == len(list(back.model.parameters())) and {float(c) for c in counts} == {3}
    for _ in fit(back, Stream(), FIT, 100):
        if back.step == 5:
            break
    straight = TrainState(MODEL, FIT, CPU)
    for _ in fit(straight, Stream(), FIT, 100):
        if straight.step == 5:
            break
    assert_same(back, straight)


def test_the_index_comes_back_as_it_was(state, run):
    saved = replace(index(3, psnr=21.5, ssim=math.pi), finished=True)
    folder = checkpoint.save(state, saved, run)
    got = weights.read_info(run, 3)
    assert folder == "step_0000003" and set(got.files) == {f"{part}.safetensors" for part in PARTS}
    assert replace(got, files={}) == saved


def test_equal_states_make_equal_bytes(state, run, tmp_path):
    again = at(tmp_path / "again")
    for storage, one in ((run, state), (again, trained(3))):
        checkpoint.save(one, index(3), storage)
    for file in FILES:
        assert run.read(f"step_0000003/{file}") == again.read(f"step_0000003/{file}")


class Stop(BaseException):
    """Not an Exception: nothing may catch it on the way."""


@pytest.mark.parametrize("after", range(len(FILES)))
def test_a_save_that_is_interrupted_leaves_no_checkpoint_and_the_one_before(
    state, run, monkeypatch, after
):
    checkpoint.save(state, index(3), run)
    written, write = [], LocalStorage.write

    def failing(self: LocalStorage, key: str, data: bytes) -> None:
        if len(written) == after:
            raise Stop
        write(self, key, data)
        written.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", failing)
        with pytest.raises(Stop):
            checkpoint.save(state, index(4), run)
    left = [key for key in run.list() if key.startswith("step_0000004")]
    assert len(left) == after  # the fault was where it should be
    assert weights.saved_steps(run) == [3]
    with pytest.raises(CheckpointError, match=r"step_0000004 is not there; there are steps \[3\]"):
        weights.read_info(run, 4)
    assert checkpoint.restore_newest(TrainState(MODEL, FIT, CPU), run).step == 3
    checkpoint.save(state, replace(index(5)), run)
    checkpoint.prune(run, newest=5, best=None)
    assert {key.split("/")[0] for key in run.list()} == {"step_0000005"}  # the rest is swept up


KILLED = """
import os, signal, sys
from mambaflow.config import from_json
from mambaflow.models import weights
from mambaflow.run_paths import RunPaths
from mambaflow.local_storage import LocalStorage
from mambaflow.storage import at
from mambaflow.training import checkpoint
from mambaflow.training.loop import TrainState
import torch
config = from_json(sys.argv[2])
state = TrainState(config.model, config.train, torch.device("cpu"))
run, write = at(sys.argv[1]), LocalStorage.write
checkpoint.save(state, weights.CheckpointInfo(step=1, config=config), run)
def dying(self, key, data):
    if key == "step_0000002/optimizer.safetensors":
        path = self.root / ".optimizer.half"
        path.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, key, data)
LocalStorage.write = dying
checkpoint.save(state, weights.CheckpointInfo(step=2, config=config), run)
"""


def test_a_process_killed_between_two_files_leaves_the_checkpoint_before(run):
    died = subprocess.run([sys.executable, "-c", KILLED, str(run.path), to_json(RUN)], timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert run.exists("step_0000002/ema.safetensors")
    assert weights.saved_steps(run) == [1]
    assert checkpoint.restore_newest(TrainState(MODEL, FIT, CPU), run).step == 1


def test_saving_over_leftovers_leaves_nothing_of_them(state, run):
    run.write("step_0000003/strange.bin", b"1")
    run.write(f"step_0000003/{INDEX}", b"{}")
    checkpoint.save(state, index(3), run)
    assert sorted(key.split("/")[1] for key in run.list("step_")) == sorted(FILES)


def damaged(run: LocalStorage, step: int, file: str, change) -> None:
    path = run.path / RunPaths.checkpoint(step) / file
    before = path.read_bytes()
    after = change(before)
    assert after != before
    path.write_bytes(after)


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_in_any_file_is_found(tmp_path_factory, file, where, bit):
    run = at(tmp_path_factory.mktemp("flip"))
    checkpoint.save(_STATE, index(3, psnr=20.0), run)

    def flip(data: bytes) -> bytes:
        place = int(where * len(data))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    damaged(run, 3, file, flip)
    state = TrainState(MODEL, FIT, CPU)
    before = {key: value.clone() for key, value in everything(state).items()}
    with pytest.raises(CheckpointError, match="step_0000003"):
        checkpoint.restore(state, run, 3)
    for key, value in everything(state).items():
        assert torch.equal(value, before[key])  # nothing was used


_STATE = trained(1)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named_with_the_cure(state, run, file, kept):
    checkpoint.save(state, index(3), run)
    damaged(run, 3, file, lambda data: data[: int(kept * len(data))])
    with pytest.raises(
        DamagedCheckpointError, match=rf"step_0000003.*{file}.*remove the folder to go back"
    ):
        checkpoint.restore(TrainState(MODEL, FIT, CPU), run, 3)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(state, run, part):
    checkpoint.save(state, index(3), run)
    run.delete(f"step_0000003/{part}.safetensors")
    with pytest.raises(DamagedCheckpointError, match=rf"step_0000003 lacks {part}.safetensors"):
        checkpoint.restore(TrainState(MODEL, FIT, CPU), run, 3)


def test_a_file_that_the_index_does_not_describe_is_refused(state, run):
    checkpoint.save(state, index(3), run)
    run.write("step_0000003/extra.safetensors", b"x")
    with pytest.raises(CheckpointError, match=r"holds \['extra.safetensors'\], .* move them"):
        checkpoint.restore(TrainState(MODEL, FIT, CPU), run, 3)
    run.delete("step_0000003/extra.safetensors")
    run.write("step_0000003/.DS_Store", b"x")  # a file manager's
    checkpoint.restore(TrainState(MODEL, FIT, CPU), run, 3)


def rewritten(run: LocalStorage, step: int, change) -> None:
    """The index as another version of the code would have written it, checksum and all."""
    key = f"{RunPaths.checkpoint(step)}/{INDEX}"
    values = json.loads(run.read(key))
    values.pop("sha256")
    change(values)
    run.write(key, json.dumps(values | {"sha256": weights.digest(values)}).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=9), "format 9, this mambaflow reads 1 to 2; use the version"),
        (lambda v: v["config"]["model"].update(warp=3), r"unknown field\(s\) \['warp'\] in model"),
        (lambda v: v["config"].update(planet=3), r"unknown field\(s\) \['planet'\] in a run"),
        (lambda v: v["config"]["train"].update(lr=-1.0), r"lr \(=-1.0\) must be positive"),
        (lambda v: v["config"]["model"].update(d_model=32), "another model .*32 -> 16"),
    ],
)
def test_another_version_or_model_is_refused_and_not_passed_over(state, run, change, message):
    for step in (2, 3):
        checkpoint.save(state, index(step), run)
    rewritten(run, 3, change)
    fresh = TrainState(MODEL, FIT, CPU)
    with pytest.raises(CheckpointError, match=rf"step_0000003.*{message}") as refused:
        checkpoint.restore_newest(fresh, run)
    assert not isinstance(refused.value, DamagedCheckpointError) and fresh.step == 0


def test_another_model_is_named_field_by_field(state, run):
    checkpoint.save(state, index(3), run)
    other = TrainState(replace(MODEL, d_model=32, num_layers=4), FIT, CPU)
    with pytest.raises(
        CheckpointError, match=r"of another model \(model.d_model: 16 -> 32; model.num_layers: 2"
    ):
        checkpoint.restore(other, run, 3)


def test_tensors_that_do_not_fit_the_code_are_named(state, run):
    checkpoint.save(state, index(3), run)
    path = run.path / "step_0000003" / "ema.safetensors"
    tensors = load_file(path)
    tensors["head.weight"] = tensors["head.weight"][:2].contiguous()
    data = save(tensors)
    path.write_bytes(data)
    digest = checkpoint.hashlib.sha256(data).hexdigest()
    rewritten(run, 3, lambda v: v["files"].update({"ema.safetensors": digest}))
    message = r"ema does not fit .* 1 tensors, first head.weight: \[2, 16\] saved, \[3, 16\]"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(TrainState(MODEL, FIT, CPU), run, 3)
    with pytest.raises(CheckpointError, match=message):
        weights.load_model(run.path)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_is_passed_over_and_the_log_says_so(state, run, caplog, file):
    for step in (2, 3):
        checkpoint.save(state, index(step), run)
    damaged(run, 3, file, lambda data: data[:-9])
    fresh = TrainState(MODEL, FIT, CPU)
    with caplog.at_level(logging.WARNING, logger="mambaflow.training.checkpoint"):
        assert checkpoint.restore_newest(fresh, run).step == 2
    assert fresh.step == 2
    (record,) = caplog.records
    assert "step_0000003" in record.message and file in record.message
    assert record.message.endswith("trying the one before")


def test_nothing_saved_is_a_new_run_but_nothing_sound_is_an_error(state, run):
    assert checkpoint.restore_newest(TrainState(MODEL, FIT, CPU), run) is None
    for step in (2, 3):
        checkpoint.save(state, index(step), run)
        damaged(run, step, INDEX, lambda data: data[:40])
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .*run are damaged .*\[2, 3\]"):
        checkpoint.restore_newest(TrainState(MODEL, FIT, CPU), run)


def pretend(run: LocalStorage, **scores: dict[str, float]) -> None:
    """Checkpoints with indexes alone, as far as choosing among them goes."""
    for key, of in scores.items():
        step = int(key.removeprefix("s"))
        path = f"{RunPaths.checkpoint(step)}/{INDEX}"
        values = {
            "format": 1, "step": step, "scores": of, "finished": False, "files": {},
            "config": to_dict(RUN),
        }  # fmt: skip
        run.write(path, json.dumps(values | {"sha256": weights.digest(values)}).encode())


def test_the_best_has_the_highest_score_and_is_the_earlier_of_equals(run):
    assert weights.best_step(run, "val/psnr") is None
    p = "val/psnr"
    pretend(run, s1={p: 20.0}, s2={p: 22.0}, s3={p: 22.0}, s4={p: -5.0}, s5={})
    assert weights.best_step(run, p) == 2
    assert weights.best_step(run, p, until=1) == 1
    assert weights.best_step(run, "val/ssim") == 5  # nobody has it: the newest


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_a_score_that_is_not_a_number_never_wins(run, order):
    scores = dict(zip(order, (math.nan, 20.0, -math.inf), strict=True))
    pretend(run, **{f"s{step}": {"val/psnr": score} for step, score in scores.items()})
    assert weights.best_step(run, "val/psnr") == order[1]


def test_the_choice_passes_over_a_damaged_index(run, caplog):
    pretend(run, s1={"val/psnr": 20.0}, s2={"val/psnr": 22.0})
    damaged(run, 2, INDEX, lambda data: data[:-30])
    assert weights.best_step(run, "val/psnr") == 1
    assert "step_0000002" in caplog.text


def test_pruning_keeps_the_newest_and_the_best(run):
    pretend(run, s1={}, s2={}, s3={}, s4={})
    run.write("report/table.md", b"stays")
    checkpoint.prune(run, newest=4, best=2)
    assert weights.saved_steps(run) == [2, 4] and run.exists("report/table.md")
    assert {path.name for path in run.path.iterdir()} == {"step_0000002", "step_0000004", "report"}


def test_pruning_after_going_back_keeps_what_was_just_saved(run):
    """Step 40 was damaged, so the run went on from 20 and has saved 30: that one is the newest."""
    pretend(run, s20={"val/psnr": 20.0}, s30={}, s40={"val/psnr": 30.0})
    best = weights.best_step(run, "val/psnr", until=30)
    checkpoint.prune(run, newest=30, best=best)
    assert weights.saved_steps(run) == [20, 30]


def test_pruning_that_is_interrupted_shows_no_half_checkpoint(state, run, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(state, index(step), run)
    delete, gone = LocalStorage.delete, []

    def failing(self: LocalStorage, key: str) -> None:
        if len(gone) == 1:
            raise Stop
        delete(self, key)
        gone.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "delete", failing)
        with pytest.raises(Stop):
            checkpoint.prune(run, newest=3, best=None)
    assert gone == [f"step_0000001/{INDEX}"]  # the index went first
    assert run.exists("step_0000001/model.safetensors") and weights.saved_steps(run) == [2, 3]
    checkpoint.prune(run, newest=3, best=None)
    assert {key.split("/")[0] for key in run.list()} == {"step_0000003"}


def test_a_loaded_model_has_the_averaged_weights_of_the_best_and_only_evaluates(state, run):
    checkpoint.save(state, index(3, psnr=20.0), run)
    checkpoint.save(trained(5), index(5, psnr=19.0), run)
    model, about = weights.load_model(run.path)
    assert about.step == 3 and about.scores == {"val/psnr": 20.0}
    ema = state.ema.state_dict()
    assert all(torch.equal(value, ema[key]) for key, value in model.state_dict().items())
    assert not torch.equal(model.embed_known.weight, state.model.embed_known.weight)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_loading_from_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; train a run first"):
        weights.load_model(tmp_path / "none")


def as_format_1(run: LocalStorage, step: int) -> None:
    """Rewrite a checkpoint as the first version wrote it: other names of one file, of tensors and
    of a field, and no field that came later."""
    folder = run.path / RunPaths.checkpoint(step)
    old = {new: name for name, new in weights.TENSORS_OF_1.items()}
    digests = {}
    for part in PARTS:
        tensors = load_file(folder / f"{part}.safetensors")
        (folder / f"{part}.safetensors").unlink()
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        file = f"{weights.FILES_OF_1.get(part, part)}.safetensors"
        data = save(tensors)
        (folder / file).write_bytes(data)
        digests[file] = hashlib.sha256(data).hexdigest()

    def change(values: dict) -> None:
        values.update(format=1, files=digests)
        values["config"]["model"]["surroundings"] = values["config"]["model"].pop("local_linear")
        del values["config"]["init_from"]

    rewritten(run, step, change)


def test_a_checkpoint_of_the_first_format_means_what_it_meant(state, run):
    checkpoint.save(state, index(3), run)
    as_format_1(run, 3)
    names = {key for key in run.list("step_")}
    assert (
        "step_0000003/averaged.safetensors" in names and "step_0000003/ema.safetensors" not in names
    )
    fresh = TrainState(MODEL, FIT, CPU)
    assert checkpoint.restore_newest(fresh, run).step == 3
    for mine, theirs in ((fresh.model, state.model), (fresh.ema, state.ema)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
    saved, got = state.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    for number, moments in saved.items():
        assert all(torch.equal(got[number][k], torch.as_tensor(v)) for k, v in moments.items())
    model, info = weights.load_model(run.path)
    assert info.config == RUN and info.format == 1
    assert torch.equal(model.head.weight, state.ema.head.weight)


def test_a_checkpoint_is_found_by_its_own_address_too(state, run):
    for step, score in ((1, 9.0), (2, 1.0)):
        checkpoint.save(state, index(step, psnr=score), run)
    assert weights.read_best(run.path).step == 1
    for step in (1, 2):
        info = weights.read_best(f"{run.path}/{RunPaths.checkpoint(step)}")
        assert info.step == step and info.uri == f"{run.uri}/{RunPaths.checkpoint(step)}"
    with pytest.raises(CheckpointError, match="step_0000007 is not there; there are steps"):
        weights.load_model(f"{run.path}/step_0000007")
