"""Data are known by what they are: not by a name, a size, a time or an address."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image
from small_shards import SPEC, published, rows_of

from mambaflow.data import staging
from mambaflow.data.claim import CLAIM
from mambaflow.data.folder_source import OF_BYTES
from mambaflow.data.shard_reader import ShardSet, data_hash, other_splits, split_hash
from mambaflow.data.shards import MANIFEST, ShardError, content_of, joined, read_manifest
from mambaflow.data.sources import open_source
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process, stage, stage_once
from mambaflow.storage import at


@pytest.fixture(autouse=True)
def fresh_worker():
    staging._opened.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return small.staged(tmp_path_factory.mktemp("whole"))


def bitmaps(folder: Path, seed: int = 0) -> Path:
    """Pictures without compression: all of them have the same size in bytes."""
    numbers = np.random.default_rng(seed)
    for number in range(12):
        path = folder / "any" / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return folder


def staged(source: Path, out: Path, **changes) -> dict[str, int]:
    config = StageConfig(source=str(source), out=str(out), size=8, validation=2, ray=False,
                         **changes)  # fmt: skip
    opened = open_source(str(source))
    return stage(config, opened, in_process(opened))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_picture_that_is_mended_in_place_is_another_staging_though_its_size_and_time_stay(
    tmp_path,
):
    source, out = bitmaps(tmp_path / "images"), tmp_path / "out"
    staged(source, out)
    picture, before = source / "any/03.bmp", tree(out)
    times, size = picture.stat(), picture.stat().st_size
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert picture.stat().st_size == size
    with pytest.raises(ValueError, match=r"images: \w+ -> \w+\): the files have changed since"):
        staged(source, out)
    assert tree(out) == before
    staged(source, tmp_path / "again")
    assert data_hash(str(out)) != data_hash(str(tmp_path / "again"))


def test_other_labels_of_the_same_files_are_not_taken_for_other_files(tmp_path):
    source, out = bitmaps(tmp_path / "images"), tmp_path / "out"
    staged(source, out)
    unlabelled = open_source(str(source), labels="ignore")
    config = StageConfig(source=str(source), out=str(out), size=8, validation=2, ray=False)
    with pytest.raises(ValueError, match="the same files, of which other columns or labels were"):
        stage(config, unlabelled, in_process(unlabelled))


def test_two_pictures_that_change_places_are_another_staging(tmp_path):
    source, out = bitmaps(tmp_path / "images"), tmp_path / "out"
    staged(source, out)
    one, other = source / "any/03.bmp", source / "any/04.bmp"
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    with pytest.raises(ValueError, match="the files have changed since"):
        staged(source, out)


def test_a_folder_that_is_moved_renamed_or_copied_is_the_same_source(tmp_path):
    source, out = bitmaps(tmp_path / "images"), tmp_path / "out"
    done, before = staged(source, out), tree(out)
    moved = source.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.bmp"):
        os.utime(path, (1, 1))
    assert staged(moved, out)["reused"] == done["shards"]
    assert tree(out) == before


def test_a_staging_of_a_version_that_knew_names_and_sizes_is_not_guessed_to_be_the_same(tmp_path):
    source, out = bitmaps(tmp_path / "images"), tmp_path / "out"
    staged(source, out)
    claim = json.loads((out / CLAIM).read_text())
    for part in claim.values():
        assert part["images"].startswith(OF_BYTES)
        part["images"] = "0123456789abcdef"
    (out / CLAIM).write_text(json.dumps(claim))
    with pytest.raises(ValueError, match="an earlier version knew files by names and sizes"):
        staged(source, out)
    assert data_hash(str(out))  # what is there can be trained on


OTHERS = {
    "another mask seed": ({"mask_seed": 7}, "train: .*validation: .*test: .*"),
    "another size": ({"size": 6, "reduce": 2}, "train: .*validation: .*test: .*"),
    "another share": ({"known_ratio": 0.3}, "train: .*validation: .*test: .*"),
    "fewer images": ({"limit": 16}, "train: [^:]*$"),
    "other validation images": ({"validation": 9}, r"train: [^:]*validation: [^:]*$"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_hash_says_what_is_in_which_split(whole, tmp_path, case):
    changes, said = OTHERS[case]
    other = small.staged(tmp_path, **changes)
    was, now = data_hash(str(whole)), data_hash(str(other))
    changed = other_splits(was, now)
    assert was != now and re.fullmatch(said, changed), changed


def test_the_hash_hangs_neither_on_the_address_nor_on_how_rows_are_cut_and_named(whole, tmp_path):
    was = data_hash(str(whole))
    assert data_hash(str(small.staged(tmp_path / "a"))) == was
    assert data_hash(str(small.staged(tmp_path / "b", rows_per_shard=7))) == was
    source = small.images(tmp_path / "by another name")
    config = StageConfig(source=str(source), out=str(tmp_path / "c"), size=12, ray=False,
                         validation=small.VALIDATION, full_images=True)  # fmt: skip
    stage(config, open_source(str(source)), in_process(open_source(str(source))))
    assert data_hash(str(tmp_path / "c")) == was
    shutil.copytree(whole, tmp_path / "d")
    assert data_hash(str(tmp_path / "d")) == was and len(set(was.split("-"))) == 3


def test_one_colour_one_label_and_one_masked_pixel_are_other_rows():
    rows = rows_of(SPEC)
    was = content_of(rows)
    for name in ("ids", "labels", "index", "rgb", "images"):
        changed = getattr(rows, name).copy()
        changed.flat[3] ^= 1
        assert content_of(replace(rows, **{name: changed})) != was, name
    assert content_of(replace(rows, images=None)) != was
    backwards = rows.take(np.arange(len(rows))[::-1])
    assert content_of(backwards) == was == joined([was])
    first, last = rows.take(np.arange(4)), rows.take(np.arange(4, 10))
    assert joined([content_of(first), content_of(last)]) == was


def forgotten(root: Path) -> Path:
    """As earlier versions wrote it: manifests that do not say what rows hold."""
    for path in root.glob(f"*/{MANIFEST}"):
        about = json.loads(path.read_text())
        del about["contents"], about["data"]
        path.write_text(json.dumps(about))
    return root


def test_data_of_an_earlier_version_are_read_for_their_hash(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "old")
    old = str(forgotten(tmp_path / "old"))
    assert data_hash(old) == data_hash(str(whole))
    assert data_hash(old, read=False) == ""
    shard = tmp_path / "old/train/shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ShardError, match=r"train/shard-00001.parquet is damaged"):
        data_hash(old)


def test_a_shard_that_was_staged_by_an_earlier_version_is_taken_with_its_hash(tmp_path):
    source, out = bitmaps(tmp_path / "images"), tmp_path / "out"
    staged(source, out)
    was = data_hash(str(out))
    for note in out.glob("*/staging/*.json"):
        about = json.loads(note.read_text())
        del about["content"]
        note.write_text(json.dumps(about))
    forgotten(out)
    assert staged(source, out)["reused"] == 3
    assert data_hash(str(out), read=False) == was


def test_a_hash_is_of_the_files_that_are_listed_and_not_of_their_names(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    published(one)
    published(other, replace(SPEC, mask_seed=4))
    # A manifest that came to list another file says nothing of it, and is not believed.
    manifest = read_manifest(at(one).child("train"))
    theirs = read_manifest(at(other).child("train"))
    said = replace(manifest, contents={s.sha256: "1" for s in theirs.shards})
    assert said.hash == "" and replace(theirs, contents=said.contents).hash


def test_shards_that_changed_places_between_two_folders_are_refused(whole, tmp_path):
    other = small.staged(tmp_path / "other", mask_seed=7)
    here = tmp_path / "here"
    shutil.copytree(whole, here)
    name = "train/shard-00001.parquet"
    shutil.copy(other / name, here / name)
    with pytest.raises(ShardError, match=r"train/shard-00001.parquet is damaged"):
        ShardSet(str(here), "train").rows(np.arange(40))


def test_a_manifest_whose_hash_is_not_that_of_its_rows_contradicts_itself(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "d")
    path = tmp_path / "d/test" / MANIFEST
    path.write_text(path.read_text().replace(split_hash(at(whole).child("test")), "0" * 12))
    with pytest.raises(ShardError, match="contradicts itself"):
        data_hash(str(tmp_path / "d"))


@pytest.mark.s3
def test_a_cache_that_served_one_bucket_gives_another_its_own_rows(whole, tmp_path, bucket):
    other = small.staged(tmp_path / "other", mask_seed=7)
    found = []
    for name, folder in (("a", whole), ("b", other)):
        far = at(f"{bucket}/{name}")
        for path in folder.rglob("*"):
            if path.is_file():
                far.write(path.relative_to(folder).as_posix(), path.read_bytes())
        rows = ShardSet(far.uri, "train", cache=tmp_path / "cache").rows(np.arange(40))
        found.append(content_of(rows))
        assert data_hash(far.uri) == data_hash(str(folder))
    assert found[0] != found[1]


# Embedded data: a name and a folder


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"train": 30, "validation": 256, "test": 20}
    monkeypatch.setattr("mambaflow.data.sample.SAMPLE_COUNTS", sizes)


def test_what_only_lies_where_the_sample_would_is_not_taken_for_it(tmp_path, tiny):
    small.staged(tmp_path / "made")
    shutil.copytree(tmp_path / "made/shards", tmp_path / "sample")
    before = tree(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"data \(='sample'\) .* holds another train split .*"
        r"source: images -> sample.*use --data .*/sample for what is there",
    ):
        stage_once("sample", tmp_path)  # fmt: skip
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("changes", "said"), [
    ({"mask_seed": 7}, "mask_seed: 7 -> 42"), ({"limit": 9}, "count: 9 -> 30"),
    ({"size": 16, "reduce": 2}, "size: 16 -> 32"), ({"labels": "ignore"}, "labels ignored"),
])  # fmt: skip
def test_the_sample_staged_otherwise_is_not_what_its_name_means(tmp_path, tiny, changes, said):
    config = StageConfig(source="sample", out=str(tmp_path / "sample"), ray=False, **changes)
    source = staging.opened(config)
    stage(config, source, in_process(source))
    with pytest.raises(ValueError, match=said):
        stage_once("sample", tmp_path)


def test_the_sample_staged_by_hand_or_by_an_earlier_version_is_the_sample(tmp_path, tiny, caplog):
    config = StageConfig(source="sample", out=str(tmp_path / "sample"), ray=False)
    source = open_source("sample")
    stage(config, source, in_process(source))
    forgotten(tmp_path / "sample")
    assert stage_once("sample", tmp_path) == config.out
    (tmp_path / "sample" / CLAIM).unlink()
    assert stage_once("sample", tmp_path) == config.out
    assert "its images are taken for those of sample" in caplog.text


def test_other_photographs_are_not_the_sample(tmp_path, tiny, monkeypatch):
    stage_once("sample", tmp_path)
    made = open_source("sample").fingerprint
    monkeypatch.setattr("mambaflow.data.sample.Sample.fingerprint", "of others")
    with pytest.raises(ValueError, match=rf"images: {made} -> of others"):
        stage_once("sample", tmp_path)


def test_cifar10_is_known_without_its_files(tmp_path):
    small.staged(tmp_path / "made")
    shutil.copytree(tmp_path / "made/shards", tmp_path / "cifar10")
    with pytest.raises(ValueError, match="source: images -> cifar10"):
        stage_once("cifar10", tmp_path)
