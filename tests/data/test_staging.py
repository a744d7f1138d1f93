"""Staging: what is staged is what was there, whoever dies half-way; and the job's refusals."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_sources import encoded, pictures, write_folder, write_parquet

from jobs import stage as job
from mambaflow.data import staging
from mambaflow.data.claim import CLAIM
from mambaflow.data.remote import SourceError
from mambaflow.data.shard_reader import ShardSet
from mambaflow.data.shards import MANIFEST, ShardError, shard_name
from mambaflow.data.sources import open_source
from mambaflow.data.split_plan import plan
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process, make, opened, stage, stage_once
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.storage import at
from mambaflow.storage_base import StorageError

SIZE, TRAIN, TEST = 8, 60, 10
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def fresh_worker():
    staging._opened.cache_clear()


@pytest.fixture
def source(tmp_path):
    """Folder of Parquet: 60 training images and 10 test images of 8 x 8, all different."""
    folder = tmp_path / "images"
    write_parquet(folder / "train.parquet", [encoded(i) for i in pictures(TRAIN, SIZE)],
                  np.arange(TRAIN) % 10, rows=16)  # fmt: skip
    write_parquet(folder / "test.parquet", [encoded(i) for i in pictures(TEST, SIZE, seed=1)],
                  np.arange(TEST) % 10)  # fmt: skip
    return folder


def config_of(source, out, **changes):
    fields = dict(source=str(source), out=str(out), size=SIZE, validation=8, rows_per_shard=10,
                  ray=False)  # fmt: skip
    return StageConfig(**fields | changes)


def staged(config, run=None):
    opened = open_source(config.source)
    return stage(config, opened, run or in_process(opened))


def contents(out):
    """Every published file of a staging."""
    shards = {key for split in SPLITS for key in at(out).list(f"{split}/")}
    return {key: at(out).read(key) for key in shards if "/staging/" not in key}


def everything(out, split):
    shards = ShardSet(str(out), split)
    return shards.rows(np.arange(len(shards)))


def test_what_is_staged_is_what_was_there(source, tmp_path):
    done = staged(config_of(source, tmp_path / "out", full_images=True))
    assert done == {"train": 52, "validation": 8, "test": 10, "shards": 8, "reused": 0,
                    "corrupt": 0}  # fmt: skip
    train, held = everything(tmp_path / "out", "train"), everything(tmp_path / "out", "validation")
    assert sorted([*train.ids, *held.ids]) == list(range(TRAIN))
    for rows in (train, held):
        assert np.array_equal(rows.images.reshape(-1, SIZE, SIZE, 3), pictures(TRAIN)[rows.ids])
        assert rows.labels.tolist() == (rows.ids % 10).tolist()
    test = everything(tmp_path / "out", "test")
    assert test.ids.tolist() == list(range(TEST))
    assert np.array_equal(test.images.reshape(-1, SIZE, SIZE, 3), pictures(TEST, seed=1))


def test_training_images_are_kept_whole_only_if_asked_for(source, tmp_path):
    staged(config_of(source, tmp_path / "out"))
    assert everything(tmp_path / "out", "train").images is None
    assert everything(tmp_path / "out", "validation").images is not None
    spec = ShardSet(str(tmp_path / "out"), "train").spec
    assert (spec.known, spec.target) == (12, 12)  # a fifth of 64 each, rounded down


def test_equal_stagings_give_equal_bytes_in_any_order(source, tmp_path):
    def backwards(tasks):
        return (make(task) for task in reversed(tasks))

    staged(config_of(source, tmp_path / "one"))
    staged(config_of(source, tmp_path / "other"), backwards)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_limit_draws_from_all_training_images_and_keeps_what_a_smaller_one_does(source, tmp_path):
    kept = {}
    for limit in (6, 13, 26, 52, 99):
        config = config_of(source, tmp_path / str(limit), limit=limit)
        parts = plan(config, open_source(config.source))
        kept[limit] = parts[0].places.tolist()
        assert len(parts[0].places) == min(limit, 52) and len(parts[1].places) == 8
    assert set(kept[6]) < set(kept[13]) < set(kept[26]) < set(kept[52])
    assert (
        kept[52]
        == kept[99]
        == plan(config_of(source, "x"), open_source(str(source)))[0].places.tolist()
    )
    assert kept[13] == sorted(kept[13]) and max(kept[6]) > TRAIN // 2
    assert staged(config_of(source, tmp_path / "out", limit=13))["train"] == 13
    assert everything(tmp_path / "out", "train").ids.tolist() == kept[13]


def test_a_limit_of_a_tree_of_classes_has_images_of_all_classes(tmp_path):
    folder = write_folder(tmp_path / "set", pictures(80, SIZE), ("a", "b", "c", "d"))
    staged(config_of(folder, tmp_path / "out", validation=4, limit=20))
    labels = everything(tmp_path / "out", "train").labels.tolist()
    assert all(labels.count(c) >= 2 for c in range(4))


@pytest.mark.s3
def test_a_staging_in_s3_is_the_local_one(source, tmp_path, bucket):
    staged(config_of(source, tmp_path / "here"))
    staged(config_of(source, f"{bucket}/there"))
    assert contents(f"{bucket}/there") == contents(tmp_path / "here")
    assert staged(config_of(source, f"{bucket}/there"))["reused"] == 8


# Stopped half-way


def dying(after):
    """Makes some shards, and dies."""

    def run(tasks):
        for number, task in enumerate(tasks):
            if number == after:
                raise KeyboardInterrupt
            yield make(task)

    return run


def test_a_staging_that_stopped_publishes_nothing_and_goes_on(source, tmp_path, monkeypatch):
    staged(config_of(source, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        staged(config_of(source, tmp_path / "out"), dying(after=3))
    assert not [key for key in at(tmp_path / "out").list() if key.endswith(MANIFEST)]
    with pytest.raises(ShardError, match="staging did not finish"):
        ShardSet(str(tmp_path / "out"), "train")
    done = staged(config_of(source, tmp_path / "out"))
    assert (done["reused"], done["shards"]) == (3, 8)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("out", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_kill_9_loses_only_unfinished_shards(tmp_path, out, request):
    images = [encoded(i) for i in pictures(900, SIZE)]
    file = write_parquet(tmp_path / "f.parquet", images, np.zeros(900, int), rows=300)
    place = str(tmp_path / "out") if out == "local" else request.getfixturevalue("bucket") + "/out"
    flags = f"--source {file} --out {place} --size 8 --rows-per-shard 10 --no-ray".split()
    command = [sys.executable, job.__file__, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    train = at(place).child("train")
    while len(before := train.list("staging/shard-")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    process.stderr.close()
    before = train.list("staging/shard-")
    assert not train.exists(MANIFEST) and len(before) < 39
    made = Counter()

    def counting(tasks):
        for task in tasks:
            done = make(task)
            made[done.reused] += 1
            yield done

    config = StageConfig(source=str(file), out=place, size=8, rows_per_shard=10, ray=False)
    staged(config, counting)
    total = 39 + 2 * 26  # 900 - 2 x 256 training images, and 256 of each other split
    assert made == {True: len(before), False: total - len(before)}
    staged(replace(config, out=str(tmp_path / "whole")))
    assert contents(place) == contents(tmp_path / "whole")


def damage_byte(folder):
    file = folder / shard_name(1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_length(folder):
    file = folder / shard_name(1)
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": damage_byte,
    "a lost end": damage_length,
    "a lost shard": lambda folder: (folder / shard_name(1)).unlink(),
    "a lost note": lambda folder: (folder / f"staging/{shard_name(1)}.json").unlink(),
    "a cut note": lambda folder: (folder / f"staging/{shard_name(1)}.json").write_bytes(b"{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_shard_that_is_damaged_is_made_again(source, tmp_path, damage):
    config = config_of(source, tmp_path / "out")
    staged(config)
    before = contents(config.out)
    DAMAGES[damage](tmp_path / "out" / "train")
    done = staged(config)
    assert (done["reused"], done["shards"]) == (7, 8)
    assert contents(config.out) == before


@pytest.mark.parametrize("decoder", [None, 1])
def test_a_shard_of_a_version_that_decoded_otherwise_is_made_again(source, tmp_path, decoder):
    config = config_of(source, tmp_path / "out")
    staged(config)
    file = tmp_path / f"out/train/staging/{shard_name(1)}.json"
    note = json.loads(file.read_text())
    del note["decoder"]
    file.write_text(json.dumps(note | ({"decoder": decoder} if decoder else {})))
    assert staged(config)["reused"] == 7
    assert staged(config)["reused"] == 8


def test_a_damaged_manifest_is_mended_by_staging_again(source, tmp_path):
    config = config_of(source, tmp_path / "out")
    staged(config)
    before = contents(config.out)
    at(config.out).write(f"train/{MANIFEST}", b"{")
    assert staged(config)["reused"] == 8
    assert contents(config.out) == before


# Somebody else's shards


CHANGES = [
    ({"mask_seed": 7}, "mask_seed: 42 -> 7"),
    ({"known_ratio": 0.3}, "known: 12 -> 19"),
    ({"rows_per_shard": 20}, "rows_per_shard: 10 -> 20"),
    ({"full_images": True}, "full_images: False -> True"),
    ({"limit": 5}, "count: 52 -> 5"),
    ({"validation": 4}, "count: 52 -> 56"),
    ({"reduce": 2, "size": 4, "known_ratio": 0.75, "target_ratio": 0.25}, "reduce: 1 -> 2"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_another_staging_in_the_way_is_refused_and_left_alone(
    source, tmp_path, change, said, finished
):
    config = config_of(source, tmp_path / "out")
    if finished:
        staged(config)
    else:
        with pytest.raises(KeyboardInterrupt):
            staged(config, dying(after=1))
    before = contents(config.out)
    with pytest.raises(ValueError, match=f"holds another staging of train .*{said}.*another --out"):
        staged(replace(config, **change))
    assert contents(config.out) == before
    assert staged(config)["reused"] == (8 if finished else 1)


def test_other_images_of_the_same_name_are_refused(source, tmp_path):
    config = config_of(source, tmp_path / "out")
    staged(config)
    images = [encoded(i) for i in pictures(TRAIN, SIZE, seed=5)]
    write_parquet(source / "train.parquet", images, np.arange(TRAIN) % 10)
    with pytest.raises(ValueError, match=r"holds another staging of train \(images: \w+ -> \w+\)"):
        staged(config)


def test_a_manifest_without_a_claim_still_refuses_another_spec(source, tmp_path):
    config = config_of(source, tmp_path / "out")
    staged(config)
    at(config.out).delete(CLAIM)
    with pytest.raises(ValueError, match="holds another staging of train .*mask_seed: 42 -> 1"):
        staged(replace(config, mask_seed=1))
    assert not at(config.out).exists(CLAIM)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"train": 1}'])
def test_a_damaged_claim_is_refused_by_name(source, tmp_path, text):
    (tmp_path / "claim.json").write_text(text)
    with pytest.raises(ValueError, match="holds a claim.json that is damaged .*; give another"):
        staged(config_of(source, tmp_path))


def test_a_note_of_another_staging_is_refused(source, tmp_path):
    config = config_of(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        staged(config, dying(after=2))
    at(config.out).delete(CLAIM)
    with pytest.raises(ValueError, match=r"holds a shard of another staging \(train/shard-00000"):
        staged(replace(config, mask_seed=1))


def test_shards_left_by_a_longer_staging_are_no_part_of_the_next(source, tmp_path):
    config = config_of(source, tmp_path / "out")
    staged(config)
    for key in (CLAIM, f"train/{MANIFEST}"):
        at(config.out).delete(key)
    at(config.out).delete_tree("train/staging/")
    staged(replace(config, limit=12))
    assert len(at(config.out).child("train").list("shard-")) == 6
    assert len(everything(config.out, "train")) == 12


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["the same", "another"])
def test_two_processes_staging_to_one_place_never_mix(source, tmp_path, seeds):
    common = f"--source {source} --out {tmp_path / 'out'} --size 8 --validation 8 --no-ray".split()
    processes = [
        subprocess.Popen(
            [sys.executable, job.__file__, *common, "--rows-per-shard=2", f"--mask-seed={seed}"],
            stderr=subprocess.PIPE,
        )
        for seed in seeds
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    codes = [process.returncode for process in processes]
    if seeds[0] == seeds[1]:
        assert codes == [0, 0], errors
        winner = seeds[0]
    else:
        assert sorted(codes) == [0, 2], errors
        winner = seeds[codes.index(0)]
        assert "another staging" in errors[codes.index(2)]
    for split in SPLITS:
        assert everything(tmp_path / "out", split) is not None
        assert ShardSet(str(tmp_path / "out"), split).spec.mask_seed == winner


# Reduced images


def reducing(source, out, **changes):
    return config_of(source, out, reduce=2, size=SIZE // 2, **changes)


def without_reduction(value):
    """What staging wrote before it could reduce: its fields by name."""
    assert "reduce" not in json.dumps(value)
    return value


def test_a_reduced_staging_holds_the_area_means_under_the_ids_of_the_whole_images(source, tmp_path):
    staged(config_of(source, tmp_path / "whole", full_images=True))
    staged(reducing(source, tmp_path / "half", full_images=True))
    for split in SPLITS:
        whole, half = everything(tmp_path / "whole", split), everything(tmp_path / "half", split)
        assert half.ids.tolist() == whole.ids.tolist()
        assert half.labels.tolist() == whole.labels.tolist()
        blocks = whole.images.reshape(-1, SIZE // 2, 2, SIZE // 2, 2, 3).astype(int)
        means = np.floor(blocks.mean((2, 4)) + 0.5)  # sums of 4 bytes are exact in float64
        assert np.array_equal(half.images.reshape(means.shape), means)
        spec = ShardSet(str(tmp_path / "half"), split).spec
        assert (spec.size, spec.known, spec.reduce) == (4, 3, 2)
        assert ShardSet(str(tmp_path / "whole"), split).spec.reduce == 1


def test_a_staging_that_reduces_nothing_says_nothing_of_it(source, tmp_path):
    """Hence its claim, and the hash in every shard, are those of before there was the field."""
    staged(config_of(source, tmp_path / "out", reduce=1))
    claim = without_reduction(json.loads(at(tmp_path / "out").read(CLAIM)))
    assert set(claim["train"]) == {
        "source", "split", "size", "known", "target", "mask_seed", "full_images",
        "rows_per_shard", "images", "count", "places",
    }  # fmt: skip
    for split in SPLITS:
        without_reduction(json.loads(at(tmp_path / "out").read(f"{split}/{MANIFEST}")))


def test_the_claims_and_hashes_of_the_sample_are_those_of_before_there_was_a_reduction(tmp_path):
    parts = plan(StageConfig(out=str(tmp_path)), open_source("sample"))
    hashes = ["6dc0ca92a5d9c7ea", "a4bda9e159a12ddc", "e0e5dc719e4f8aba"]
    assert [part.spec.hash for part in parts] == hashes
    claimed = "2c64fc16106e8d1076b387dfa03552952319c54586054712daa1648e253e796a"
    assert next(parts[0].tasks()).claim_hash == claimed


def test_a_reduced_staging_goes_on_and_is_reused(source, tmp_path):
    config = reducing(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        staged(config, dying(after=3))
    assert staged(config)["reused"] == 3
    assert staged(config)["reused"] == 8


def test_whole_images_do_not_take_the_place_of_reduced_ones_of_the_same_size(source, tmp_path):
    """The first image is corrupt, and so no size is told before the claim."""
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    places = plan(config_of(source, tmp_path), open_source(str(source)))[0].places
    images[places[0]] = b""
    write_parquet(source / "train.parquet", images, np.zeros(TRAIN, int))
    config = reducing(source, tmp_path / "out", on_corrupt="count")
    staged(config)
    message = r"holds another staging of train \(reduce: 2 -> 1\)"
    with pytest.raises(ValueError, match=message):
        staged(replace(config, reduce=1))
    at(tmp_path / "out").delete(CLAIM)  # the manifest alone says it too
    with pytest.raises(ValueError, match=message):
        staged(replace(config, reduce=1))


def test_a_size_that_is_not_that_of_the_reduced_images_is_refused(source, tmp_path):
    message = r"reduced 2 times, is 4 x 4 pixels, and size \(=8\) says 8 x 8; .*--size 4 for all"
    with pytest.raises(SourceError, match=message):
        staged(config_of(source, tmp_path / "out", reduce=2))
    assert at(tmp_path / "out").list() == []


def test_an_image_that_cannot_be_reduced_is_refused_by_name(source, tmp_path):
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    images[33] = encoded(np.zeros((8, 9, 3), np.uint8))
    write_parquet(source / "train.parquet", images, np.zeros(TRAIN, int))
    message = r"images, train row 33: reduce \(=2\) must divide height \(=8\) and width \(=9\)"
    with pytest.raises(SourceError, match=message):
        staged(reducing(source, tmp_path / "out"))


# Images that are not as they should be


@pytest.fixture
def spoilt(source):
    """The source with two corrupt training images; returns their places."""
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    images[3], images[40] = images[3][:60], None
    write_parquet(source / "train.parquet", images, np.arange(TRAIN) % 10, rows=16)
    return 3, 40


def test_a_corrupt_image_is_named_and_stops_the_staging(source, tmp_path, spoilt):
    message = r"corrupt image images, train row 3: .+; mend it, or use --on-corrupt count"
    with pytest.raises(SourceError, match=message):
        staged(config_of(source, tmp_path / "out"))
    assert not [key for key in at(tmp_path / "out").list() if key.endswith(MANIFEST)]


def test_corrupt_images_are_counted_named_and_left_out_whole(source, tmp_path, spoilt, caplog):
    config = config_of(source, tmp_path / "out", on_corrupt="count", full_images=True)
    done = staged(config)
    assert done["corrupt"] == 2 and done["train"] + done["validation"] == TRAIN - 2
    for place in spoilt:
        assert f"left out corrupt image images, train row {place}: " in caplog.text
    for split in ("train", "validation"):
        rows = everything(config.out, split)
        assert not set(rows.ids.tolist()) & set(spoilt)
        assert np.array_equal(rows.images.reshape(-1, SIZE, SIZE, 3), pictures(TRAIN)[rows.ids])
        assert rows.labels.tolist() == (rows.ids % 10).tolist()
    # Kept shards remember what they lack: counting goes on, stopping stops.
    assert staged(config) == done | {"reused": done["shards"]}
    with pytest.raises(SourceError, match="corrupt image images, train row"):
        staged(replace(config, on_corrupt="stop"))


def test_the_first_image_may_be_corrupt(source, tmp_path):
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    write_parquet(source / "train.parquet", [b"", *images[1:]], np.zeros(TRAIN, int))
    assert staged(config_of(source, tmp_path / "out", on_corrupt="count"))["corrupt"] == 1


def test_stopping_on_a_corrupt_image_keeps_the_shards_for_counting(source, tmp_path, spoilt):
    config = config_of(source, tmp_path / "out", rows_per_shard=2)
    with pytest.raises(SourceError):
        staged(config)
    assert staged(replace(config, on_corrupt="count"))["reused"] == 1


def test_a_split_of_corrupt_images_alone_is_refused(source, tmp_path):
    write_parquet(source / "test.parquet", [b"x"] * 4, [0] * 4)
    with pytest.raises(SourceError, match="every image of split test is corrupt; mend the source"):
        staged(config_of(source, tmp_path / "out", on_corrupt="count"))


@pytest.mark.parametrize("on_corrupt", ["stop", "count"])
def test_an_image_of_another_size_is_refused_by_name(source, tmp_path, on_corrupt):
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    images[33] = encoded(np.zeros((6, 9, 3), np.uint8))
    write_parquet(source / "train.parquet", images, np.zeros(TRAIN, int))
    message = r"image images, train row 33 is 9 x 6 pixels, and size \(=8\) says 8 x 8; crop"
    with pytest.raises(SourceError, match=message):
        staged(config_of(source, tmp_path / "out", on_corrupt=on_corrupt))


def test_a_source_of_another_size_claims_nothing(source, tmp_path):
    with pytest.raises(SourceError, match=r"row \d+ is 8 x 8 .*size \(=32\).*use --size 8 for all"):
        staged(config_of(source, tmp_path / "out", size=32))
    assert at(tmp_path / "out").list() == []
    staged(config_of(source, tmp_path / "out"))


def test_a_label_beyond_the_format_is_refused_by_name(source, tmp_path):
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    write_parquet(source / "train.parquet", images, [*range(TRAIN - 1), 128])
    with pytest.raises(SourceError, match=r"row 59 has label 128; labels must be in \[-1, 127\]"):
        staged(config_of(source, tmp_path / "out"))


def test_more_classes_than_the_format_has_are_refused_before_anything_is_written(tmp_path):
    classes = [f"c{n:03d}" for n in range(200)]
    folder = write_folder(tmp_path / "set", pictures(400, SIZE), classes)
    message = r"has label \d+; labels must be in \[-1, 127\].*leave them out by --labels ignore"
    with pytest.raises(SourceError, match=message):
        staged(config_of(folder, tmp_path / "out"))
    assert at(tmp_path / "out").list() == []
    config = config_of(folder, tmp_path / "out", labels="ignore")
    without = opened(config)
    assert stage(config, without, in_process(without))["train"] == 400 - 16
    assert set(everything(tmp_path / "out", "train").labels.tolist()) == {-1}


def test_a_label_beyond_the_format_is_refused_before_anything_is_written(source, tmp_path):
    images = [encoded(i) for i in pictures(TRAIN, SIZE)]
    write_parquet(source / "train.parquet", images, [*range(TRAIN - 1), 128])
    with pytest.raises(SourceError, match="row 59 has label 128"):
        staged(config_of(source, tmp_path / "out"))
    assert at(tmp_path / "out").list() == []


def test_workers_read_the_columns_that_were_chosen(source, tmp_path):
    for name in ("train", "test"):
        table = pq.read_table(source / f"{name}.parquet").rename_columns(["picture", "fine_label"])
        pq.write_table(table, source / f"{name}.parquet")
    config = config_of(source, tmp_path / "out", image_column="picture", label_column="fine_label")
    stage(config, opened(config), lambda tasks: [make(task) for task in tasks])
    rows = everything(tmp_path / "out", "test")
    assert rows.labels.tolist() == (rows.ids % 10).tolist()
    other = config_of(source, tmp_path / "out", image_column="picture", labels="ignore")
    with pytest.raises(ValueError, match="holds another staging of train .images:"):
        stage(other, opened(other), in_process(opened(other)))


def test_a_picture_in_two_splits_is_counted_and_named_however_it_was_saved(tmp_path, caplog):
    images = pictures(30, SIZE)
    folder = tmp_path / "set"
    write_folder(folder / "train", images)
    write_folder(folder / "test", pictures(4, SIZE, seed=1))
    (folder / "test/cat/copy.bmp").write_bytes(encoded(images[7], "BMP"))
    (folder / "train/bird/copy.png").write_bytes(encoded(images[0]))  # of one split: no leak
    done = staged(config_of(folder, tmp_path / "out", validation=3))
    assert done["in two splits"] >= 1
    assert f"{folder}/test/cat/copy.bmp = {folder}/train/cat/007.png" in caplog.text
    again = staged(config_of(folder, tmp_path / "out", validation=3))
    assert again["in two splits"] == done["in two splits"] and again["reused"] == again["shards"]


def test_a_validation_split_of_the_source_is_staged_whole_under_its_own_ids(tmp_path):
    folder = tmp_path / "set"
    write_folder(folder / "train", pictures(20, SIZE))
    write_folder(folder / "val", pictures(6, SIZE, seed=1))
    write_folder(folder / "test", pictures(4, SIZE, seed=2))
    done = staged(config_of(folder, tmp_path / "out", validation=3))
    assert (done["train"], done["validation"], done["test"]) == (20, 6, 4)
    held = everything(tmp_path / "out", "validation")
    assert held.ids.tolist() == list(range(6))
    want = {p.tobytes() for p in pictures(6, SIZE, seed=1)}
    assert {image.tobytes() for image in held.images} == want


# Workers anywhere


def test_tasks_mean_the_same_in_any_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = open_source("images")
    tasks = [t for p in plan(config_of("images", "out"), opened) for t in p.tasks()]
    monkeypatch.chdir("/")
    for task in tasks:
        assert task.source == str(source) and task.out == str(tmp_path / "out")
        make(task)
    assert len(at(tmp_path / "out").child("train").list("shard-")) == 6


def test_a_worker_opens_its_source_once(source, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(staging, "open_source", lambda address: opened.append(address) or
                        open_source(address))  # fmt: skip
    staged(config_of(source, tmp_path / "out"), lambda tasks: [make(task) for task in tasks])
    assert opened == [str(source)]


def test_shards_that_a_worker_put_elsewhere_are_missed(source, tmp_path):
    def elsewhere(tasks):
        return [make(replace(task, out=str(tmp_path / "other node"))) for task in tasks]

    with pytest.raises(StorageError, match=r"6 shard\(s\) such as .*a folder that all nodes share"):
        staged(config_of(source, tmp_path / "out"), elsewhere)
    assert not at(tmp_path / "out").exists(f"train/{MANIFEST}")


def test_shards_that_a_worker_never_made_are_missed(source, tmp_path):
    with pytest.raises(StorageError, match=r"2 image\(s\) of train are not at out"):
        staged(config_of(source, tmp_path / "out"), lambda tasks: [make(t) for t in tasks[:5]])


@pytest.mark.ray
@pytest.mark.s3
def test_ray_makes_the_same_bytes_from_relative_paths_to_s3_and_names_corrupt_images(
    source, tmp_path, bucket, monkeypatch, capsys
):
    set_ray_environment()
    from mambaflow.distributed.cluster import connect

    monkeypatch.chdir(tmp_path)
    flags = "--source images --size 8 --validation 8 --rows-per-shard 10".split()
    with connect():
        assert job.main([*flags, "--out", f"{bucket}/ray"]) == 0
        assert "'shards': 8, 'reused': 0" in capsys.readouterr().out
        assert job.main([*flags, "--out", "local"]) == 0  # of this folder, not of the workers'
        images = [encoded(i) for i in pictures(TRAIN, SIZE)]
        (tmp_path / "bad").mkdir()
        write_parquet(tmp_path / "bad/train.parquet", [*images[:9], b"?", *images[10:]],
                      np.zeros(TRAIN, int))  # fmt: skip
        bad = [flag.replace("images", "bad") for flag in flags]
        assert job.main([*bad, "--out", f"{bucket}/bad"]) == 2
        assert "corrupt image bad, train row 9: " in capsys.readouterr().err
        # A source that lies in S3, and that each worker opens there.
        for name in ("train", "test"):
            at(bucket).upload(source / f"{name}.parquet", f"images/{name}.parquet")
        far = [flag.replace("images", f"{bucket}/images") for flag in flags]
        assert job.main([*far, "--out", "far"]) == 0
        assert "'shards': 8, 'reused': 0" in capsys.readouterr().out
    assert contents(tmp_path / "far") == contents(tmp_path / "local")
    staged(config_of(source, tmp_path / "one"))
    assert contents(f"{bucket}/ray") == contents(tmp_path / "one") == contents(tmp_path / "local")


# The job


def test_the_job_says_what_it_did(source, tmp_path, capsys):
    flags = f"--source {source} --out {tmp_path}/out --size 8 --validation 8 --no-ray".split()
    assert job.main(flags) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"staged {source} to {tmp_path}/out: {{'train': 52, 'validation': 8")


def test_the_job_says_what_it_found_before_it_stages(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", pictures(20, SIZE))
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(encoded(pictures(1)[0]))
    (folder / "cat" / "notes.txt").write_bytes(b"x")
    flags = f"--source {folder} --out {tmp_path}/out --size 9 --validation 3 --no-ray".split()
    assert job.main(flags) == 2  # of another size: nothing is written, and yet all is said
    said = capsys.readouterr().err
    for line in (
        "found train 20 images, no validation, no test; validation and test will be cut out of",
        "2 classes: bird, cat", "passed over 1 hidden or left behind", "passed over 1 .txt file(s)",
    ):  # fmt: skip
        assert line in said and said.index(line) < said.index("error:")


def exit_code(flags):
    """The job's, whether it or its parser of flags gives up."""
    try:
        return job.main(flags)
    except SystemExit as ended:
        return ended.code


BAD = [
    ("--source nowhere", r"source \(='nowhere'\) is none of: sample, cifar10"),
    ("--known-ratio 0", r"known_ratio \(=0.0\) must be in \(0, 1\); use 0.2"),
    ("--known-ratio nan", r"known_ratio \(=nan\) must be in \(0, 1\)"),
    ("--target-ratio 0.0001", r"target_ratio \(=0.0001\) keeps no pixel of 32 x 32; use at least"),
    ("--target-ratio 1.5", r"target_ratio \(=1.5\) must be in \(0, 1\)"),
    ("--known-ratio 0.7 --target-ratio 0.4", r"known_ratio \+ target_ratio \(=1.1\) must be at"),
    ("--known-ratio 0.0001", r"known_ratio \(=0.0001\) keeps no pixel of 32 x 32; use at least"),
    ("--size 257", r"size \(=257\) must be in \[1, 256\]"),
    ("--mask-seed -1", r"mask_seed \(=-1\) must be in \[0, 2\^32\)"),
    ("--rows-per-shard 0", r"rows_per_shard \(=0\) must be positive"),
    ("--validation 0", r"validation \(=0\) must be positive"),
    ("--reduce 0", r"reduce \(=0\) must be positive; use 1 or more"),
    ("--reduce 3", r"image sample, train 0: reduce \(=3\) must divide .* use a divisor of 32"),
    ("--reduce 2", r"image sample, train 0, reduced 2 times, is 16 x 16 .* use --size 16 for all"),
    ("--validation 1000", r"validation \(=1000\) must be at most 256"),
    ("--limit -3", r"limit \(=-3\) must not be negative"),
    ("--size 48", r"image sample, train 0 is 32 x 32 pixels, and size \(=48\) says 48 x 48"),
    ("--out gs://bucket/x", r"unknown scheme 'gs'"),
    ("--out s3:///x", r"must name a bucket"),
    ("--out /proc/nothing/here", r"give a folder that you may write to"),
    ("--source {images} --size 8 --validation 60", r"validation \(=60\) leaves nothing to train"),
    ("--source {folder}", r"holds no images in class folders"),
    ("--source {cut}", r"cut.parquet is not whole Parquet"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_answered_with_a_message_and_exit_code_2(
    source, tmp_path, capsys, flags, message
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.parquet").write_bytes((source / "train.parquet").read_bytes()[:-9])
    places = {"images": source, "folder": tmp_path / "folder", "cut": tmp_path / "cut.parquet"}
    given = flags.format(**places).split()
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert exit_code([*given, *out, "--no-ray"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert not list(tmp_path.glob("out/*/manifest.json"))


@pytest.mark.parametrize("flag", ["--on-corrupt=ignore", "--no-such-flag", "--limit=many"])
def test_a_flag_that_cannot_be_ends_with_exit_code_2(flag, capsys):
    assert exit_code([flag]) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.s3
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "set the AWS_SECRET_ACCESS_KEY of this key id"),
        ("AWS_ACCESS_KEY_ID", "SOMEBODY", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_wrong_credentials_end_with_a_cure_and_exit_code_2(
    strict_bucket, source, monkeypatch, capsys, name, value, message
):
    flags = f"--source {source} --out {strict_bucket}/x --size 8 --validation 8 --no-ray".split()
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        assert job.main(flags) == 2
        assert message in capsys.readouterr().err
    assert job.main(flags) == 0


@pytest.mark.s3
def test_a_bucket_that_is_not_there_ends_with_a_cure_and_exit_code_2(bucket, source, capsys):
    flags = f"--source {source} --out s3://not-there-2/x --size 8 --validation 8 --no-ray".split()
    assert job.main(flags) == 2
    assert "create the bucket, or name another" in capsys.readouterr().err


def test_an_embedded_set_is_staged_once(tmp_path, monkeypatch):
    sizes = {"train": 30, "validation": 256, "test": 20}
    monkeypatch.setattr("mambaflow.data.sample.SAMPLE_COUNTS", sizes)
    out = stage_once("sample", tmp_path)
    assert {split: len(ShardSet(out, split)) for split in SPLITS} == sizes
    assert ShardSet(out, "train").spec.full_images
    monkeypatch.setattr(staging, "stage", lambda *_: pytest.fail("staged again"))
    assert stage_once("sample", tmp_path) == out


@pytest.mark.realdata
def test_real_cifar_is_staged_and_read_back(real_cifar, tmp_path):
    done = staged(StageConfig(source=str(real_cifar), out=str(tmp_path), limit=300))
    assert (done["train"], done["validation"], done["test"]) == (300, 256, 512)
    opened, rows = open_source(str(real_cifar)), everything(tmp_path, "validation")
    for image, item in zip(rows.images, opened.items("train", rows.ids), strict=True):
        assert np.array_equal(image.reshape(32, 32, 3), item.pixels)


def test_a_folder_alone_also_gets_a_test_split(tmp_path):
    folder = write_folder(tmp_path / "set", pictures(20, SIZE))
    done = staged(config_of(folder, tmp_path / "out", validation=3))
    assert (done["train"], done["validation"], done["test"]) == (14, 3, 3)
    ids = [everything(tmp_path / "out", split).ids.tolist() for split in SPLITS]
    assert sorted(sum(ids, [])) == list(range(20))
