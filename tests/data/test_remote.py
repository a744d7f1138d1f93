"""Sources in S3: the same shards as from a disk, or a refusal by name; and no file in between."""

import os
import re
import tempfile

import boto3
import numpy as np
import pytest
from test_sources import encoded, pictures, write_folder, write_parquet
from test_staging import SIZE, config_of, contents

from jobs import stage as job
from mambaflow import s3_storage
from mambaflow.data import staging
from mambaflow.data.remote import SourceError, remote
from mambaflow.data.sources import open_source
from mambaflow.data.staging import in_process, make, opened, stage
from mambaflow.storage import at
from mambaflow.storage_base import StorageError

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def fresh_worker():
    staging._opened.cache_clear()


def put(folder, to):
    """All that is in a folder, or a file, at an address in S3."""
    if folder.is_file():
        at(to.rpartition("/")[0]).upload(folder, folder.name)
    for file in (f for f in folder.rglob("*") if f.is_file()):
        at(to).upload(file, file.relative_to(folder).as_posix())
    return to


def parquet_folder(root):
    for split, count in (("train", 40), ("validation", 6), ("test", 5)):
        for part in range(2):
            name = f"{split}-{part:05d}-of-00002.parquet"
            images = [encoded(i) for i in pictures(count // 2, SIZE, seed=part)]
            write_parquet(root / "data" / name, images, range(count // 2))
    (root / "README.md").write_text("images")
    return root


def parquet_file(root):
    return write_parquet(root / "f.parquet", [encoded(i) for i in pictures(30, SIZE)], range(30))


def classes_in_splits(root):
    # Paths are ordered by their parts: "a" before "a-b", though "/" comes after "-".
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        write_folder(root / split, pictures(24, SIZE, seed=seed), ("a-b", "a", "B"))
    (root / "train" / "a" / ".hidden.png").write_bytes(b"x")
    (root / "train" / "a" / "notes.txt").write_text("x")
    return root


def classes_alone(root):
    return write_folder(root, pictures(30, SIZE), ("cat", "bird"))


def pictures_alone(root):
    for number, image in enumerate(pictures(30, SIZE)):
        (root / f"{number}.png").write_bytes(encoded(image))
    return root


KINDS = [parquet_folder, parquet_file, classes_in_splits, classes_alone, pictures_alone]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request, tmp_path):
    """A source on a disk."""
    (tmp_path / "set").mkdir()
    return request.param(tmp_path / "set")


@pytest.fixture
def folder(tmp_path):
    """Pictures by class on a disk."""
    return classes_alone(tmp_path / "set")


def staged(config, run=None):
    source = opened(config)
    return stage(config, source, run or in_process(source))


def test_shards_of_a_source_in_s3_are_to_the_byte_those_of_the_same_files_on_a_disk(
    kind, tmp_path, bucket, monkeypatch
):
    there = put(kind, f"{bucket}/some/prefix/{kind.name}")
    settings = dict(validation=4, full_images=True)
    here = staged(config_of(kind, tmp_path / "here", **settings))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # nothing is copied to a disk
    assert staged(config_of(there, tmp_path / "there", **settings)) == here
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    # Workers open it for themselves.
    staged(config_of(there, tmp_path / "far", **settings), lambda tasks: map(make, tasks))
    assert contents(tmp_path / "far") == contents(tmp_path / "here")
    # And it is known for the same staging, whichever of the two goes on.
    again = staged(config_of(there, tmp_path / "here", **settings))
    assert again["reused"] == again["shards"]


def test_a_bucket_itself_is_a_source(folder, bucket):
    put(folder, bucket)
    for address in (bucket, f"{bucket}/"):
        source = open_source(address)
        assert source.name == bucket.removeprefix("s3://") and source.count("train") == 30
        again = open_source(source.address, **dict(source.options))
        assert again.fingerprint == source.fingerprint == open_source(str(folder)).fingerprint


def test_a_slash_says_that_the_folder_is_meant(folder, bucket):
    put(folder, f"{bucket}/set")
    raw(bucket, "set", b"no folder")
    source = open_source(f"{bucket}/set/")
    again = open_source(source.address, **dict(source.options))  # as workers do
    assert source.count("train") == again.count("train") == 30
    with pytest.raises(SourceError, match="is a file, and no .parquet file"):
        open_source(f"{bucket}/set")


def test_another_service_is_read_alike(folder, tmp_path, strict_bucket):
    there = put(folder, f"{strict_bucket}/set")
    staged(config_of(folder, tmp_path / "here", validation=4))
    staged(config_of(there, tmp_path / "there", validation=4))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_the_job_says_what_it_found_and_how_much_it_will_fetch(folder, tmp_path, bucket, capsys):
    there = put(folder, f"{bucket}/set")
    at(there).write("cat/notes.txt", b"x" * 1000)
    flags = f"--source {there} --out {tmp_path}/out --size 9 --validation 3 --no-ray".split()
    assert job.main(flags) == 2  # of another size: nothing is written, and yet all is said
    said = capsys.readouterr().err
    size = sum(f.stat().st_size for f in folder.rglob("*.png"))
    for line in (
        "found train 30 images, no validation, no test", "2 classes: bird, cat",
        "passed over 1 .txt file(s)", f"30 file(s) of {size:,} bytes in all lie in S3",
    ):  # fmt: skip
        assert line in said and said.index(line) < said.index("error:")
    assert f"image {there}/" in said


# What changes meanwhile


def longer(place, key):
    place.write(key, place.read(key) + b"x")


def shorter(place, key):
    place.write(key, place.read(key)[:10])


def other(place, key):
    place.write(key, place.read(key)[:-1] + b"x")


CHANGES = {
    longer: "has changed since it was listed",
    shorter: "has changed since it was listed|is shorter than when it was listed",
    other: "has changed since it was listed",
    lambda place, key: place.delete(key): "was listed, and is gone",
}


def published(out):
    return [key for key in at(out).list() if key.endswith("manifest.json")]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["before the hash", "after the hash"])
def test_a_file_that_changes_while_it_is_staged_is_named_and_nothing_is_published(
    kind, tmp_path, bucket, change, late
):
    there = put(kind, f"{bucket}/{kind.name}")
    config = config_of(there, tmp_path / "out", validation=4)
    source = opened(config)
    file = source.files["train"][-1]
    key = str(file).removeprefix(f"{bucket}/")
    if late:
        assert source.fingerprint
    change(at(bucket), key)
    with pytest.raises(SourceError, match=f"{key} ({CHANGES[change]}).*stage again"):
        stage(config, source, in_process(source))
    assert not published(tmp_path / "out")


@pytest.mark.parametrize("change", CHANGES)
def test_workers_that_find_other_files_than_were_hashed_stop(folder, tmp_path, bucket, change):
    there = put(folder, f"{bucket}/set")
    config = config_of(there, tmp_path / "out", validation=4)

    def changed_before_it_begins(tasks):
        change(at(there), "bird/001.png")
        return map(make, tasks)

    message = "files of .*/set are others than those that were found first.*, maybe .*stage again"
    with pytest.raises(SourceError, match=message) as refused:
        staged(config, changed_before_it_begins)
    # The one that was written last; one that was removed cannot be named.
    assert change.__name__ == "<lambda>" or f"maybe {there}/bird/001.png" in str(refused.value)
    assert not published(tmp_path / "out")


def test_what_is_no_data_may_change(folder, tmp_path, bucket):
    """So shards may be put beside the source, and workers look at it meanwhile."""
    there = put(folder, f"{bucket}/set")

    def run(tasks):
        at(there).write("notes.txt", b"x")
        return map(make, tasks)

    assert staged(config_of(there, tmp_path / "out", validation=4), run)["train"] == 22


# What is not there


@pytest.mark.parametrize("end", ["", "/"])
def test_a_prefix_with_nothing_below_it_is_refused(folder, bucket, tmp_path, end, capsys):
    put(folder, f"{bucket}/setting")  # begins so, and is not it
    flags = f"--source {bucket}/set{end} --out {tmp_path}/out --no-ray".split()
    assert job.main(flags) == 2
    said = capsys.readouterr().err
    assert re.search(r"source \(='s3://.*/set/?'\) is not there: .*`aws s3 ls`", said)
    assert not (tmp_path / "out").exists()


BAD = {
    "s3://not-there-3/x": "create the bucket, or name another",
    "s3:/bucket/x": "is not an S3 address; use s3://bucket/prefix",
    "s3:///x": "must name a bucket",
    "s3://KEYID:verysecret@bucket/x": "must hold no credentials",
    "s3://bucket/x?endpoint_override=y": "must have no '?'",
}


@pytest.mark.parametrize("address", BAD)
def test_an_address_that_cannot_be_is_refused(bucket, tmp_path, address, capsys):
    assert job.main(f"--source {address} --out {tmp_path}/out --no-ray".split()) == 2
    said = capsys.readouterr()
    assert BAD[address] in said.err and "verysecret" not in said.err + said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "set the AWS_SECRET_ACCESS_KEY of this key id"),
        ("AWS_ACCESS_KEY_ID", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
@pytest.mark.parametrize("what", ["set", "set/", "set/cat/000.png"])
def test_wrong_credentials_end_with_a_cure(
    strict_bucket, folder, tmp_path, monkeypatch, capsys, name, message, what
):
    put(folder, f"{strict_bucket}/set")
    monkeypatch.setenv(name, "wrongvalue")
    assert job.main(f"--source {strict_bucket}/{what} --out {tmp_path}/out --no-ray".split()) == 2
    said = capsys.readouterr().err
    assert message in said and f"{strict_bucket}/set" in said and "wrongvalue" not in said


class Answer:
    def __init__(self, status):
        self.status_code = status


@pytest.fixture
def refusing(bucket):
    """A function after which the service refuses some operations by a code."""
    client, done = s3_storage._client(), []

    def refuse(code, *operations):
        def service(model, params, request_signer, **rest):
            if model.name not in operations:
                return None
            done.append(model.name)
            # A HEAD has no body to give a reason in.
            code_ = "403" if model.name == "HeadObject" else code
            told = {"Code": code_, "Message": f"you sent {os.environ['AWS_SECRET_ACCESS_KEY']}"}
            return Answer(403), {"Error": told, "ResponseMetadata": {"HTTPStatusCode": 403}}

        client.meta.events.register("before-call.s3", service)
        done.append(service)

    yield refuse
    client.meta.events.unregister("before-call.s3", done[0])
    assert len(done) > 1, "nothing was refused"


@pytest.mark.parametrize("operation", ["ListObjectsV2", "GetObject"])
@pytest.mark.parametrize(
    ("code", "cure"),
    [
        ("AccessDenied", "s3:ListBucket and s3:GetObject to read"),
        ("InvalidObjectState", "restore it from the archive"),
    ],
)
def test_what_may_not_be_read_is_named_with_a_cure(
    kind, tmp_path, bucket, refusing, capsys, operation, code, cure
):
    if kind.is_file() and operation == "ListObjectsV2":
        refusing(code, operation, "HeadObject")  # a file is looked for by its name
    else:
        refusing(code, operation)
    there = put(kind, f"{bucket}/{kind.name}")
    flags = f"--source {there} --out {tmp_path}/out --size 8 --validation 4 --no-ray".split()
    assert job.main(flags) == 2
    said = capsys.readouterr().err
    assert f"error: {there}" in said and code in said and cure in said
    assert "TESTSECRET" not in said and "not whole" not in said
    assert not (tmp_path / "out").exists()


def test_who_may_list_and_not_look_or_look_and_not_list_may_read(folder, bucket, refusing):
    there = put(folder, f"{bucket}/set")
    refusing("AccessDenied", "HeadObject")
    assert open_source(there).count("train") == 30


def test_who_may_look_and_not_list_names_a_file(tmp_path, bucket, refusing):
    there = put(parquet_file(tmp_path), f"{bucket}/f.parquet")
    refusing("AccessDenied", "ListObjectsV2")
    assert open_source(there).count("train") == 30
    with pytest.raises(StorageError, match="AccessDenied"):
        open_source(bucket)


# Keys that are no files


def raw(bucket, key, body=b""):
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=body)


def test_marks_of_folders_are_no_files(folder, tmp_path, bucket):
    there = put(folder, f"{bucket}/set")
    for key in ("set/", "set", "set/cat/", "set/bird", "set/empty/"):
        raw(bucket, key)
    for address in (there, f"{there}/"):
        source = open_source(address)
        assert source.count("train") == 30 and source.classes == ["bird", "cat"]
    staged(config_of(folder, tmp_path / "here", validation=4))
    staged(config_of(there, tmp_path / "there", validation=4))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.parametrize("key", ["set//x.png", "set/./x.png", "set/../x.png", "set/cat//"])
def test_a_key_that_is_no_path_is_refused_by_name(folder, bucket, key):
    there = put(folder, f"{bucket}/set")
    raw(bucket, key, b"x")
    with pytest.raises(SourceError, match=f"{re.escape(key)} has an empty part, '.' or '..'"):
        open_source(there)


def test_a_file_that_is_a_folder_too_is_refused_by_name(folder, bucket):
    there = put(folder, f"{bucket}/set")
    raw(bucket, "set/cat", b"x")
    with pytest.raises(SourceError, match="set/cat is a file and a folder at once; rename"):
        open_source(there)


# By the part


def test_a_file_is_read_by_the_part_as_one_on_a_disk_is(tmp_path, bucket):
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "f.bin").write_bytes(data)
    path = remote(put(tmp_path / "f.bin", f"{bucket}/f.bin"))
    assert path.read_bytes() == data
    with path.open("rb") as there, (tmp_path / "f.bin").open("rb") as here:
        for file in (there, here):
            file.seek(-5, os.SEEK_END)
        assert there.read(100) == here.read(100) == data[-5:]
        for file in (there, here):
            file.seek(7)
        assert there.read(2_500_000) == here.read(2_500_000)
        assert there.read() == here.read() and there.read(1) == b"" == there.read()
        for file in (there, here):
            file.seek(10, os.SEEK_END)
        assert there.read(5) == here.read(5) == b""
