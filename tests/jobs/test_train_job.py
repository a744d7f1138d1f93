"""The command line of jobs/train.py: every flag arrives, and bad input changes nothing."""

import ast
import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import small
import torch
from small import FLAGS

import jobs.train as job
from jobs.train import main, parse
from mambaflow import config as config_module
from mambaflow.config import (
    ARCHITECTURES,
    ModelConfig,
    RunConfig,
    ScaleConfig,
    TrainConfig,
    first_run,
    from_json,
    mission,
    to_json,
)
from mambaflow.data.shards import MANIFEST, read_manifest, write_manifest
from mambaflow.distributed.job_copy import check_copied, warn_of_a_copy
from mambaflow.models import weights
from mambaflow.run_paths import RunPaths
from mambaflow.storage import at

# Every flag, a value that is not its default, and the flags that it needs beside it.
FLAG_VALUES: dict[str, tuple[object, str]] = {
    "arch": ("v1", ""), "recipe": ("first-run", ""), "run_name": ("mine", ""),
    "storage": ("elsewhere", ""), "data": ("shards", ""), "resume": (True, ""),
    "take_over": (True, ""),
    "init_from": ("elsewhere/run", ""),
    "d_model": (96, ""), "num_layers": (6, ""), "bidirectional": (False, ""),
    "scan": ("append", "--start plain"), "curve": ("raster", ""), "d_state": (8, ""),
    "d_conv": (3, ""), "expand": (3, ""), "readout": ("cross_attention", "--modulation add"),
    "perceiver_iterations": (3, ""), "query_attention": (False, ""), "num_heads": (4, ""),
    "mlp_ratio": (3, ""),
    "frequencies": (32, ""), "max_frequency": (8.0, ""), "time_scale": (500.0, ""),
    "modulation": ("add", ""), "residual": (False, ""), "windows": (False, ""),
    "local_linear": (False, ""),
    "start": ("plain", ""), "coordinates": ("corner", ""), "rgb_low": (0.0, ""),
    "epochs": (7, ""), "max_steps": (40, ""), "batch_size": (32, ""), "lr": (3e-4, ""),
    "warmup_steps": (9, ""), "weight_decay": (0.1, ""), "grad_clip": (0.5, ""),
    "ema_decay": (0.9, ""), "share_at_zero": (0.3, ""), "time_law": ("logit_normal", ""),
    "weighting": ("velocity", ""),
    "masks": ("fresh", ""), "min_queries": (100, "--max-queries 300"), "max_queries": (300, ""),
    "precision": ("bf16", ""), "seed": (4, ""), "log_every": (3, ""), "eval_every": (50, ""),
    "eval_images": (11, ""), "test_images": (12, ""), "sample_steps": (6, ""),
    "num_workers": (2, ""), "min_workers": (1, ""), "use_gpu": (True, ""), "ray": (False, ""),
    "threads": (3, ""), "max_failures": (1, ""), "compile": ("on", ""),
}  # fmt: skip
PARTS = {"model": ModelConfig, "train": TrainConfig, "scale": ScaleConfig}


def flat(config: RunConfig) -> dict[str, object]:
    values = asdict(config)
    return {**values.pop("model"), **values.pop("train"), **values.pop("scale"), **values}


def option(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def test_the_list_of_flags_is_pinned():
    names = [f.name for kind in (RunConfig, *PARTS.values()) for f in fields(kind)]
    assert sorted(FLAG_VALUES) == sorted(set(names) - {*PARTS, "command", "data_hash", "init_hash"})


@pytest.mark.parametrize("name", sorted(FLAG_VALUES.keys() - {"arch", "recipe"}))
def test_a_flag_arrives_typed_and_alone(name):
    value, beside = FLAG_VALUES[name]
    before = flat(parse(beside.split()))
    after = flat(parse([*beside.split(), option(name, value)]))
    assert before[name] != value and type(after[name]) is type(value)
    assert after == before | {name: value}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_brings_its_own_defaults(arch):
    assert parse(["--arch", arch]) == parse([f"--arch={arch}"]) == mission(arch)
    assert parse(["--arch", arch]).model == ARCHITECTURES[arch]
    assert parse(["--arch", arch, "--recipe", "first-run"]) == first_run(arch)
    changed = parse(["--recipe=first-run", "--arch", arch, "--d-model=64", "--epochs=5"])
    assert changed.model == replace(first_run(arch).model, d_model=64)
    assert changed.train == replace(first_run(arch).train, epochs=5)


def test_the_default_run_is_the_described_one():
    run = parse([])
    assert run == mission("v2") and (run.train.epochs, run.train.batch_size) == (1000, 64)
    assert run.train.lr == 1e-4 and run.train.grad_clip == 1.0 and run.scale.ray
    assert parse(["--arch=v1"]).model.d_model == 512


def described() -> dict[str, str]:
    """Field -> the docstring under it, from the source."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(config_module))):
        if isinstance(node, ast.ClassDef):
            for a, b in zip(node.body, node.body[1:], strict=False):
                if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr):
                    found[a.target.id] = plain(b.value.value)
    return found


def plain(text: str) -> str:
    """Words without line breaks and frames."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text).strip()


def test_help_exits_0_and_names_every_flag_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    text = plain(capsys.readouterr().out)
    about = described()
    for name in FLAG_VALUES:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
        assert about[name] in text, name
    assert re.search(r"--config STR Defaults of all other flags: the config.json of a run", text)
    assert "--command" not in text and "Exit codes: 0 done; 1 failed; 2 bad input" in text


# --- Settings of another run -----------------------------------------------------------------


OTHER = replace(
    first_run("v1"), run_name="mine", storage="/elsewhere", data="/shards", init_from="/run",
    resume=True, command="python jobs/train.py", scale=ScaleConfig(num_workers=2, threads=3),
)  # fmt: skip
AS_OTHER = replace(OTHER, run_name="", resume=False, command="")


@pytest.fixture
def written(tmp_path) -> str:
    (tmp_path / "config.json").write_text(to_json(OTHER))
    return str(tmp_path / "config.json")


def test_a_configuration_gives_all_defaults_but_what_is_its_runs_own(written):
    assert parse([f"--config={written}"]) == parse(["--config", written]) == AS_OTHER
    assert type(parse([f"--config={written}"])) is type(parse([])) is RunConfig


def test_flags_beside_a_configuration_win(written):
    flags = "--seed=4 --no-residual --threads=1 --num-workers=1 --init-from= --run-name=n --resume"
    model, train = replace(OTHER.model, residual=False), replace(OTHER.train, seed=4)
    scale = replace(OTHER.scale, threads=1, num_workers=1)
    expected = replace(AS_OTHER, model=model, train=train, scale=scale, init_from="")
    found = parse([*flags.split(), "--config", written])
    assert found == replace(expected, run_name="n", resume=True)


def test_a_configuration_of_before_means_what_it_meant(written):
    values = json.loads(Path(written).read_text())
    del values["scale"]["threads"], values["train"]["max_steps"]
    Path(written).write_text(json.dumps(values))
    scale = replace(AS_OTHER.scale, threads=0)
    assert parse(["--config", written]) == replace(AS_OTHER, scale=scale)


@pytest.mark.s3
def test_a_configuration_may_be_in_s3(bucket):
    at(bucket).write("sweep/best.json", to_json(OTHER).encode())
    assert parse(["--config", f"{bucket}/sweep/best.json"]) == AS_OTHER


# --- Bad input -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(shards, tmp_path_factory) -> Path:
    """Storage with one finished run, `done`."""
    storage = tmp_path_factory.mktemp("done")
    assert main([*FLAGS, f"--data={shards}", f"--storage={storage}", "--run-name=done"]) == 0
    return storage


@dataclass
class Place:
    """What a case may spoil: a copy of the shards, and of storage with a finished run."""

    shards: Path
    storage: Path
    patch: pytest.MonkeyPatch

    def shard(self, change: Callable[[bytes], bytes], name: str = "shard-00000.parquet") -> None:
        path = self.shards / "train" / name
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before

    def manifest(self, change: Callable[[dict], None], split: str = "train") -> None:
        path = self.shards / split / MANIFEST
        about = json.loads(path.read_text())
        change(about)
        path.write_text(json.dumps(about))

    def run(self, *more: str, name: str = "new") -> list[str]:
        where = [f"--data={self.shards}", f"--storage={self.storage}", f"--run-name={name}"]
        return [*FLAGS, *where, *more]


@pytest.fixture
def place(tmp_path, shards, done, monkeypatch) -> Place:
    copies = (tmp_path / "shards", tmp_path / "runs")
    shutil.copytree(shards, copies[0])
    shutil.copytree(done, copies[1])
    if (tmp_path / "runs" / "done" / "config.json").exists():  # its data is the copy
        path = tmp_path / "runs" / "done" / "config.json"
        path.write_text(path.read_text().replace(str(shards), str(copies[0])))
    return Place(*copies, monkeypatch)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refusal(argv: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and words of a job that ends early."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, plain(err + out)


BAD_FLAGS = {
    "unknown architecture": ("--arch=v9", "unknown arch 'v9'; valid: v1, v2"),
    "unknown recipe": ("--recipe=slow", "unknown recipe 'slow'; valid: mission, first-run"),
    "a flag without its value": ("--arch", "argument --arch: expected one argument"),
    "unknown flag": ("--bogus=1", "Unrecognized options: --bogus=1"),
    "a word for a number": ("--lr=fast", "Error parsing --lr: could not convert string to float"),
    "a fraction for a count": ("--epochs=1.5", "Error parsing --epochs: invalid literal for int()"),
    "unknown choice": ("--scan=sideways", "--scan'. Expected one of ('known', 'append', 'joint')"),
    "unknown precision": ("--precision=fp8", "--precision'. Expected one of ('fp32', 'bf16')"),
    "heads that do not fit": (
        "--d-model=17", "d_model (=17) must be divisible by num_heads (=2); use 16 or 18"),
    "odd layers": ("--num-layers=3", "num_layers (=3) must be even when bidirectional"),
    "a scan that mixes queries in": (
        "--scan=joint", "start (='process') needs a fill of the known pixels alone"),
    "an amplitude that nothing trains": (
        "--share-at-zero=0", "share_at_zero (=0.0) must be above 0 with start='process'"),
    "negative rate": ("--lr=-1", "lr (=-1.0) must be positive; use"),
    "steps below none": ("--max-steps=-1", "max_steps (=-1) must not be negative; use 0 or more"),
    "no epochs": ("--epochs=0", "epochs (=0) must be positive; use 1 or more"),
    "a share above one": ("--ema-decay=1.5", "ema_decay (=1.5) must be in [0, 1]; use a share"),
    "negative seed": ("--seed=-1", "seed (=-1) must be in [0, 2^32); use 0"),
    "more queries at least than at most": (
        "--min-queries=9", "min_queries (=9) must be at most max_queries (=0); give both"),
    "negative warm-up": ("--warmup-steps=-1", "warmup_steps (=-1) must not be negative"),
    "a path for a name": (
        "--run-name=a/b", "run_name (='a/b') must be a plain folder name, without ['/']; use let"),
    "a name of a checkpoint": ("--run-name=step_12", "is what a run's checkpoints are called"),
    "a read-out that never hears the time": (
        "--readout=cross_attention", "modulation (='adaln') needs a read-out that it modulates"),
    "a name of dots": ("--run-name=..", "run_name (='..') must be a plain folder name"),
    "a name with a space": ("--run-name=a b", "run_name (='a b') must be a plain folder name"),
    "threads below none": ("--threads=-1", "threads (=-1) must not be negative; use 0 or more"),
    "no workers": ("--num-workers=0", "num_workers (=0) must be positive"),
    "workers without torchrun": (
        "--num-workers=2", "num_workers (=2) without Ray must be the number of processes (=1); "
        "start them with torchrun --nproc-per-node 2"),
    "more workers at least than at most": (
        "--min-workers=3", "min_workers (=3) must be in [0, num_workers (=1)]"),
    "unknown storage": ("--storage=ftp://x/y", "unknown scheme 'ftp' in 'ftp://x/y'; valid: a pa"),
    "a bucket without a name": ("--storage=s3:///x", "'s3:///x' must name a bucket; use s3://buck"),
    "more queries than targets": (
        "--max-queries=500", "max_queries (=500) must be at most 28"),
    "no run to resume": (
        "--resume", "run_name (='new') has nothing to resume in"),
    "no such data": ("--data=/nowhere/at/all", "/nowhere/at/all/train/manifest.json is not there"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_refused_with_code_2_and_changes_nothing(place, capsys, case):
    flag, message = BAD_FLAGS[case]
    before = tree(place.storage), tree(place.shards)
    code, words = refusal(place.run(flag), capsys)
    assert code == 2 and message in words, words
    assert (tree(place.storage), tree(place.shards)) == before


BAD_CONFIGS = {
    "an architecture beside it": (
        "{done}/config.json", "--arch=v2",
        "arch (='v2') cannot stand beside config (='{done}/config.json'), which says what it "
        "would; leave --arch or --config out"),
    "a recipe beside it": (
        "{done}/config.json", "--recipe=mission", "recipe (='mission') cannot stand beside config"),
    "a file that is not there": (
        "{done}/no.json", "", "config (='{done}/no.json') must be a configuration that can be "
        "read: [Errno 2] No such file or directory: '{done}/no.json'; name a run's config.json"),
    "a folder": ("{done}", "", "must be a configuration that can be read: [Errno 21] Is a direct"),
    "no address": ("", "", "config (='') must be a configuration that can be read"),
    "no JSON": ("{done}/report/table.md", "", "can be read: Expecting value: line 1 column 1"),
    "no text": ("{done}/report/picture.png", "", "can be read: 'utf-8' codec can't decode"),
    "another file of JSON": ("{done}/report/results.json", "", "can be read: model (=None) must"),
    "an unknown scheme": ("ftp://x/y", "", "can be read: unknown scheme 'ftp' in 'ftp://x/y'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration_is_refused_with_code_2_and_changes_nothing(place, capsys, case):
    done = place.storage / "done"
    address, flag, message = (text.format(done=done) for text in BAD_CONFIGS[case])
    before = tree(place.storage), tree(place.shards)
    code, words = refusal(place.run(f"--config={address}", *flag.split()), capsys)
    assert code == 2 and words.startswith("error: ") and message in words, words
    assert (tree(place.storage), tree(place.shards)) == before


@pytest.mark.s3
def test_a_configuration_that_is_not_in_s3_is_named(place, capsys, bucket):
    before = tree(place.storage)
    code, words = refusal(place.run(f"--config={bucket}/no.json"), capsys)
    assert code == 2 and f"can be read: {bucket}/no.json is not there; name a run's" in words, words
    assert tree(place.storage) == before


def with_shard(place: Place, change: Callable[[bytes], bytes]) -> None:
    """Shard 0 replaced, and described in the manifest as it now is."""
    place.shard(change)
    data = (place.shards / "train" / "shard-00000.parquet").read_bytes()
    now = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    place.manifest(lambda about: about["shards"][0].update(now))


def another_spec(place: Place) -> None:
    other = place.shards.parent / "other"
    small.staged(other, mask_seed=7)
    data = (other / "shards/train/shard-00000.parquet").read_bytes()
    with_shard(place, lambda before: data)
    shutil.rmtree(other)


def another_split(place: Place) -> None:
    small.staged(place.shards.parent / "other", known_ratio=0.3)
    shutil.rmtree(place.shards / "validation")
    (place.shards.parent / "other/shards/validation").rename(place.shards / "validation")
    shutil.rmtree(place.shards.parent / "other")


def a_reduced_split(place: Place) -> None:
    split = at(str(place.shards / "validation"))
    found = read_manifest(split)
    write_manifest(split, replace(found, spec=replace(found.spec, reduce=2)))


def without_images(place: Place) -> None:
    shutil.rmtree(place.shards)
    small.staged(place.shards.parent / "other", full_images=False)
    (place.shards.parent / "other/shards").rename(place.shards)
    shutil.rmtree(place.shards.parent / "other")


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


BAD_DATA: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "a staging that did not finish": (
        lambda p: (p.shards / "train" / MANIFEST).unlink(), "",
        "train/manifest.json is not there: no staged split, or one whose staging did not finish; "
        "run jobs/stage.py --out"),
    "no test split": (
        lambda p: shutil.rmtree(p.shards / "test"), "", "test/manifest.json is not there"),
    "a truncated shard": (
        lambda p: p.shard(lambda data: data[:-100]), "",
        "train/shard-00000.parquet is damaged: "),
    "a flipped bit in a shard": (
        lambda p: p.shard(flip), "", "train/shard-00000.parquet is damaged: "),
    "a shard that is listed and gone": (
        lambda p: (p.shards / "train/shard-00000.parquet").unlink(), "",
        "train/shard-00000.parquet is listed and not there; stage again"),
    "a damaged held-out shard": (
        lambda p: (p.shards / "test/shard-00000.parquet").write_bytes(b"PAR1"), "",
        "test/shard-00000.parquet is damaged: 4 bytes"),
    "a shard that is no Parquet": (
        lambda p: with_shard(p, lambda data: b"x" * 999), "",
        "train/shard-00000.parquet is not whole Parquet (999 bytes)"),
    "a shard of another spec": (another_spec, "", "train/shard-00000.parquet"),
    "splits of two stagings": (
        another_split, "", "must hold validation images, staged as the training ones (28 known"),
    "a split of reduced images": (
        a_reduced_split, "", "(28 known pixels of 12 x 12), and holds 8 (28 of 12 x 12, reduced 2"),
    "a manifest that contradicts itself": (
        lambda p: p.manifest(lambda about: about.update(rows=41)), "",
        "train/manifest.json contradicts itself; stage the data again"),
    "a manifest that is not JSON": (
        lambda p: (p.shards / "train" / MANIFEST).write_text('{"format": 1'), "",
        "train/manifest.json is damaged: "),
    "a manifest of another format": (
        lambda p: p.manifest(lambda about: about.update(format=9)), "",
        "train/manifest.json has format 9, not 1; stage again"),
    "fresh masks without images": (
        without_images, "--masks=fresh",
        "masks (='fresh') needs whole training images, and {shards} holds only the staged pixels; "
        "stage again with --full-images, or use --masks strict"),
    "a GPU that is not there": (
        lambda p: p.patch.setattr(torch.cuda, "is_available", lambda: False), "--use-gpu",
        "use_gpu (=True) needs a CUDA device, and torch sees none here; use --no-use-gpu"),
    "torch.compile without a compiler": (
        lambda p: p.patch.setattr("shutil.which", lambda name: None), "--compile=on",
        "compile (='on') needs a compiler: no C++ compiler (CXX, g++, c++, clang++); install g++"),
    "torchrun with another number of workers": (
        lambda p: p.patch.setenv("WORLD_SIZE", "3"), "--num-workers=2",
        "num_workers (=2) without Ray must be the number of processes (=3)"),
    "storage that cannot be written": (
        lambda p: (p.storage / "file").write_text("x"), "--storage={storage}/file",
        "{storage}/file/new"),
    "an S3 address without its slashes": (None, "--storage=s3:bucket/x", "use s3://bucket/prefix"),
    "a name that is taken": (
        None, "--run-name=done",
        "run_name (='done') is taken by a finished run in {storage}; use --resume to go on, or "
        "another --run-name"),
    "resume with another model and training": (
        None, "--run-name=done --resume --d-model=32 --lr=1e-3",
        "run_name (='done') cannot resume with another configuration (model.d_model: 16 -> 32; "
        "train.lr: 0.002 -> 0.001); give the same flags, or another --run-name"),
    "resume of a run that is already longer": (
        None, "--run-name=done --resume --epochs=2",
        "epochs (=2) end at step 10, and run_name (='done') is already at step 20; use --epochs 4"),
    "resume of a run that has gone beyond": (
        None, "--run-name=done --resume --max-steps=7",
        "max_steps (=7) end at step 7, and run_name (='done') is already at step 20; use "
        "--max-steps 20"),
    "resume of another version's run": (
        lambda p: (p.storage / "done/config.json").write_text('{"model": {"warp": 1}}'),
        "--run-name=done --resume",
        "done/config.json is not of this version of mambaflow: unknown field(s) ['warp']"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_and_places_are_refused_with_code_2_and_change_nothing(place, capsys, case):
    spoil, flags, message = BAD_DATA[case]
    if spoil:
        spoil(place)
    names = {"shards": place.shards, "storage": place.storage}
    before = tree(place.storage), tree(place.shards)
    code, words = refusal(place.run(*flags.format(**names).split()), capsys)
    assert code == 2 and words.startswith("error: "), words
    assert message.format(**names) in words, words
    assert (tree(place.storage), tree(place.shards)) == before


@pytest.mark.s3
@pytest.mark.parametrize("what", ["storage", "data"])
def test_a_bucket_that_does_not_exist_is_named(place, capsys, bucket, what):
    before = tree(place.storage)
    code, words = refusal(place.run(f"--{what}=s3://no-such-bucket/x"), capsys)
    assert code == 2 and "s3://no-such-bucket/x" in words, words
    assert "create the bucket, or name another" in words, words
    assert tree(place.storage) == before


@pytest.mark.s3
def test_an_endpoint_that_cannot_be_reached_is_named(place, capsys, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    code, words = refusal(place.run(f"--storage={bucket}/runs"), capsys)
    assert code == 2 and "127.0.0.1:9" in words and "check AWS_ENDPOINT_URL" in words, words


def test_a_later_shard_that_is_damaged_ends_with_code_3_and_mended_goes_on(
    place, capsys, done, monkeypatch
):
    last = place.shards / "train/shard-00002.parquet"
    whole = last.read_bytes()
    last.write_bytes(whole[:-50])
    code, words = refusal(place.run(), capsys)
    assert code == job.DAMAGED == 3, words
    assert "train/shard-00002.parquet is damaged" in words and "stage the data again" in words
    assert "mended? go on with --resume --run-name new" in words
    last.write_bytes(whole)
    assert main(place.run("--resume")) == 0
    runs = at(place.storage / "new"), at(done / "done")
    digests = [weights.read_info(run, small.STEPS).files for run in runs]
    assert digests[0] == digests[1]


def test_a_run_of_which_all_checkpoints_are_damaged_ends_with_code_3(place, capsys):
    for index in place.storage.glob("done/step_*/checkpoint.json"):
        index.write_text("{")
    code, words = refusal(place.run("--resume", name="done"), capsys)
    assert code == 3 and "checkpoints in" in words and "are damaged" in words, words


def test_a_run_writes_down_what_was_asked_and_shows_its_end(place, capsys):
    assert main(place.run("--seed=3")) == 0
    out = capsys.readouterr().out
    folder = place.storage / "new"
    assert "| posterior mean " in out and f"run folder   {folder}" in out
    assert f"picture      {folder}/report/picture.png" in out
    assert f"tensorboard --logdir {place.storage}" in out
    config = from_json((folder / "config.json").read_bytes())
    assert config.train == replace(small.FIT, seed=3) and config.model == small.MODEL
    assert config.data == str(place.shards) and config.command.startswith("python ")
    assert {p.name for p in (folder / "report").iterdir()} == {
        "picture.png", "results.json", "table.md",
    }  # fmt: skip


def test_the_command_for_tensorboard_is_quoted_for_a_shell(place, capsys):
    storage = place.storage.parent / "my runs"
    assert main([*place.run(), f"--storage={storage}"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "tensorboard" in x]
    command = line.removeprefix("TensorBoard").strip()
    assert shlex.split(command) == ["tensorboard", "--logdir", str(storage)]


def test_data_that_did_not_travel_with_a_jobs_folder_are_refused_with_the_cure(
    place, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # as in Ray's copy of --working-dir
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x"}}')
    code, words = refusal([*place.run(), "--data=data/away"], capsys)
    assert code == 2 and not (place.storage / "new").exists()
    assert (
        "data (=data/away) is not in Ray's copy of --working-dir, which leaves out what git "
        "ignores; use an absolute path that the nodes share, or s3://…"
    ) in words
    # What travelled is taken, and so is an address that means the same anywhere.
    check_copied("shards")
    for elsewhere in ("/data/away", "~/away", "s3://bucket/away", "sample"):
        check_copied(elsewhere)
    # Without a copy a relative address is one of this folder, and what lacks there is said.
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    code, words = refusal([*place.run(), "--data=data/away"], capsys)
    assert code == 2 and "--working-dir" not in words and "is not there" in words


def test_a_relative_storage_in_a_jobs_copy_is_warned_of(monkeypatch, caplog):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x"}}')
    for fine in ("/runs", "~/runs", "s3://bucket/runs"):
        warn_of_a_copy(fine)
    assert not caplog.text
    warn_of_a_copy("runs")
    assert "storage (=runs) is in Ray's copy of --working-dir" in caplog.text


def test_a_run_without_a_name_is_called_after_its_architecture_and_the_time(place):
    assert main([f for f in place.run() if not f.startswith("--run-name")]) == 0
    (made,) = {p.name for p in place.storage.iterdir()} - {"done"}
    assert re.fullmatch(r"v2-\d{8}-\d{6}", made)


def test_a_stopped_run_ends_with_code_143_and_says_how_to_go_on(place, capsys, monkeypatch):
    monkeypatch.setattr("mambaflow.training.stop_signal.STOP_POLL_S", -1.0)
    fit = job.train_and_score

    def stopping(config: RunConfig, group: job.ProcessGroup) -> job.Outcome:
        (place.storage / "new" / "STOP").touch()
        return fit(config, group)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_and_score", stopping)
        assert main(place.run()) == 143
    assert "stopped after step 1; go on with --resume --run-name new" in capsys.readouterr().out
    assert main(place.run("--resume")) == 0


def test_the_command_and_the_way_on_are_quoted_for_a_shell(place, capsys, monkeypatch):
    monkeypatch.setattr(job, "train", lambda *_: job.Outcome("stopped", 1))
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--storage=my runs"])
    assert main(place.run(name="a;b")) == 143
    assert "go on with --resume --run-name 'a;b'" in capsys.readouterr().out
    config = from_json((place.storage / "a;b" / "config.json").read_bytes())
    assert config.command == "python jobs/train.py '--storage=my runs'"


def test_a_job_that_is_asked_to_stop_before_it_trains_gives_its_run_back(place, monkeypatch):
    def asked(*_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_and_score", asked)
        with pytest.raises(SystemExit) as end:
            main(place.run())
    assert end.value.code == 143
    owner = json.loads((place.storage / "new" / "owner" / "0001.json").read_text())
    assert owner["ended"], "or others would wait for it to show that it lives"
    assert main(place.run("--resume")) == 0


def test_a_run_trained_again_from_its_configuration_has_the_same_bits(place):
    done, again = place.storage / "done", place.storage / "again"
    flags = [f"--config={done}/config.json", f"--storage={place.storage}", "--run-name=again"]
    assert main([*flags, "--no-ray"]) == 0
    before, after = (from_json((run / "config.json").read_bytes()) for run in (done, again))
    kept = {name: getattr(before, name) for name in ("run_name", "storage", "command")}
    assert replace(after, **kept) == before and after.run_name == "again"
    for part in ("model", "ema", "optimizer"):
        file = f"{RunPaths.checkpoint(small.STEPS)}/{part}.safetensors"
        assert (again / file).read_bytes() == (done / file).read_bytes(), part


@pytest.mark.parametrize(("stated", "found"), [("", 3), ("2", 2)])
def test_a_worker_has_the_threads_of_the_flag_or_of_the_environment(
    place, monkeypatch, stated, found
):
    monkeypatch.setenv("MAMBAFLOW_THREADS", stated)
    had = []

    def counting(config: RunConfig, group: job.ProcessGroup) -> job.Outcome:
        had.append(torch.get_num_threads())
        return job.Outcome("stopped", 0)

    monkeypatch.setattr(job, "train_and_score", counting)
    before = torch.get_num_threads()
    try:
        assert main(place.run("--threads=3")) == job.STOPPED
    finally:
        torch.set_num_threads(before)
    assert had == [found]


LATE = {
    "a name that is taken": ("--run-name=done", "is taken by a finished run"),
    "no run to resume": ("--resume", "has nothing to resume in"),
    "workers without torchrun": ("--num-workers=2", "must be the number of processes (=1)"),
    "more queries than targets": ("--max-queries=500", "max_queries (=500) must be at most 204"),
    "more queries than unknown": (
        "--max-queries=821 --masks=fresh", "max_queries (=821) must be at most 820"),
    "unknown storage": ("--storage=ftp://x/y", "unknown scheme 'ftp'"),
    "no weights to start from": ("--init-from={storage}/no", "holds no complete checkpoint"),
    "weights of another model": (
        "--init-from={storage}/done --d-model=32",
        "is of another model (model.d_model: 16 -> 32); give the flags of that model, or leave"),
    "no compiler": ("--compile=on", "compile (='on') needs a compiler"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_bad_flags_are_refused_before_an_embedded_data_set_is_staged(
    place, capsys, monkeypatch, tmp_path, case
):
    """`--data sample` is staged on the way: what is refused must not have begun it."""
    monkeypatch.chdir(tmp_path)
    if case == "no compiler":
        monkeypatch.setattr("shutil.which", lambda name: None)
    flags, message = LATE[case]
    argv = place.run(*flags.format(storage=place.storage).split(), "--data=sample")
    before = tree(tmp_path)
    code, words = refusal(argv, capsys)
    assert code == 2 and message in words, words
    assert tree(tmp_path) == before and not (tmp_path / "data").exists()


def test_a_private_ray_refuses_more_workers_than_the_machine_has_cores(
    place, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MAMBAFLOW_CORES", "3")
    flags = [flag for flag in place.run("--data=sample", "--batch-size=64") if flag != "--no-ray"]
    before = tree(tmp_path)
    code, words = refusal([*flags, "--num-workers=64"], capsys)
    assert code == 2, words
    assert "num_workers (=64) needs 64 CPUs, and the cluster has 3; use num_workers=3" in words
    assert tree(tmp_path) == before


def test_a_run_may_start_from_anothers_weights_with_a_fresh_optimiser(place, capsys):
    source = place.storage / "done"
    best, info = weights.load_model(source)
    flags = ["--lr=1e-12", "--epochs=1", "--warmup-steps=0"]  # it goes nowhere from where it starts
    assert main(place.run(f"--init-from={source}", *flags)) == 0
    config = from_json((place.storage / "new" / "config.json").read_bytes())
    assert config.init_from == info.uri == f"{source}/{RunPaths.checkpoint(info.step)}"
    model, after = weights.load_model(place.storage / "new")
    assert after.step == 5
    for key, value in best.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-9)
    # Its source may train on: the run goes on as what it began as.
    assert main(place.run(f"--init-from={source}", *flags, "--resume")) == 0
    code, words = refusal(place.run("--resume", *flags), capsys)
    assert code == 2 and f"init_from: {info.uri} -> " in words, words


def test_the_test_split_may_be_left_alone(place, capsys):
    shutil.rmtree(place.shards / "test")
    assert main(place.run("--test-images=0")) == 0
    assert not (place.storage / "new" / "report").exists()
    assert "run folder" in capsys.readouterr().out
    logged = (place.storage / "new" / "metrics.jsonl").read_text()
    assert '"val/psnr"' in logged and '"test/' not in logged
