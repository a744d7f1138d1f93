"""Rows by number: whatever is open, whatever is damaged, however far away."""

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import SPEC, digest, opened, published, rows_of, same

from mambaflow.config import TrainConfig
from mambaflow.data.batches import Batches, Layout
from mambaflow.data.shard_reader import Fetcher, ShardSet
from mambaflow.data.shards import (
    Manifest,
    ShardError,
    ShardInfo,
    shard_name,
    to_bytes,
    write_manifest,
)
from mambaflow.storage import at


def test_every_flipped_byte_is_refused_by_name(tmp_path):
    root = published(tmp_path / "data", counts=(10, 10))
    file = tmp_path / "data" / "train" / shard_name(1)
    data = file.read_bytes()
    for place in {*range(0, len(data), 61), 0, len(data) - 1}:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        shards = ShardSet(str(root), "train")
        shards.rows(np.arange(10))  # the other one is good
        with pytest.raises(ShardError, match=r"train/shard-00001\.parquet is damaged: .*stage"):
            shards.rows(np.array([3, 12]))
    file.write_bytes(data)
    same(ShardSet(str(root), "train").rows(np.arange(20)), rows_of(SPEC, 0, 20))


def test_a_shard_with_another_spec_or_fewer_rows_than_the_manifest_says_is_refused(tmp_path):
    for changed in (
        lambda: to_bytes(rows_of(replace(SPEC, mask_seed=4)), replace(SPEC, mask_seed=4)),
        lambda: to_bytes(rows_of(SPEC, 0, 9), SPEC),
    ):
        published(tmp_path, counts=(10,))
        split, data = at(tmp_path).child("train"), changed()
        split.write(shard_name(0), data)
        info = ShardInfo(shard_name(0), 10, len(data), digest(data))
        write_manifest(split, Manifest(SPEC, [info]))
        with pytest.raises(ShardError, match=r"shard-00000.parquet has \d+ rows of spec"):
            ShardSet(str(tmp_path), "train").rows(np.arange(2))


def test_a_listed_shard_that_is_gone_is_refused_by_name(tmp_path):
    published(tmp_path)
    (tmp_path / "train" / shard_name(2)).unlink()
    shards = ShardSet(str(tmp_path), "train")
    shards.rows(np.arange(20))
    with pytest.raises(ShardError, match=r"shard-00002.parquet is listed and not there; stage"):
        shards.rows(np.array([20]))


def test_a_split_that_is_not_staged_is_refused_with_a_cure(tmp_path):
    with pytest.raises(ShardError, match=r"train/manifest.json is not there: .*run jobs/stage.py"):
        ShardSet(str(tmp_path), "train")


@given(
    numbers=st.lists(st.integers(0, 23), max_size=40),
    memory=st.sampled_from([0, 3000, 6000, 2**31]),
)
@settings(deadline=None, max_examples=60)
def test_rows_come_in_the_order_asked_for_whatever_fits_in_memory(split_root, numbers, memory):
    shards = ShardSet(split_root, "train", memory=memory)
    everything = rows_of(SPEC, 0, 24)
    wanted = np.array(numbers, np.int64)
    for _ in range(2):
        same(shards.rows(wanted), everything.take(wanted))
        assert len(opened(shards)) <= shards.capacity
    bare, chosen = shards.rows(wanted, pixels=False), shards.rows(wanted, images=False)
    assert bare.index.shape == bare.rgb.shape == (len(wanted), 0) and chosen.images is None
    assert np.array_equal(bare.images, everything.take(wanted).images)
    assert np.array_equal(chosen.rgb, everything.take(wanted).rgb)
    touched = {0 if n < 10 else 1 if n < 20 else 2 for n in numbers}
    if shards.capacity == 3:
        assert set(opened(shards)) == touched  # and no shard that was not needed


@pytest.fixture(scope="module")
def split_root(tmp_path_factory):
    return str(published(tmp_path_factory.mktemp("shards")))


def test_the_shard_unused_for_longest_makes_room(split_root):
    row = ShardSet(split_root, "train").rows(np.arange(1)).nbytes
    shards = ShardSet(split_root, "train", memory=2 * 10 * row)
    assert shards.capacity == 2
    for number, expected in ((0, [0]), (10, [0, 1]), (1, [0, 1]), (20, [0, 2]), (11, [1, 2])):
        shards.rows(np.array([number]))
        assert opened(shards) == expected


def test_rows_are_copies_that_the_caller_may_change(split_root):
    shards = ShardSet(split_root, "train")
    shards.rows(np.arange(5)).rgb[:] = 0
    same(shards.rows(np.arange(5)), rows_of(SPEC, 0, 5))


@pytest.mark.parametrize("numbers", [[-1], [24], [0, 99]])
def test_rows_beyond_the_split_are_refused(split_root, numbers):
    with pytest.raises(ValueError, match=r"row_numbers \(.*must be in \[0, 24\), the rows of "):
        ShardSet(split_root, "train").rows(np.array(numbers))


def test_a_shard_without_rows_is_stepped_over(tmp_path):
    published(tmp_path, counts=(3, 0, 2))
    same(ShardSet(str(tmp_path), "train").rows(np.arange(5)), rows_of(SPEC, 0, 5))


def read_all(arguments):
    uri, cache, environment = arguments
    os.environ.update(environment)
    return ShardSet(uri, "train", cache=cache).rows(np.arange(24)).rgb


@pytest.mark.s3
def test_many_processes_share_one_copy_of_far_shards(bucket, tmp_path):
    published(bucket)
    far = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        found = list(pool.map(read_all, [(bucket, tmp_path / "cache", far)] * 6))
    for rgb in found:
        assert np.array_equal(rgb, rows_of(SPEC, 0, 24).rgb)
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 3
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.s3
def test_a_far_shard_is_fetched_once_and_a_damaged_copy_again(bucket, tmp_path, monkeypatch):
    published(bucket)
    fetched = []
    download = type(at(bucket)).download
    monkeypatch.setattr(
        type(at(bucket)),
        "download",
        lambda self, key, path: fetched.append(key) or download(self, key, path),
    )

    def read():
        fetched.clear()
        same(ShardSet(bucket, "train", cache=tmp_path).rows(np.arange(24)), rows_of(SPEC, 0, 24))
        return fetched

    assert len(read()) == 3
    assert read() == []
    next(tmp_path.glob("*.parquet")).write_bytes(b"cut off")
    assert len(read()) == 1


@pytest.mark.s3
def test_a_far_shard_that_is_damaged_is_refused_until_it_is_mended(bucket, tmp_path):
    published(bucket)
    split = at(bucket).child("train")
    data = split.read(shard_name(0))
    split.write(shard_name(0), data[:-1] + b"!")
    for _ in range(2):
        with pytest.raises(ShardError, match=rf"{bucket}/train/shard-00000.parquet is damaged"):
            ShardSet(bucket, "train", cache=tmp_path).rows(np.arange(3))
    split.write(shard_name(0), data)
    same(ShardSet(bucket, "train", cache=tmp_path).rows(np.arange(3)), rows_of(SPEC, 0, 3))


def row_bytes(root):
    return ShardSet(str(root), "train").rows(np.arange(1)).nbytes


@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any),
    capacity=st.integers(1, 9),
)
@settings(deadline=None, max_examples=40)
def test_the_shards_of_a_window_may_be_open_together(tmp_path_factory, counts, capacity):
    root = published(tmp_path_factory.mktemp("shards"), counts=counts)
    shards = ShardSet(str(root), "train", memory=capacity * max(counts) * row_bytes(root))
    ends = np.cumsum(counts)
    for first in range(0, len(shards), shards.shuffle_block):
        rows = np.arange(first, min(first + shards.shuffle_block, len(shards)))
        touched = len(np.unique(np.searchsorted(ends, rows, side="right")))
        assert touched <= max(shards.capacity, 2 if shards.capacity == 1 else 0)
    if capacity >= len([c for c in counts if c]):
        assert shards.shuffle_block >= len(shards)


def test_an_expected_shard_is_fetched_before_it_is_asked_for_and_only_once(tmp_path, monkeypatch):
    fetched, verified = [], Fetcher._verified

    def watched(self, info):
        fetched.append((info.name, threading.current_thread() is threading.main_thread()))
        return verified(self, info)

    monkeypatch.setattr(Fetcher, "_verified", watched)
    shards = ShardSet(str(published(tmp_path)), "train")
    shards.expect(np.arange(10, 24))
    shards.expect(np.arange(10, 24))
    wait(shards._fetcher._coming.values(), timeout=30)
    assert sorted(fetched) == [(shard_name(1), False), (shard_name(2), False)]
    assert opened(shards) == []
    same(shards.rows(np.arange(10, 24)), rows_of(SPEC, 10, 14))
    shards.expect(np.arange(10, 24))
    assert len(fetched) == 2


def test_no_more_is_expected_than_may_be_open(tmp_path):
    root = published(tmp_path)
    shards = ShardSet(str(root), "train", memory=10 * row_bytes(root))
    shards.expect(np.arange(24))
    assert shards.capacity == 1 and list(shards._fetcher._coming) == [0]
    same(shards.rows(np.arange(24)), rows_of(SPEC, 0, 24))


def test_a_damaged_shard_that_was_expected_is_refused_when_it_is_asked_for(tmp_path):
    root = published(tmp_path)
    (tmp_path / "train" / shard_name(1)).write_bytes(b"cut off")
    shards = ShardSet(str(root), "train")
    shards.expect(np.arange(24))
    same(shards.rows(np.arange(10)), rows_of(SPEC, 0, 10))
    with pytest.raises(ShardError, match=r"shard-00001.parquet is damaged"):
        shards.rows(np.arange(10, 12))


def test_a_fetch_that_failed_is_tried_again_when_its_rows_are_asked_for(tmp_path):
    root = published(tmp_path)
    whole = (tmp_path / "train" / shard_name(1)).read_bytes()
    (tmp_path / "train" / shard_name(1)).write_bytes(b"cut off")
    shards = ShardSet(str(root), "train")
    shards.expect(np.arange(10, 12))
    assert isinstance(shards._fetcher._coming[1].exception(30), ShardError)
    (tmp_path / "train" / shard_name(1)).write_bytes(whole)
    same(shards.rows(np.arange(10, 12)), rows_of(SPEC, 10, 2))


def test_a_closed_set_leaves_what_it_expected(tmp_path, monkeypatch):
    begun, going = [], threading.Event()

    def slow(self, info):
        begun.append(info.name)
        going.wait(30)

    monkeypatch.setattr(Fetcher, "_verified", slow)
    shards = ShardSet(str(published(tmp_path, counts=[1] * 40)), "train")
    shards.expect(np.arange(40))
    threading.Timer(0.5, going.set).start()
    shards.close()
    assert 1 <= len(begun) <= 8 < len(shards._fetcher._coming)


@pytest.mark.s3
def test_training_never_asks_for_a_far_shard_whose_fetch_has_not_begun(
    bucket, tmp_path, monkeypatch
):
    published(bucket, counts=[10] * 12)
    shards = ShardSet(bucket, "train", cache=tmp_path, memory=3 * 10 * row_bytes(bucket))
    late, begin, take = [], Fetcher.begin, Fetcher.take

    def watched(self, number):
        late.append(number not in self._coming)
        return take(self, number)

    def before(self, numbers, most):
        asking = sys._getframe(1).f_code.co_name == "_admit"
        late.extend(True for n in numbers if asking and n not in self._coming)
        begin(self, numbers, most)

    monkeypatch.setattr(Fetcher, "take", watched)
    monkeypatch.setattr(Fetcher, "begin", before)
    layout = Layout(SPEC.size, SPEC.known, SPEC.target)
    batches = Batches(shards, layout, TrainConfig(batch_size=4))
    assert shards.shuffle_block == 20
    for step in range(5):
        batches[step]
    assert sum(late) == 2, "the first block's shards are fetched as they are asked for"
    for step in range(5, 60):
        batches[step]
    assert sum(late) == 2 and len(late) >= 2 + 12
