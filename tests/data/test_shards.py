"""Shards: a round trip for any spec, and no damage that goes unnamed."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import SPEC, pictures, published, rows_of, same

from mambaflow.data.pixels import choose
from mambaflow.data.shards import (
    MANIFEST,
    ShardError,
    ShardSpec,
    encode,
    from_bytes,
    read_manifest,
    to_bytes,
)
from mambaflow.storage import at


@st.composite
def specs(draw):
    size = draw(st.integers(1, 16))
    known = draw(st.integers(1, size * size))
    return ShardSpec(
        source=draw(st.text(max_size=8)),
        split=draw(st.sampled_from(["train", "validation", "test"])),
        size=size,
        known=known,
        target=draw(st.integers(0, size * size - known)),
        mask_seed=draw(st.integers(0, 2**32 - 1)),
        full_images=draw(st.booleans()),
        rows_per_shard=draw(st.integers(1, 2000)),
        reduce=draw(st.integers(1, 4)),
    )


@given(spec=specs(), count=st.integers(0, 12), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None)
def test_a_shard_of_any_spec_survives_the_way_to_bytes_and_back(spec, count, seed, data):
    ids = np.array(
        data.draw(st.lists(st.integers(0, 2**60), min_size=count, max_size=count)), np.int64
    )
    labels = np.arange(count) % 129 - 1
    images = pictures(count, spec.size, seed)
    rows = encode(images, labels, ids, spec)
    written = to_bytes(rows, spec)
    assert written == to_bytes(rows, spec)
    back, found = from_bytes(written, "name")
    same(back, rows)
    assert found == spec


@given(spec=specs(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_the_kept_colours_are_those_of_the_image_at_the_kept_places(spec, seed):
    images, ids = pictures(3, spec.size, seed), np.array([4, 0, 2**40])
    rows = encode(images, np.zeros(3, np.int64), ids, spec)
    masks = choose(spec.mask_seed, spec.split, torch.from_numpy(ids), spec.size,
                   spec.known, spec.target)  # fmt: skip
    for image, index, rgb, mask in zip(images, rows.index, rows.rgb, masks, strict=True):
        assert index.tolist() == mask.tolist()
        for pixel, colour in zip(index.tolist(), rgb.reshape(-1, 3).tolist(), strict=True):
            assert image[pixel // spec.size, pixel % spec.size].tolist() == colour
    assert (rows.images is not None) == spec.full_images


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images \(5, 6, 3\) must be \(6, 6, 3\)"):
        encode(pictures(2, 6)[:, :5], np.zeros(2, np.int64), np.arange(2), SPEC)


@pytest.mark.parametrize("field", [f for f in SPEC.__dataclass_fields__])
def test_the_hash_of_a_spec_is_of_every_field(field):
    value = getattr(SPEC, field)
    other = (not value) if isinstance(value, bool) else value + type(value)(1)
    assert replace(SPEC, **{field: other}).hash != SPEC.hash


def test_a_spec_of_images_as_they_are_has_the_hash_and_the_fields_of_before_there_was_a_reduction():
    assert SPEC.hash == "7c1f0b2754d2d4fe"
    about = pq.read_schema(pa.BufferReader(to_bytes(rows_of(SPEC), SPEC))).metadata[b"mambaflow"]
    fields = ("source", "split", "size", "known", "target", "mask_seed", "full_images",
              "rows_per_shard")  # fmt: skip
    assert set(json.loads(about)) == {"format", "hash", *fields}


def test_every_truncation_of_a_shard_is_refused_by_name():
    data = to_bytes(rows_of(SPEC), SPEC)
    for length in {*range(0, len(data), 97), 0, 1, 4, 8, len(data) - 1, len(data) - 4}:
        with pytest.raises(ShardError, match=r"shard SOME/NAME is not whole Parquet"):
            from_bytes(data[:length], "SOME/NAME")


def replaced(table, name, column):
    return table.set_column(table.column_names.index(name), name, column)


def odd_shards():
    """(what is wrong, a shard with it) for shards that are whole Parquet."""
    table = pq.read_table(pa.BufferReader(to_bytes(rows_of(SPEC), SPEC)))
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
