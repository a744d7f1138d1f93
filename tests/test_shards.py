"""Shards: a round trip for any recipe, and no damage that goes unnamed."""

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambaflow.pixels import choose
from mambaflow.shards import (
    MANIFEST,
    Manifest,
    Recipe,
    ShardError,
    ShardInfo,
    ShardSet,
    encode,
    from_bytes,
    read_manifest,
    shard_name,
    to_bytes,
    write_manifest,
)
from mambaflow.storage import at

RECIPE = Recipe(
    source="test", split="train", size=6, known=7, target=7, mask_seed=3, full_images=True,
    rows_per_shard=10,
)  # fmt: skip


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def rows_of(recipe, first=0, count=10):
    ids = np.arange(first, first + count)
    images = pictures(first + count, recipe.size)[first:]
    return encode(images, ids % 128, ids, recipe)


def published(root, recipe=RECIPE, counts=(10, 10, 4)):
    """A split in shards of so many rows."""
    split, infos, first = at(root).child(recipe.split), [], 0
    for number, count in enumerate(counts):
        data = to_bytes(rows_of(recipe, first, count), recipe)
        split.write(shard_name(number), data)
        infos.append(ShardInfo(shard_name(number), count, len(data), digest(data)))
        first += count
    write_manifest(split, Manifest(recipe, infos))
    return root


def digest(data):
    return hashlib.sha256(data).hexdigest()


def same(one, other):
    for name in ("ids", "labels", "index", "rgb", "images"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a, b), name


@st.composite
def recipes(draw):
    size = draw(st.integers(1, 16))
    known = draw(st.integers(1, size * size))
    return Recipe(
        source=draw(st.text(max_size=8)),
        split=draw(st.sampled_from(["train", "validation", "test"])),
        size=size,
        known=known,
        target=draw(st.integers(0, size * size - known)),
        mask_seed=draw(st.integers(0, 2**32 - 1)),
        full_images=draw(st.booleans()),
        rows_per_shard=draw(st.integers(1, 2000)),
    )


@given(recipe=recipes(), count=st.integers(0, 12), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None)
def test_a_shard_of_any_recipe_survives_the_way_to_bytes_and_back(recipe, count, seed, data):
    ids = np.array(
        data.draw(st.lists(st.integers(0, 2**60), min_size=count, max_size=count)), np.int64
    )
    labels = np.arange(count) % 129 - 1
    images = pictures(count, recipe.size, seed)
    rows = encode(images, labels, ids, recipe)
    written = to_bytes(rows, recipe)
    assert written == to_bytes(rows, recipe)
    back, found = from_bytes(written, "name")
    same(back, rows)
    assert found == recipe


@given(recipe=recipes(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_the_kept_colours_are_those_of_the_image_at_the_kept_places(recipe, seed):
    images, ids = pictures(3, recipe.size, seed), np.array([4, 0, 2**40])
    rows = encode(images, np.zeros(3, np.int64), ids, recipe)
    masks = choose(recipe.mask_seed, recipe.split, torch.from_numpy(ids), recipe.size,
                   recipe.known, recipe.target)  # fmt: skip
    for image, index, rgb, mask in zip(images, rows.index, rows.rgb, masks, strict=True):
        assert index.tolist() == mask.tolist()
        for pixel, colour in zip(index.tolist(), rgb.reshape(-1, 3).tolist(), strict=True):
            assert image[pixel // recipe.size, pixel % recipe.size].tolist() == colour
    assert (rows.images is not None) == recipe.full_images


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images \(5, 6, 3\) must be \(6, 6, 3\)"):
        encode(pictures(2, 6)[:, :5], np.zeros(2, np.int64), np.arange(2), RECIPE)


@pytest.mark.parametrize("field", [f for f in RECIPE.__dataclass_fields__])
def test_the_hash_of_a_recipe_is_of_every_field(field):
    value = getattr(RECIPE, field)
    other = (not value) if isinstance(value, bool) else value + type(value)(1)
    assert replace(RECIPE, **{field: other}).hash != RECIPE.hash


def test_every_truncation_of_a_shard_is_refused_by_name():
    data = to_bytes(rows_of(RECIPE), RECIPE)
    for length in {*range(0, len(data), 97), 0, 1, 4, 8, len(data) - 1, len(data) - 4}:
        with pytest.raises(ShardError, match=r"shard SOME/NAME is not whole Parquet"):
            from_bytes(data[:length], "SOME/NAME")


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
    same(ShardSet(str(root), "train").rows(np.arange(20)), rows_of(RECIPE, 0, 20))


def replaced(table, name, column):
    return table.set_column(table.column_names.index(name), name, column)


def odd_shards():
    """(what is wrong, a shard with it) for shards that are whole Parquet."""
    table = pq.read_table(pa.BufferReader(to_bytes(rows_of(RECIPE), RECIPE)))
    about = json.loads(table.schema.metadata[b"mambaflow"])
    wide = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(150, np.uint16)), 15)
    beyond = pa.FixedSizeListArray.from_arrays(pa.array(np.full(140, 36, np.uint16)), 14)
    empty = pa.array([None] + [[0] * 42] * 9, pa.list_(pa.uint8(), 42))

    def said(**changes):
        text = json.dumps(about | changes).encode()
        return table.replace_schema_metadata({b"mambaflow": text})

    return {
        "has no mambaflow metadata: it is another kind": table.replace_schema_metadata({}),
        "has damaged metadata": table.replace_schema_metadata({b"mambaflow": b"{"}),
        "has damaged metadata: TypeError": said(colour="red"),
        "has format 2, not 1; stage the data again": said(format=2),
        r"lacks the column\(s\) \['rgb'\]": table.drop_columns(["rgb"]),
        r"lacks the column\(s\) \['image'\]": table.drop_columns(["image"]),
        "column index is .*, not lists of 14 values": replaced(table, "index", wide),
        "column rgb is int64, not lists of 42": replaced(table, "rgb", table["id"]),
        "column rgb has 1 empty rows": replaced(table, "rgb", empty),
        "has a pixel index 36 beyond a 6 x 6 image": replaced(table, "index", beyond),
    }


@pytest.mark.parametrize("wrong", odd_shards())
def test_a_shard_that_breaks_a_rule_is_refused_by_name_and_rule(wrong):
    sink = pa.BufferOutputStream()
    pq.write_table(odd_shards()[wrong], sink)
    with pytest.raises(ShardError, match=f"shard SOME/NAME:? {wrong}"):
        from_bytes(sink.getvalue().to_pybytes(), "SOME/NAME")


def test_a_shard_with_another_recipe_or_fewer_rows_than_the_manifest_says_is_refused(tmp_path):
    for changed in (
        lambda: to_bytes(rows_of(replace(RECIPE, mask_seed=4)), replace(RECIPE, mask_seed=4)),
        lambda: to_bytes(rows_of(RECIPE, 0, 9), RECIPE),
    ):
        published(tmp_path, counts=(10,))
        split, data = at(tmp_path).child("train"), changed()
        split.write(shard_name(0), data)
        info = ShardInfo(shard_name(0), 10, len(data), digest(data))
        write_manifest(split, Manifest(RECIPE, [info]))
        with pytest.raises(ShardError, match=r"shard-00000.parquet has \d+ rows of recipe"):
            ShardSet(str(tmp_path), "train").rows(np.arange(2))


def test_a_listed_shard_that_is_gone_is_refused_by_name(tmp_path):
    published(tmp_path)
    (tmp_path / "train" / shard_name(2)).unlink()
    shards = ShardSet(str(tmp_path), "train")
    shards.rows(np.arange(20))
    with pytest.raises(ShardError, match=r"shard-00002.parquet is listed and not there; stage"):
        shards.rows(np.array([20]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged: JSONDecodeError"),
        (lambda text: text.replace(b'"rows"', b'"lines"'), "is damaged"),
        (lambda text: text.replace(b'"mask_seed": 3', b'"mask_seed": 4'), "contradicts itself"),
        (lambda text: text.replace(b'"rows": 24', b'"rows": 25'), "contradicts itself"),
        (lambda text: text.replace(b'"format": 1', b'"format": 7'), "has format 7, not 1"),
        (lambda text: b"\xff\xfe\x00", "is damaged"),
        (lambda text: b"[]", "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_by_name(tmp_path, change, message):
    published(tmp_path)
    file = tmp_path / "train" / MANIFEST
    before = file.read_bytes()
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    with pytest.raises(ShardError, match=rf"train/manifest.json {message}"):
        read_manifest(at(tmp_path).child("train"))


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
    everything = rows_of(RECIPE, 0, 24)
    wanted = np.array(numbers, np.int64)
    for _ in range(2):
        same(shards.rows(wanted), everything.take(wanted))
        assert len(shards.opened) <= shards.capacity
    touched = {0 if n < 10 else 1 if n < 20 else 2 for n in numbers}
    if shards.capacity == 3:
        assert set(shards.opened) == touched  # and no shard that was not needed


@pytest.fixture(scope="module")
def split_root(tmp_path_factory):
    return str(published(tmp_path_factory.mktemp("shards")))


def test_the_shard_unused_for_longest_makes_room(split_root):
    row = ShardSet(split_root, "train").rows(np.arange(1)).nbytes
    shards = ShardSet(split_root, "train", memory=2 * 10 * row)
    assert shards.capacity == 2
    for number, opened in ((0, [0]), (10, [0, 1]), (1, [0, 1]), (20, [0, 2]), (11, [1, 2])):
        shards.rows(np.array([number]))
        assert shards.opened == opened


def test_rows_are_copies_that_the_caller_may_change(split_root):
    shards = ShardSet(split_root, "train")
    shards.rows(np.arange(5)).rgb[:] = 0
    same(shards.rows(np.arange(5)), rows_of(RECIPE, 0, 5))


@pytest.mark.parametrize("numbers", [[-1], [24], [0, 99]])
def test_rows_beyond_the_split_are_refused(split_root, numbers):
    with pytest.raises(ValueError, match=r"row_numbers \(.*must be in \[0, 24\), the rows of "):
        ShardSet(split_root, "train").rows(np.array(numbers))


def test_a_shard_without_rows_is_stepped_over(tmp_path):
    published(tmp_path, counts=(3, 0, 2))
    same(ShardSet(str(tmp_path), "train").rows(np.arange(5)), rows_of(RECIPE, 0, 5))


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
        assert np.array_equal(rgb, rows_of(RECIPE, 0, 24).rgb)
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
        same(ShardSet(bucket, "train", cache=tmp_path).rows(np.arange(24)), rows_of(RECIPE, 0, 24))
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
    same(ShardSet(bucket, "train", cache=tmp_path).rows(np.arange(3)), rows_of(RECIPE, 0, 3))
