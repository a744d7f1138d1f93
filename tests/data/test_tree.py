"""What of a folder is data, on trees as people have them."""

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mambaflow.data.remote import SourceError
from mambaflow.data.sources import open_source
from mambaflow.data.tree import picture_endings

COUNT = iter(range(10**6))


def encoded(kind="PNG"):
    """A picture like no other."""
    pixels = np.full((8, 8, 3), 100, np.uint8)
    pixels[0, 0] = np.frombuffer(next(COUNT).to_bytes(3, "big"), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def tree(root, *places):
    """Files at some places, such as "train/cat/3*.png" for three of them."""
    for place in places:
        folder, _, name = place.rpartition("/")
        number, star, ending = name.rpartition("*")
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(int(number)) if star else [None]:
            file = root / folder / (name if i is None else f"{i:03d}{ending}")
            kind = Image.registered_extensions().get(file.suffix.lower())
            file.write_bytes(encoded(kind) if kind in Image.SAVE else b"text")
    return root


def shards(root, *places):
    """Parquet files of two pictures each."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        cells = [{"bytes": encoded(), "path": None} for _ in range(2)]
        pq.write_table(pa.table({"img": pa.array(cells, kind), "label": [0, 1]}), root / place)
    return root


def counts(source):
    return {split: source.count(split) for split in ("train", "validation", "test")}


def labels(source, split="train"):
    return [item.label for item in source.items(split, np.arange(source.count(split)))]


def told(root):
    return "\n".join(open_source(str(root)).found().lines())


# Hidden, and left behind


JUNK = [
    ".ipynb_checkpoints/0-checkpoint.png", "cat/.ipynb_checkpoints/0-checkpoint.png",
    "cat/._003.png", "._AppleDouble/cat/x.png", "__MACOSX/cat/._001.png", "cat/Thumbs.db",
    "desktop.ini", "cat/.DS_Store", "@eaDir/cat/1.jpg", "cat/@eaDir/SYNOPHOTO_THUMB.jpg",
    ".git/logo/a.png", "$RECYCLE.BIN/x/1.png", ".Trash-0/files/1.png", "lost+found/x/1.png",
    "#recycle/1.png", "@Recycle/1.png", "~snapshot/cat/1.png", "Temporary Items/1.png",
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK)
def test_what_is_hidden_or_left_behind_changes_nothing_and_is_said(tmp_path, junk):
    clean = open_source(str(tree(tmp_path / "t", "cat/3*.png", "dog/3*.png")))
    before = (clean.fingerprint, labels(clean), clean.classes)
    tree(tmp_path / "t", junk)
    source = open_source(str(tmp_path / "t"))
    assert (source.fingerprint, labels(source), source.classes) == before
    assert "passed over 1 hidden or left behind: a system or a program made it" in told(
        tmp_path / "t"
    )


# Splits


@pytest.mark.parametrize(
    "name", ["val", "valid", "validation", "Val", "Validation", "val2017", "dev"]
)
def test_a_validation_split_of_its_own_is_used_and_none_is_cut_from_training(tmp_path, name):
    source = open_source(str(tree(tmp_path, "train/cat/9*.png", "test/cat/4*.png",
                                  f"{name}/cat/3*.png")))  # fmt: skip
    assert counts(source) == {"train": 9, "validation": 3, "test": 4}
    planned = {split: (stored, len(p)) for split, (stored, p) in source.splits(2).items()}
    assert planned == {"train": ("train", 9), "validation": ("validation", 3), "test": ("test", 4)}


def test_without_a_test_split_it_alone_is_cut_from_training(tmp_path):
    source = open_source(str(tree(tmp_path, "train/cat/9*.png", "val/cat/3*.png")))
    planned = source.splits(2)
    assert {k: (s, len(p)) for k, (s, p) in planned.items()} == {
        "train": ("train", 7), "validation": ("validation", 3), "test": ("train", 2)
    }  # fmt: skip
    assert not set(planned["train"][1]) & set(planned["test"][1])
    assert "no test; test will be cut out of train; 1 classes: cat" in told(tmp_path)


@pytest.mark.parametrize(
    "splits",
    [("Train", "Test"), ("training", "testing"), ("TRAINING", "test"), ("train2017", "test2017")],
)
def test_splits_are_known_by_their_usual_names_in_any_case(tmp_path, splits):
    train, test = splits
    source = open_source(str(tree(tmp_path, f"{train}/cat/5*.png", f"{test}/cat/2*.png")))
    assert counts(source) == {"train": 5, "validation": 0, "test": 2} and source.classes == ["cat"]


NEARLY = [
    ("trainA", "trainB", "testA", "testB"), ("train_set", "test_set"), ("seg_train", "seg_test"),
    ("trainA", "trainB"), ("train-images",), ("Train1", "Test1"), ("my train", "my val"),
    ("train", "testA"), ("train", "test", "valid_set"), ("trainset", "testset"), ("trn", "tst"),
    ("traindata", "testdata"), ("TrainingImages", "TestImages"), ("imagesTr", "imagesTs"),
    ("train", "eval"), ("train", "test", "holdout"), ("train", "validate"), ("train", "X_test"),
]  # fmt: skip


@pytest.mark.parametrize("folders", NEARLY, ids="+".join)
@pytest.mark.parametrize("inside", ["2*.png", "cat/2*.png"])
def test_what_is_nearly_a_split_is_never_a_class(tmp_path, folders, inside):
    tree(tmp_path, *(f"{folder}/{inside}" for folder in folders))
    with pytest.raises(SourceError, match=r"may be splits or classes; call them train, val and"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["test_images", "testA", "Test1", "val_set", "my test", "imagesTs"]
)
def test_one_that_says_nothing_but_a_split_is_no_class_among_others(tmp_path, name):
    tree(tmp_path, f"{name}/2*.png", "cat/2*.png", "dog/2*.png")
    with pytest.raises(SourceError, match=f"{name}/ in .* may be splits or classes; call them"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["test_tube", "bullet_train", "trainer", "valley", "contest", "te",
                                  "tepic", "dev_board", "target_practice"])  # fmt: skip
def test_a_class_whose_name_has_a_splits_word_is_a_class(tmp_path, name):
    source = open_source(str(tree(tmp_path, f"{name}/2*.png", "cat/2*.png")))
    assert source.classes == sorted(["cat", name])


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_one_split_beside_classes_may_be_a_class_and_is_refused(tmp_path, split):
    tree(tmp_path, f"{split}/2*.png", "bus/2*.png", "car/2*.png")
    with pytest.raises(SourceError, match=f"{split} may be a split or a class, beside bus/, car/"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "both", [("val", "valid"), ("train2014", "train2017"), ("Test", "testing")]
)
def test_two_folders_for_one_split_are_refused(tmp_path, both):
    tree(tmp_path, "train/cat/2*.png", *(f"{name}/cat/2*.png" for name in both))
    with pytest.raises(SourceError, match=r"are all (validation|train|test); leave one"):
        open_source(str(tmp_path))


INSIDE = {
    ("train/cat/2*.png", "train/test/2*.png"): "train/test may be test, or a class of train; move",
    ("train/train/2*.png", "train/Val/2*.png"): "train/Val may be validation, or a class of train",
    ("train/trainA/2*.png", "train/testA/2*.png", "test/a/1*.png"):
        "testA/, trainA/ in .*/train may be splits or classes",
}  # fmt: skip


@pytest.mark.parametrize("places", INSIDE, ids="+".join)
def test_a_split_inside_of_a_split_is_no_class(tmp_path, places):
    with pytest.raises(SourceError, match=INSIDE[places]):
        open_source(str(tree(tmp_path, *places)))


@pytest.mark.parametrize(
    "places",
    [("train/train/2*.png", "test/test/2*.png"), ("train/train/2*.png", "train/bus/2*.png"),
     ("train/test_tube/2*.png", "train/cat/2*.png")],
)  # fmt: skip
def test_a_folder_packed_twice_and_a_class_of_trains_may_be_in_a_split(tmp_path, places):
    assert open_source(str(tree(tmp_path, *places))).count("train") in (2, 4)


BY_NAME = [
    ("train_1.png", "test_1.png", "logo.png"), ("cat/Train (1).png", "cat/val (1).png"),
    ("COCO_train2014_1.jpg", "COCO_val2014_2.jpg"), ("cat/1_train.png", "cat/2_test.png"),
]  # fmt: skip


@pytest.mark.parametrize("places", BY_NAME, ids="+".join)
def test_names_of_pictures_that_say_several_splits_are_refused(tmp_path, places):
    tree(tmp_path / "t", *places)
    with pytest.raises(SourceError, match="pictures of several splits by their names, such as "):
        open_source(str(tmp_path / "t"))
    # Where folders say it, names are of another time.
    source = open_source(str(tree(tmp_path / "s", *(f"train/{place}" for place in places))))
    assert source.count("train") == len(places)


def test_a_splits_word_in_some_names_is_no_split(tmp_path):
    tree(tmp_path, "cat/test_1.png", "cat/test_2.png", "train/train_1.png", "bus/valley_test.png",
         "bus/bullet_train.png", "bus/1.png")  # fmt: skip
    (tmp_path / "train").rename(tmp_path / "railway")
    assert open_source(str(tmp_path)).count("train") == 6


@pytest.mark.parametrize("place", ["val/", "Test/cat/", "val/a.zip", "test/cat/a.heic"])
def test_a_split_without_a_picture_is_refused(tmp_path, place):
    """It is not cut out of training without a word."""
    tree(tmp_path, "train/cat/9*.png")
    if place.endswith("/"):
        (tmp_path / place).mkdir(parents=True)
    else:
        tree(tmp_path, place)
    split = place.split("/")[0]
    with pytest.raises(
        SourceError, match=f"{split} holds no picture that can be read, and .*fetch"
    ):
        open_source(str(tmp_path))


def test_a_folder_that_is_no_split_is_passed_over_and_said(tmp_path):
    tree(tmp_path, "train/cat/2*.png", "test/cat/2*.png", "unlabeled/7*.png", "logo.png")
    assert "passed over 7 picture(s): in folders that are no split" in told(tmp_path)
    assert "passed over 1 picture(s): beside the splits" in told(tmp_path)


def test_a_test_split_alone_is_refused(tmp_path):
    with pytest.raises(
        SourceError, match="holds no images in class folders; put them in .*/train/"
    ):
        open_source(str(tree(tmp_path, "test/cat/2*.png")))


# Classes and files


@pytest.mark.parametrize("ending", [".gif", ".jfif", ".tiff", ".tif", ".ppm", ".webp", ".JPEG",
                                    ".jpe", ".bmp", ".tga", ".jp2", ".pgm", ".PNG"])  # fmt: skip
def test_every_format_that_pillow_unpacks_is_data(tmp_path, ending):
    source = open_source(str(tree(tmp_path, f"cat/10*{ending}", "dog/2*.png")))
    assert source.classes == ["cat", "dog"] and labels(source) == [0] * 10 + [1] * 2
    assert all(item.pixels is not None for item in source.items("train", np.arange(12)))


def test_what_pillow_only_knows_the_name_of_is_no_data():
    assert not picture_endings() & {".pdf", ".h5", ".mpg", ".eps", ".wmf", ".txt", ".npy", ""}


def test_other_files_are_passed_over_by_kind_and_said(tmp_path):
    tree(tmp_path, "cat/2*.png", "cat/3*.txt", "dog/4*.heic", "cat/noname", "README.md")
    said = told(tmp_path)
    assert "found train 2 images, no validation, no test; validation and test will be cut" in said
    for line in (
        "passed over 3 .txt file(s): no pictures that can be read, such as",
        "passed over 4 .heic file(s)",
        "passed over 1 file(s) without an ending",
        "passed over 1 .md file(s)",
        f"passed over 1 folder(s): without a picture that can be read, such as {tmp_path}/dog",
    ):
        assert line in said


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path):
    tree(
        tmp_path,
        "train/n01/images/3*.JPEG",
        "train/n01/n01_boxes.txt",
        "train/n02/images/2*.JPEG",
        "val/images/4*.JPEG",
        "val/val_annotations.txt",
        "test/images/2*.JPEG",
        "wnids.txt",
    )
    source = open_source(str(tmp_path))
    assert counts(source) == {"train": 5, "validation": 4, "test": 2}
    assert source.classes == ["n01", "n02"] and labels(source) == [0, 0, 0, 1, 1]
    assert labels(source, "validation") == [-1] * 4
    assert "passed over 3 .txt file(s)" in told(tmp_path)


def test_a_class_that_would_vanish_because_its_pictures_lie_deeper_is_refused(tmp_path):
    tree(tmp_path, "cat/2*.png", "dog/2019/2*.png")
    with pytest.raises(SourceError, match=r"dog holds pictures in folders of its own alone"):
        open_source(str(tmp_path))


def test_pictures_at_other_depths_are_passed_over_and_said(tmp_path):
    tree(tmp_path, "cat/2*.png", "cat/old/3*.png", "dog/2*.png", "logo.png")
    assert "passed over 3 picture(s): deeper than CLASS/NAME" in told(tmp_path)
    assert "passed over 1 picture(s): beside class folders" in told(tmp_path)


def test_pictures_without_class_folders_have_no_labels(tmp_path):
    source = open_source(str(tree(tmp_path, "train2017/3*.jpg", "val2017/2*.jpg", "a.json")))
    assert counts(source) == {"train": 3, "validation": 2, "test": 0}
    assert labels(source) == [-1] * 3 and source.classes == []
    assert "no classes by name" in told(tmp_path)


def test_folders_and_files_may_be_links_and_dangling_ones_are_refused(tmp_path):
    store = tree(tmp_path / "store", "a/2*.png", "blob.png")
    root = tree(tmp_path / "t", "cat/1*.png")
    (root / "dog").symlink_to(store / "a")
    (root / "cat" / "x.png").symlink_to(store / "blob.png")
    (root / "cat" / "loop").symlink_to(root)
    source = open_source(str(root))
    assert source.classes == ["cat", "dog"] and labels(source) == [0, 0, 1, 1]
    os.remove(store / "blob.png")
    with pytest.raises(SourceError, match=r"cat/x.png is a link to what is not there"):
        open_source(str(root))


@pytest.mark.parametrize(
    ("make", "place", "name"),
    [*((tree, "cat/2*.png", name) for name in ("bird", "test", "St. Bernard", "v1.0")),
     (tree, "train/cat/2*.png", "train/bird"), (tree, "train/cat/2*.png", "val"),
     (shards, "train.parquet", "test"), (shards, "train/0.parquet", "val")],
)  # fmt: skip
def test_a_link_to_nothing_that_may_be_a_class_or_a_split_is_refused(tmp_path, make, place, name):
    """It would vanish, and a test split be cut out of training instead."""
    root = make(tmp_path / "t", place)
    (root / "notes.txt").symlink_to(tmp_path / "gone")
    assert open_source(str(root)).count("train") == 2
    (root / name).symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=f"{name} is a link to what is not there"):
        open_source(str(root))


@pytest.mark.parametrize("where", ["", "train/"])
@pytest.mark.parametrize(
    "pair", ["images masks", "Images Labels", "img GT", "JPEGImages SegmentationClass"]
)
def test_masks_beside_pictures_are_no_class(tmp_path, where, pair):
    of, masks = pair.split()
    tree(tmp_path, f"{where}{of}/2*.png", f"{where}{masks}/2*.png")
    with pytest.raises(SourceError, match=f"look like masks of pictures.* --source .*/{of}$"):
        open_source(str(tmp_path))
    for file in (tmp_path / where / masks).iterdir():
        file.rename(file.with_suffix(".txt"))  # as boxes are kept
    assert open_source(str(tmp_path)).count("train") == 2


MASKED = [
    ("b/1.png", "b/1_mask.png"), ("train/b/1.png", "train/b/1_mask.png", "train/b/1_mask_1.png"),
    ("1.jpg", "1_Segmentation.png", "2.jpg", "2_Segmentation.png"),
    ("b/x (1).png", "b/x (1)-GT.png"),
]  # fmt: skip


@pytest.mark.parametrize("places", MASKED, ids="+".join)
def test_masks_that_lie_beside_their_pictures_are_refused(tmp_path, places):
    with pytest.raises(SourceError, match=r"look like masks of its pictures, such as .* of .*away"):
        open_source(str(tree(tmp_path, *places)))


def test_a_name_like_a_masks_is_a_picture_without_its_picture_or_among_many(tmp_path):
    tree(tmp_path, "cat/face_mask.png", "cat/9*.png", "cat/000_mask.png", "dog/1_mask.png")
    assert open_source(str(tmp_path)).count("train") == 12


@pytest.mark.parametrize("names", [("cat", "dog"), ("train", "test")])
def test_two_names_of_one_folder_are_refused(tmp_path, names):
    one, other = names
    tree(tmp_path, f"{one}/x/2*.png" if one == "train" else f"{one}/2*.png")
    (tmp_path / other).symlink_to(tmp_path / one)
    with pytest.raises(SourceError, match=f"{one} and .*/{other} are one folder; remove one"):
        open_source(str(tmp_path))


ODD_CLASSES = {
    ("Cat/2*.png", "cat/2*.png"): "classes that differ in case or accents' code alone: Cat, cat",
    tuple(f"{i}/1*.png" for i in range(11)):
        "labels are places in the order of text: 2 is class 10",
    ("1/1*.png", "10/1*.png", "2/1*.png"): "labels are places in the order of text: 0 is class 1",
    ("train/cat/2*.png", "val/Cat/2*.png"):
        "no label in validation, of classes that train lacks: Cat",
}  # fmt: skip


@pytest.mark.parametrize("places", ODD_CLASSES, ids="+".join)
def test_classes_that_are_seldom_meant_are_said(tmp_path, places):
    assert ODD_CLASSES[places] in told(tree(tmp_path, *places))


def test_usual_classes_are_worth_no_word(tmp_path):
    tree(tmp_path, *(f"{split}/{i}/1*.png" for split in ("train", "test") for i in range(10)))
    assert len(open_source(str(tmp_path)).found().lines()) == 1


def test_cifar10_beside_other_pictures_is_not_taken_for_all(tmp_path):
    tree(
        tmp_path, "cifar-10-batches-py/data_batch_1", "imagenette/train/a/2*.png", "MNIST/raw/x.gz"
    )
    with pytest.raises(SourceError, match="and pictures in imagenette/; give --source .*-py, or"):
        open_source(str(tmp_path))


def test_the_order_of_a_plain_tree_is_what_it_always_was(tmp_path):
    tree(tmp_path, "b/2*.png", "B/2*.png", "a-1/2*.bmp", "a/10.png", "a/9.jpg", "a/9.png")
    source = open_source(str(tmp_path))
    assert source.files["train"] == sorted(f for f in tmp_path.glob("*/*"))


# Parquet


def test_the_root_of_a_data_sets_repository_is_a_source(tmp_path):
    shards(
        tmp_path,
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    )
    tree(tmp_path, "README.md", ".gitattributes", "figures/2*.png")
    source = open_source(str(tmp_path))
    assert counts(source) == {"train": 4, "validation": 2, "test": 2}
    assert {k: s for k, (s, _) in source.splits(1).items()}["validation"] == "validation"
    for line in ("1 .md file(s)", "1 hidden or left behind", "2 picture(s): beside Parquet files"):
        assert f"passed over {line}" in told(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("Train.parquet", "Test.parquet"),
        ("training.pq", "testing.pq"),
    ],
)
def test_parquet_is_found_where_hubs_put_it(tmp_path, places):
    assert counts(open_source(str(shards(tmp_path, *places)))) == {
        "train": 2, "validation": 0, "test": 2
    }  # fmt: skip


def test_other_encodings_and_files_of_no_split_stay_out_and_are_said(tmp_path):
    shards(
        tmp_path,
        "train.parquet",
        "train_jpeg.parquet",
        "test.parquet",
        "test_jpeg.parquet",
        "extra-00000-of-00001.parquet",
        "trainA.parquet",
        "._train.parquet",
    )
    source = open_source(str(tmp_path))
    assert counts(source) == {"train": 2, "validation": 0, "test": 2}
    said = told(tmp_path)
    assert "2 Parquet file(s): their names begin with no split" in said
    assert "1 Parquet file(s): beside train in one file" in said


def test_missing_and_doubled_shards_are_refused_by_name(tmp_path):
    shards(tmp_path, "train-00000-of-00003.parquet", "train-00002-of-00003.parquet")
    with pytest.raises(SourceError, match=r"lacks shard 00001-of-00003 of train \(1 missing\)"):
        open_source(str(tmp_path))
    shards(tmp_path, "train-00001-of-00003.parquet", "train-00000-of-00001.parquet")
    with pytest.raises(SourceError, match="in shards of 00001, 00003: the same images twice"):
        open_source(str(tmp_path))


HASH = "a09b74b3ef9c3b56"
ODD_SHARDS = {
    (f"data/train-00000-of-00002-{HASH}.parquet",): "lacks shard 00001-of-00002 of train",
    (f"train-00000-of-00001-{HASH}.parquet", f"train-00000-of-00001-{HASH[::-1]}.parquet"):
        "are the same shard of train twice; remove one",
    ("train/0000.parquet", "train/0002.parquet"): "lacks shard 0001 of train",
    ("train/0000.parquet", "train/label=1/0.parquet"): "some in folders of its own, such as",
    ("train_a.parquet", "train_b.parquet"): "holds train in several sets: train_a, train_b; give",
    ("train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"):
        "holds train in several sets: train_gen, train_sft",
    ("train.parquet", "data/train-00000-of-00001.parquet"): "several sets of Parquet files",
    ("train_0.parquet", "train_2.parquet"): "lacks shard 0001 of train",
    ("train.parquet", "training.parquet"): "holds train in several sets: train, training",
    ("train.parquet", "dev.parquet", "val-0-of-1.parquet"): "validation in several sets: dev, val",
    ("train/a.parquet", "val/a.parquet", "valid/b.parquet"): "val/, valid/ in .* are all valid",
    ("train/a.parquet", "test/a.parquet.part"): "test holds no Parquet file, and test would be cut",
    ("train.parquet", "val/a.parquet.part"): "val holds no Parquet file, and validation would be",
    ("train-2-of-3.parquet", "train-3-of-3.parquet"): "lacks shard 00001-of-3 of train",
    ("train/a.parquet", "train/test.parquet"): "train/test.parquet is of test by its name, and of",
    ("train.parquet", "cifar_test.parquet"): "cifar_test.parquet may be test, and nothing else is",
    ("train.parquet", "test.parquet", "my-val-0.parquet"): "my-val-0.parquet may be validation",
    ("train/0.parquet", "eval/0.parquet"): "eval may be test, and nothing else is; call it test, o",
}  # fmt: skip


@pytest.mark.parametrize("places", ODD_SHARDS, ids="+".join)
def test_shards_that_are_no_whole_set_are_refused(tmp_path, places):
    with pytest.raises(SourceError, match=ODD_SHARDS[places]):
        open_source(str(shards(tmp_path, *places)))


@pytest.mark.parametrize(
    "places",
    [
        (f"train-00000-of-00002-{HASH}.parquet", f"train-00001-of-00002-{HASH}.parquet"),
        ("train_0.parquet", "train_1.parquet"),
        ("train-1-of-2.parquet", "train-2-of-2.parquet"),
        ("train-2016.parquet", "train-2018.parquet"),
        ("train/part-00000-3f-c000.snappy.parquet", "train/part-00001-3f-c000.snappy.parquet"),
        ("train/0000.parquet", "train/0001.parquet"),
    ],
)
def test_shards_of_one_set_are_all_taken(tmp_path, places):
    assert open_source(str(shards(tmp_path, *places))).count("train") == 4


def test_shards_of_other_encodings_stay_out_as_files_do(tmp_path):
    shards(tmp_path, "train-00000-of-00001.parquet", "train_jpeg-00000-of-00001.parquet")
    assert open_source(str(tmp_path)).count("train") == 2
    assert "passed over 1 Parquet file(s): beside train in one set" in told(tmp_path)


def test_several_sets_of_parquet_are_refused_with_their_names(tmp_path):
    shards(tmp_path, "small/train-00000-of-00001.parquet", "large/train-00000-of-00001.parquet")
    with pytest.raises(SourceError, match=r"several sets of Parquet files, large/, small/; give"):
        open_source(str(tmp_path))


def test_a_test_split_of_parquet_alone_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"holds no train\*.parquet, only \['test.parquet'\]"):
        open_source(str(shards(tmp_path, "test.parquet")))


def test_a_table_beside_pictures_does_not_take_their_place(tmp_path):
    tree(tmp_path, "train/cat/3*.png", "test/cat/2*.png")
    shards(tmp_path, "metadata.parquet")
    assert counts(open_source(str(tmp_path))) == {"train": 3, "validation": 0, "test": 2}
    assert "1 .parquet file(s)" in told(tmp_path)
