"""Sources: the same images as other programs read, and a reason for those that cannot be."""

import hashlib
import io
import os
import pickle
import re
import tarfile
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from mambaflow.data import sample
from mambaflow.data.cifar10 import CIFAR10_FOLDER
from mambaflow.data.remote import SourceError
from mambaflow.data.sample import PHOTOGRAPHS, SAMPLE_COUNTS, Sample, photograph
from mambaflow.data.source import Source, decoded
from mambaflow.data.sources import open_source
from mambaflow.storage import at


def pictures(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def encoded(image, kind="PNG", **settings):
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind, **settings)
    return sink.getvalue()


def write_parquet(file, images, labels, *, column="img", rows=3):
    """The layout of the public release, in row groups of a few rows."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    table = pa.table({column: pa.array(cells, kind), "label": pa.array(labels, pa.int64())})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=rows)
    return file


def write_folder(root, images, classes=("bird", "cat")):
    for number, image in enumerate(images):
        file = root / classes[number % len(classes)] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))
    return root


def read(source, split, places=None):
    places = np.arange(source.count(split)) if places is None else np.array(places)
    return list(source.items(split, places))


# Parquet


def test_parquet_gives_every_row_in_any_order(tmp_path):
    images = pictures(20)
    parts = [(0, 7), (7, 8), (8, 20)]
    for number, (first, end) in enumerate(parts):
        file = tmp_path / "set" / f"train-{number}-of-3.parquet"
        write_parquet(file, [encoded(i) for i in images[first:end]], range(first, end))
    write_parquet(tmp_path / "set" / "test.parquet", [encoded(images[3])], [None], column="image")
    source = open_source(str(tmp_path / "set"))
    assert (source.count("train"), source.count("test")) == (20, 1)
    for places in (range(20), [19, 0, 7, 7, 8, 3]):
        for place, item in zip(places, read(source, "train", places), strict=True):
            assert (item.id, item.label, item.fault) == (place, place, "")
            assert np.array_equal(item.pixels, images[place])
    (test,) = read(source, "test")
    assert test.label == -1 and np.array_equal(test.pixels, images[3])


def test_one_training_file_is_the_data_set_and_its_other_encodings_are_not(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(i) for i in pictures(5)], range(5))
    write_parquet(tmp_path / "train_jpeg.parquet", [encoded(i) for i in pictures(9)], range(9))
    assert open_source(str(tmp_path)).count("train") == 5
    assert open_source(str(tmp_path / "train_jpeg.parquet")).count("train") == 9


def test_a_file_alone_is_read_by_the_row_group(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(9)], range(9))
    source, opened = open_source(str(file)), []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, number, *rest: opened.append(number) or read_row_group(self, number, *rest),
    )
    read(source, "train", range(4, 9))
    read(source, "train", [8])
    assert opened == [1, 2]  # not the first, and the last one once


def test_a_link_is_called_what_it_is_called_and_not_what_it_leads_to(tmp_path):
    """As caches of hubs keep files: by their hashes, under links with their names."""
    blob = tmp_path / "blobs" / "0a1b"
    write_parquet(blob, [encoded(i) for i in pictures(4)], range(4))
    link = tmp_path / "snapshots" / "r" / "train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../blobs/0a1b")
    for address in (link, link.parent):
        source = open_source(str(address))
        assert (source.name, source.address) == (address.name, str(address))
        assert np.array_equal(read(source, "train", [3])[0].pixels, pictures(4)[3])
    assert open_source(str(blob)).count("train") == 4, "by what it is, where no name says it"
    real = write_folder(tmp_path / "store" / "7f", pictures(4))
    named = tmp_path / "birds"
    named.symlink_to(real)
    assert open_source(str(named)).name == "birds"


def test_a_file_that_is_no_parquet_is_refused_with_a_cure(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"is a file, and no .parquet file; .*unpack it"):
        open_source(str(tmp_path / "set.zip"))


def cifar100(file):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": encoded(i), "path": None} for i in pictures(4)]
    table = {
        "img": pa.array(cells, kind),
        "fine_label": [90, 1, 2, 3],
        "coarse_label": [9, 0, 0, 0],
    }
    pq.write_table(pa.table(table), file)
    return str(file)


def test_columns_of_other_names_are_refused_with_those_that_there_are_and_can_be_chosen(tmp_path):
    file = cifar100(tmp_path / "c.parquet")
    with pytest.raises(SourceError, match=r"'fine_label': 'int64', 'coarse_label'.*--label-column"):
        open_source(file)
    fine, coarse = (open_source(file, label_column=f"{k}_label") for k in ("fine", "coarse"))
    assert [i.label for i in read(fine, "train")] == [90, 1, 2, 3] == fine.labels("train").tolist()
    assert read(coarse, "train")[0].label == 9
    without = open_source(file, labels="ignore")
    assert [i.label for i in read(without, "train")] == [-1] * 4
    assert len({s.fingerprint for s in (fine, coarse, without)}) == 3
    by_name = pq.read_table(file).rename_columns(["img", "label", "coarse_label"])
    pq.write_table(by_name, tmp_path / "l.parquet")
    plain, said = (open_source(str(tmp_path / "l.parquet"), label_column=c) for c in ("", "label"))
    assert plain.fingerprint == said.fingerprint
    again = open_source(fine.address, **dict(fine.options))
    assert again.fingerprint == fine.fingerprint
    with pytest.raises(SourceError, match="it must have picture and fine_label"):
        open_source(file, image_column="picture", label_column="fine_label")
    with pytest.raises(SourceError, match="are of Parquet, and source .* is none; leave them out"):
        open_source("sample", label_column="fine_label")


def test_what_would_leave_a_choice_of_columns_without_effect_is_refused(tmp_path):
    file = cifar100(tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="names labels that labels .* leaves out"):
        open_source(file, label_column="coarse_label", labels="ignore")
    table = pq.read_table(file)
    pq.write_table(table.append_column("image", table["img"]), file)
    with pytest.raises(SourceError, match="both img and image; choose by --image-column"):
        open_source(file, label_column="fine_label")
    assert open_source(file, label_column="fine_label", image_column="img").count("train") == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"picture": [1], "label": [1]}, r"columns {'picture': 'int64', .*must have img"),
        ({"img": [b"x"]}, r"must have img \(or image\) and label"),
        ({"img": [b"x"], "label": [1]}, r"img must be struct<bytes, path>"),
        ({"img": [{"bytes": b"x"}], "label": ["cat"]}, r"label an integer"),
        ({"img": [{"bytes": [1, 2]}], "label": [1]}, r"img must be struct<bytes, path> of encoded"),
        ({"img": [{"bytes": "text"}], "label": [1]}, r"img must be struct<bytes, path> of encoded"),
    ],
)
def test_parquet_of_other_columns_is_refused_by_name(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "odd.parquet")
    with pytest.raises(SourceError, match=f"odd.parquet has .*{message}"):
        open_source(str(tmp_path / "odd.parquet"))


@pytest.mark.parametrize("kind", ["uint8", "uint64", "int8", "int16"])
def test_labels_may_be_integers_of_any_kind(tmp_path, kind):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(4)], range(4))
    table = pq.read_table(file)
    for labels in ([3, 0, 2, 1], [3, None, 2, 1]):
        column = pa.array(labels, getattr(pa, kind)())
        pq.write_table(table.set_column(1, "label", column), file)
        want = [-1 if label is None else label for label in labels]
        source = open_source(str(file))
        assert [i.label for i in read(source, "train")] == want == source.labels("train").tolist()


def test_labels_beyond_64_bits_are_refused_by_name(tmp_path):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(2)], range(2))
    column = pa.array([2**63, 1], pa.uint64())
    pq.write_table(pq.read_table(file).set_column(1, "label", column), file)
    with pytest.raises(SourceError, match="f.parquet has labels beyond 64 bits .*--labels ignore"):
        open_source(str(file)).labels("train")


@pytest.mark.parametrize("words", [("train", "test"), ("Training", "PublicTest", "PrivateTest")])
@pytest.mark.parametrize("name", ["split", "Usage"])
def test_a_table_of_several_splits_is_refused(tmp_path, name, words):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(6)], range(6))
    table, column = pq.read_table(file), [words[i % len(words)] for i in range(6)]
    pq.write_table(table.append_column(name, pa.array(column).dictionary_encode()), file)
    with pytest.raises(
        SourceError, match=f"rows of several splits, by its column {name} .[Tt]rain"
    ):
        open_source(str(file))
    pq.write_table(table.append_column(name, pa.array(["train"] * 6).dictionary_encode()), file)
    assert open_source(str(file)).count("train") == 6


SPLIT_COLUMNS = {
    "phase": ["train", "test"], "data_split": ["TRAIN", "Val"], "fold": ["train_set", "test_set"],
    "is_train": [True, False], "isTest": [True, False], "split": [0, 1],
    " Subset": [b"dev", b"test"],
    "kind": pa.array(["train", "test"], pa.string_view()),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT_COLUMNS)
def test_a_column_of_splits_is_known_by_what_it_says_whatever_it_is_called(tmp_path, name):
    """The second split begins behind the first row group."""
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(6)], range(6))
    table = pq.read_table(file)
    one, other = (pa.array(SPLIT_COLUMNS[name])[i : i + 1] for i in range(2))
    for last, refused in ((other, True), (one, False)):
        column = pa.chunked_array([one] * 4 + [last] * 2)
        pq.write_table(table.append_column(name, column), file, row_group_size=3)
        if refused:
            with pytest.raises(SourceError, match=f"of several splits, by its column {name} "):
                open_source(str(file))
        else:
            assert open_source(str(file)).count("train") == 6


OTHER_COLUMNS = {
    "caption": ["a train", "a test tube"], "vehicle": ["train", "bus"], "usage": ["train", "a"],
    "training_is_done": [True, False], "split_second": [0, 1], "split": [["train"], ["test"]],
    "note": ["", None],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_COLUMNS)
def test_a_column_that_only_has_a_splits_word_is_none_of_splits(tmp_path, name):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(6)], range(6))
    table = pq.read_table(file).append_column(name, pa.array(OTHER_COLUMNS[name] * 3))
    pq.write_table(table, file)
    assert open_source(str(file)).count("train") == 6


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(2)], range(2))
    table = pq.read_table(file)
    pq.write_table(table.append_column("img", table["img"]), file)
    with pytest.raises(SourceError, match="f.parquet has img twice among its columns"):
        open_source(str(file))


def test_parquet_that_is_cut_off_is_refused_by_name(tmp_path):
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(9)], range(9))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"f.parquet is not whole Parquet: .*fetch it again"):
        open_source(str(file))


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_a_damaged_page_is_named_with_its_file(tmp_path, compression):
    """The footer is whole, and the file opens. What is not compressed has checksums here."""
    file = write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(9)], range(9))
    settings = {"use_dictionary": False, "write_page_checksum": compression == "none"}
    pq.write_table(pq.read_table(file), file, 3, compression=compression, **settings)
    label = pq.ParquetFile(file).metadata.row_group(1).column(2)
    data, end = bytearray(file.read_bytes()), label.data_page_offset + label.total_compressed_size
    data[end - 8] ^= 0xFF  # without compression: of the last label
    file.write_bytes(data)
    with pytest.raises(SourceError, match=r"f.parquet is damaged in row group 1: .*fetch it again"):
        open_source(str(file)).labels("train")


@pytest.mark.parametrize("name", [b"train-\xe9.parquet", b"train.parquet"])
def test_a_name_that_is_not_utf_8_is_a_name(tmp_path, name):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file = write_parquet(tmp_path / "a", [encoded(i) for i in pictures(4)], range(4))
    file = file.rename(folder / os.fsdecode(name))
    for address in (file, folder):
        source = open_source(str(address))
        assert [i.label for i in read(source, "train")] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()], ids=str)
def test_pictures_may_be_bytes_of_any_kind(tmp_path, kind):
    cells = [{"bytes": encoded(i), "path": None} for i in pictures(4)]
    column = pa.array(cells, pa.struct([("bytes", kind), ("path", pa.string())]))
    pq.write_table(pa.table({"img": column, "label": range(4)}), tmp_path / "f.parquet")
    items = read(open_source(str(tmp_path / "f.parquet")), "train")
    assert np.array_equal([i.pixels for i in items], pictures(4))


def test_a_folder_of_other_parquet_is_refused(tmp_path):
    write_parquet(tmp_path / "0000.parquet", [encoded(i) for i in pictures(2)], range(2))
    with pytest.raises(SourceError, match=r"holds no train\*.parquet, only \['0000.parquet'\]"):
        open_source(str(tmp_path))


@pytest.mark.realdata
def test_real_cifar_is_what_pillow_and_pyarrow_read(real_cifar):
    source = open_source(str(real_cifar))
    table = pq.read_table(real_cifar / "train.parquet")
    assert source.count("train") == len(table) > 1000 and source.count("test") == 512
    places = [0, 17, len(table) - 1]
    for place, item in zip(places, read(source, "train", places), strict=True):
        data = table["img"][place].as_py()["bytes"]
        assert np.array_equal(item.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert item.label == table["label"][place].as_py() and item.pixels.shape == (32, 32, 3)


# Corrupt images


def test_every_flipped_byte_of_a_png_is_found_or_harmless():
    image = read(Sample(), "test", [5])[0].pixels  # noise would hide less
    data = encoded(image)
    found = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        item = decoded(3, 1, bytes(changed), "row 3")
        if item.pixels is None:
            found += 1
            assert item.fault.startswith("row 3: ") and len(item.fault) > len("row 3: ")
        else:
            assert np.array_equal(item.pixels, image), f"byte {place} changes the image unseen"
    assert found > 0.9 * len(data)


@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]))
@settings(deadline=None, max_examples=80)
def test_a_damaged_image_gives_a_fault_and_never_an_exception(data, kind):
    whole = bytearray(encoded(pictures(1)[0], kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    item = decoded(0, 0, bytes(whole[: data.draw(st.integers(0, len(whole)))]), "here")
    assert (item.pixels is None) == bool(item.fault)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_cut_off_is_corrupt(kind):
    data = encoded(pictures(1, size=16)[0], kind)
    for length in (0, 1, 10, len(data) // 2, len(data) - 12):
        assert decoded(0, 0, data[:length], "here").fault.startswith("here: ")


def test_grey_transparent_and_palette_images_become_colours():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for mode in ("L", "RGBA", "P", "LA"):
        sink = io.BytesIO()
        Image.fromarray(grey).convert(mode).save(sink, "PNG")
        item = decoded(0, 0, sink.getvalue(), "here")
        assert np.array_equal(item.pixels, np.stack([grey] * 3, -1)), mode


# Folders


def test_a_folder_for_each_class_gives_training_images(tmp_path):
    images = pictures(6)
    source = open_source(str(write_folder(tmp_path / "set", images)))
    items = read(source, "train")
    assert source.count("test") == 0 and source.classes == ["bird", "cat"]
    assert [item.label for item in items] == [0, 0, 0, 1, 1, 1]
    for item, number in zip(items, (0, 2, 4, 1, 3, 5), strict=True):
        assert np.array_equal(item.pixels, images[number])


def test_a_folder_with_train_and_test_gives_both(tmp_path):
    write_folder(tmp_path / "train", pictures(6))
    write_folder(tmp_path / "test", pictures(3, seed=1), ("cat", "horse"))
    source = open_source(str(tmp_path))
    assert (source.count("train"), source.count("test")) == (6, 3)
    assert [item.label for item in read(source, "test")] == [1, 1, -1]  # no horse was trained on


def test_a_folder_without_class_folders_gives_images_without_labels(tmp_path):
    for number, image in enumerate(pictures(3)):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
    items = read(open_source(str(tmp_path)), "train")
    assert [item.label for item in items] == [-1] * 3
    assert all(np.array_equal(i.pixels, p) for i, p in zip(items, pictures(3), strict=True))


def test_a_folder_without_images_is_refused_with_a_cure(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.heic").write_bytes(b"x")
    message = r"no images in class folders; put them in .*/CLASS/NAME; passed over 1 .heic file"
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize("address", ["cifar100", "nowhere/at/all", "gs://bucket/images", ""])
def test_what_is_no_source_is_refused_with_the_valid_ones(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "")
    message = r"is none of: sample, cifar10|no images in class folders"
    with pytest.raises(SourceError, match=message):
        open_source(address)


def test_the_spec_opens_the_same_source_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set", pictures(4))
    write_parquet(tmp_path / "f.parquet", [encoded(i) for i in pictures(4)], range(4))
    for address in ("set", "f.parquet", "sample"):
        monkeypatch.chdir(tmp_path)
        source = open_source(address)
        monkeypatch.chdir("/")
        again = open_source(source.address)
        assert again.fingerprint == source.fingerprint and again.name == source.name
        for one, other in zip(read(source, "train", range(4)), read(again, "train", range(4)),
                              strict=True):  # fmt: skip
            assert np.array_equal(one.pixels, other.pixels)


def test_other_images_have_another_fingerprint(tmp_path):
    found = set()
    for seed in (0, 1):
        images = [encoded(i) for i in pictures(4, seed=seed)]
        file = write_parquet(tmp_path / str(seed) / "f.parquet", images, range(4))
        found.add(open_source(str(file)).fingerprint)
    for count in (4, 5):
        folder = write_folder(tmp_path / "folders" / str(count), pictures(count))
        found.add(open_source(str(folder)).fingerprint)
    assert len(found) == 4


# Splits


class CountedVelocity(Sample):
    """A source of so many images, none of which is looked at."""

    def __init__(self, train, test, own=0):
        self.counts, self.name = {"train": train, "test": test, "validation": own}, "counted"

    def count(self, split):
        return self.counts[split]

    def own_validation(self):
        return self.counts["validation"]

    splits = Source.splits


@given(
    train=st.integers(0, 30), test=st.integers(0, 2), own=st.integers(0, 2),
    validation=st.integers(0, 40),
)  # fmt: skip
def test_an_advised_validation_is_accepted_and_none_is_advised_where_none_would_do(
    train, test, own, validation
):
    source = CountedVelocity(train, test, own)
    try:
        source.splits(validation)
        return
    except SourceError as error:
        said = str(error)
    if advised := re.search(r"use (\d+), or more images", said):
        splits = source.splits(int(advised[1]))
        assert all(len(places) for _, places in splits.values())
        return
    for other in range(1, train + 2):
        with pytest.raises(SourceError):
            source.splits(other)
    enough = int(re.search(r"give (\d+) training images or more", said)[1])
    CountedVelocity(enough, test, own).splits(1)


@given(train=st.integers(2, 400), test=st.integers(0, 9), validation=st.integers(1, 150))
def test_splits_share_no_image_and_lose_none(train, test, validation):
    source = CountedVelocity(train, test)
    held = validation if test else 2 * validation
    if held >= train:
        with pytest.raises(SourceError, match=rf"validation \(={validation}\) leaves nothing"):
            source.splits(validation)
        return
    splits = source.splits(validation)
    places = {name: places.tolist() for name, (_, places) in splits.items()}
    from_train = [p for name, (stored, _) in splits.items() if stored == "train"
                  for p in places[name]]  # fmt: skip
    assert sorted(from_train) == list(range(train))
    assert len(places["validation"]) == validation
    assert len(places["test"]) == (test or validation)
    assert all(p == sorted(p) for p in places.values())


def test_the_validation_split_is_pinned():
    # Or else old validation images would be trained on.
    _, places = CountedVelocity(50_000, 1).splits(256)["validation"]
    assert hashlib.sha256(places.tobytes()).hexdigest()[:16] == "fc61c1e6c95439ee"


# The sample


def test_the_sample_is_pinned():
    first = {split: read(Sample(), split, range(64)) for split in PHOTOGRAPHS}
    pixels = b"".join(i.pixels.tobytes() for items in first.values() for i in items)
    assert hashlib.sha256(pixels).hexdigest()[:16] == "f7d74aaaa8ffa9b7"


def test_sample_splits_share_no_photograph():
    names = [name for split in PHOTOGRAPHS.values() for name in split]
    assert len(names) == len(set(names))
    contents = {hashlib.sha256(photograph(name).tobytes()).digest() for name in names}
    assert len(contents) == len(names)
    for split, those in PHOTOGRAPHS.items():
        assert {i.label for i in read(Sample(), split, range(200))} == set(range(len(those)))


def test_a_crop_depends_on_its_own_number_alone():
    together = read(Sample(), "train", range(10))
    for number in (9, 4):
        (alone,) = read(Sample(), "train", [number])
        assert np.array_equal(alone.pixels, together[number].pixels)


@pytest.mark.parametrize("split", list(PHOTOGRAPHS))
def test_crops_are_varied_photographs(split):
    crops = np.stack([item.pixels for item in read(Sample(), split, range(256))]).astype(float)
    assert crops.shape == (256, 32, 32, 3)
    assert len({crop.tobytes() for crop in crops}) == 256
    contrast = crops.std((1, 2)).max(-1)
    assert (contrast > sample.CONTRAST).mean() > 0.97 and np.median(contrast) > 30
    # Neighbours in a photograph are alike, in noise they are not.
    across = np.corrcoef(crops[:, :, :-1].ravel(), crops[:, :, 1:].ravel())[0, 1]
    assert across > 0.85


def test_the_sample_has_its_own_splits():
    splits = Sample().splits(100)
    assert {k: len(p) for k, (_, p) in splits.items()} == SAMPLE_COUNTS | {"validation": 100}
    assert all(stored == split for split, (stored, _) in splits.items())
    with pytest.raises(SourceError, match=r"validation \(=257\) must be at most 256"):
        Sample().splits(257)


def test_a_package_without_its_photographs_is_named(monkeypatch):
    monkeypatch.setattr(sample, "KEPT_IN", {"skimage": "nowhere", "no_such_package": ""})
    photograph.cache_clear()
    with pytest.raises(SourceError, match="photograph coffee.png is in none of .*install"):
        photograph("coffee.png")


# CIFAR-10 as torchvision keeps it


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """torchvision's folder with four images a file, and their checksums in torchvision."""
    images = pictures(24, size=32)
    folder = tmp_path / "torchvision" / CIFAR10_FOLDER
    folder.mkdir(parents=True)

    def batch(name, first):
        flat = images[first : first + 4].transpose(0, 3, 1, 2).reshape(4, -1)
        data = pickle.dumps({"data": flat, "labels": list(range(4))})
        (folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    train = [batch(f"data_batch_{k + 1}", 4 * k) for k in range(5)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 20)])
    meta = pickle.dumps({"label_names": list("abcd")})
    (folder / "meta").write_bytes(meta)
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "meta", "key": "label_names",
                          "md5": hashlib.md5(meta).hexdigest()},
    )  # fmt: skip
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return tmp_path / "torchvision", images


def test_torchvisions_folder_is_read_where_it_lies(small_cifar):
    folder, images = small_cifar
    by_name = open_source("cifar10", download_to=folder)  # already there: nothing is fetched
    for source in (open_source(str(folder)), by_name, open_source(by_name.address)):
        assert (source.count("train"), source.count("test")) == (20, 4)
        for item, image in zip(read(source, "train"), images[:20], strict=True):
            assert np.array_equal(item.pixels, image) and item.label == item.id % 4
        assert np.array_equal(read(source, "test", [3])[0].pixels, images[23])
        assert source.name == "cifar10" and source.address == str(folder)


def test_the_folder_itself_and_an_archive_of_it_are_cifar_too(small_cifar, tmp_path):
    folder, images = small_cifar
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder / CIFAR10_FOLDER, CIFAR10_FOLDER)
    for path in (folder / CIFAR10_FOLDER, archive):
        source = open_source(str(path))
        assert (source.count("train"), source.count("test")) == (20, 4)
        assert source.address == str(path) and source.fingerprint == "cifar-10-python"
        for item, image in zip(read(source, "train"), images[:20], strict=True):
            assert np.array_equal(item.pixels, image)
        assert np.array_equal(read(open_source(source.address), "test", [3])[0].pixels, images[23])
    renamed = (folder / CIFAR10_FOLDER).rename(tmp_path / "batches")
    assert open_source(str(renamed)).count("train") == 20


@pytest.mark.s3
@pytest.mark.parametrize("what", ["the folder", "its folder", "an archive"])
def test_cifar_in_s3_is_that_on_a_disk_and_no_file_in_between(
    small_cifar, tmp_path, bucket, monkeypatch, what
):
    folder, images = small_cifar
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder / CIFAR10_FOLDER, CIFAR10_FOLDER)
    for file in (folder / CIFAR10_FOLDER).iterdir():
        at(bucket).upload(file, f"kept/{CIFAR10_FOLDER}/{file.name}")
    at(bucket).upload(archive, archive.name)
    there = {
        "the folder": f"{bucket}/kept/{CIFAR10_FOLDER}", "its folder": f"{bucket}/kept/",
        "an archive": f"{bucket}/{archive.name}",
    }[what]  # fmt: skip
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    source = open_source(there)
    assert (source.count("train"), source.count("test")) == (20, 4)
    assert (source.name, source.fingerprint) == ("cifar10", "cifar-10-python")
    for item, image in zip(read(source, "train"), images[:20], strict=True):
        assert np.array_equal(item.pixels, image) and item.label == item.id % 4
    again = open_source(source.address, **dict(source.options))
    assert np.array_equal(read(again, "test", [3])[0].pixels, images[23])


@pytest.mark.s3
def test_cifar_in_s3_that_is_damaged_is_refused_by_name(small_cifar, bucket):
    folder, _ = small_cifar
    for file in (folder / CIFAR10_FOLDER).iterdir():
        at(bucket).upload(file, f"{CIFAR10_FOLDER}/{file.name}")
    at(bucket).write(f"{CIFAR10_FOLDER}/data_batch_2", b"half")
    with pytest.raises(SourceError, match=r"in s3://.* \(data_batch_2 is not the published file"):
        open_source(bucket)
    at(bucket).delete(f"{CIFAR10_FOLDER}/data_batch_2")
    with pytest.raises(SourceError, match="data_batch_2 is not there"):
        open_source(bucket)


def test_an_archive_of_something_else_and_half_an_archive_are_refused(small_cifar, tmp_path):
    folder, _ = small_cifar
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder / CIFAR10_FOLDER / "meta", "cats/meta")
    with pytest.raises(SourceError, match=f"no archive of {CIFAR10_FOLDER}; unpack it"):
        open_source(str(archive))
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"is not whole .*fetch it again|unpack it"):
        open_source(str(archive))


def test_a_damaged_torchvision_folder_is_refused_with_a_cure(small_cifar):
    folder, _ = small_cifar
    (folder / CIFAR10_FOLDER / "data_batch_2").write_bytes(b"half")
    with pytest.raises(SourceError, match=r"could not be read in .*use --source FILE.parquet"):
        open_source(str(folder))


def test_a_download_without_a_network_says_what_to_do_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SourceError) as refused:
        open_source("cifar10", download_to=tmp_path / "down")
    for part in ("could not be downloaded to", str(tmp_path), "offline, use --source FILE.parquet",
                 "--source sample"):  # fmt: skip
        assert part in str(refused.value)
