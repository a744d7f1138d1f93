"""One contract, kept by a local folder and by a real S3 service; and S3's own refusals."""

import io
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from conftest import s3_environment

from mambaflow.storage import MULTIPART_BYTES, LocalStorage, StorageError, at

CASES = ["local", pytest.param("s3", marks=pytest.mark.s3)]


@pytest.fixture(params=CASES)
def storage(request, tmp_path):
    if request.param == "local":
        return at(tmp_path / "root")
    return at(request.getfixturevalue("bucket")).child("some/prefix")


def test_what_is_written_is_read(storage):
    for data in (b"", b"one", bytes(range(256)) * 100):
        storage.write("a/b.bin", data)  # each replaces the one before
        assert storage.read("a/b.bin") == data
    assert storage.child("a").read("b.bin") == data


def test_a_missing_file_is_missing(storage):
    assert not storage.exists("nothing") and storage.list() == []
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.read("nothing")
    storage.delete("nothing")
    storage.delete_tree("nothing/")


def test_a_missing_file_leaves_no_download(storage, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.download("nothing", tmp_path / "here" / "copy")
    assert not any((tmp_path / "here").iterdir())


def test_files_are_listed_by_prefix_in_order(storage):
    for key in ("b/2", "a", "b/1", "bc", "b/d/3"):
        storage.write(key, key.encode())
    assert storage.list() == ["a", "b/1", "b/2", "b/d/3", "bc"]
    assert storage.list("b/") == ["b/1", "b/2", "b/d/3"]
    assert storage.list("b") == ["b/1", "b/2", "b/d/3", "bc"]
    assert storage.list("b/d/3") == ["b/d/3"]
    assert storage.child("b").list() == ["1", "2", "d/3"]


def test_deleting_a_tree_leaves_its_neighbours(storage):
    for key in ("run/a", "run/b/c", "running", "other"):
        storage.write(key, b"x")
    storage.delete("other")
    storage.delete_tree("run/")
    assert storage.list() == ["running"]


def test_only_the_first_creates(storage):
    assert storage.create("claims/one", b"mine")
    assert not storage.create("claims/one", b"yours")
    assert storage.read("claims/one") == b"mine"
    assert storage.list() == ["claims/one"]


@pytest.mark.parametrize("size", [MULTIPART_BYTES - 1, 2 * MULTIPART_BYTES + 5])
def test_a_large_file_survives_the_way_there_and_back(storage, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", "files/large")
    storage.download("files/large", tmp_path / "back" / "large")
    assert (tmp_path / "back" / "large").read_bytes() == data
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["large"]
    assert storage.read("files/large") == data


@pytest.mark.s3
def test_large_uploads_go_in_parts_with_sha256_that_the_service_keeps(bucket, tmp_path):
    (tmp_path / "large").write_bytes(bytes(2 * MULTIPART_BYTES + 5))
    at(bucket).upload(tmp_path / "large", "large")
    at(bucket).write("small", b"small")
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    large = client.head_object(Bucket=name, Key="large", ChecksumMode="ENABLED")
    small = client.head_object(Bucket=name, Key="small", ChecksumMode="ENABLED")
    assert large["ETag"].strip('"').endswith("-3")  # three parts
    assert "ChecksumSHA256" in large and "ChecksumSHA256" in small


@pytest.mark.s3
def test_a_listing_goes_on_beyond_a_thousand_files(bucket):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    keys = [f"many/{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=name, Key=key, Body=b""), keys))
    assert at(bucket).list("many/") == keys


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    storage = at(tmp_path)

    def full(path, data):
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write("file", b"12345678")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_an_upload_that_fails_half_way_leaves_nothing(bucket, tmp_path):
    class Failing(io.BufferedReader):
        """A file whose disk dies after the first part."""

        def read(self, size=-1):
            if self.tell() >= MULTIPART_BYTES:
                raise OSError(5, "Input/output error")
            return super().read(size)

    (tmp_path / "large").write_bytes(bytes(3 * MULTIPART_BYTES))
    with pytest.raises(OSError, match="Input/output"):
        at(bucket)._put("large", Failing(io.FileIO(tmp_path / "large")))
    assert at(bucket).list() == []
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    assert not uploads.get("Uploads")  # nor parts that one pays for


WRITER = """
import sys
from mambaflow.storage import at
storage = at(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    storage.write("file", bytes([number % 256]) * 300_000)
    number += 1
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    for wait in (0.0, 0.003, 0.01, 0.03):
        folder = tmp_path / uuid.uuid4().hex
        command = [sys.executable, "-c", WRITER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        while not at(folder).exists("file"):
            assert process.poll() is None
        time.sleep(wait)
        process.kill()
        process.wait()
        process.stdout.close()
        data = at(folder).read("file")
        assert len(data) == 300_000 and len(set(data)) == 1
        assert at(folder).list() == ["file"]  # whatever was half written is not seen


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "unknown scheme 'gs' in 'gs://bucket/x'; valid: a path, file://, s3://"),
        ("s3:///x", "'s3:///x' must name a bucket; use s3://bucket/prefix"),
        ("s3:/bucket/x", "'s3:/bucket/x' is not an S3 address; use s3://bucket/prefix"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(uri, message):
    with pytest.raises(ValueError) as refused:
        at(uri)
    assert str(refused.value) == message


def test_addresses_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert at("runs/x").uri == str(tmp_path / "runs" / "x") == at(f"file://{tmp_path}/runs/x").uri
    assert at("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert at("s3://bucket").child("a").uri == "s3://bucket/a"
    assert isinstance(at("~"), LocalStorage) and at("~").path == Path.home()
    with pytest.raises(ValueError, match="s3://bucket is not a local folder"):
        _ = at("s3://bucket").path


def test_a_folder_that_cannot_be_written_is_named_with_a_cure(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/x.*give a folder that you may write to"):
        at(tmp_path / "file").write("x", b"")


@pytest.mark.s3
def test_a_missing_bucket_is_named_with_a_cure(bucket):
    with pytest.raises(StorageError, match="s3://not-there-1.*create the bucket, or name another"):
        at("s3://not-there-1").write("x", b"")
    with pytest.raises(StorageError, match="create the bucket"):
        at("s3://not-there-1/prefix").list()


@pytest.mark.s3
def test_wrong_credentials_are_refused_with_a_cure_and_right_ones_are_not(
    strict_bucket, monkeypatch
):
    storage = at(strict_bucket)
    storage.write("x", b"in")
    for name, value, message in (
        ("AWS_SECRET_ACCESS_KEY", "wrong", "set the AWS_SECRET_ACCESS_KEY of this key id"),
        ("AWS_ACCESS_KEY_ID", "SOMEBODY", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)  # the client of before must not be used again
            for act in (lambda: storage.write("y", b""), lambda: storage.read("x"), storage.list):
                with pytest.raises(StorageError, match=message):
                    act()
    assert storage.list() == ["x"] and storage.read("x") == b"in"


@pytest.mark.s3
def test_an_older_service_without_checksums_keeps_the_files(strict_bucket, tmp_path):
    data = os.urandom(MULTIPART_BYTES + 5)
    (tmp_path / "large").write_bytes(data)
    at(strict_bucket).upload(tmp_path / "large", "a/large")
    at(strict_bucket).download("a/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.s3
def test_an_endpoint_that_nobody_answers_is_named_with_a_cure(monkeypatch):
    s3_environment(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match=r"s3://any/x.*127.0.0.1:9.*check AWS_ENDPOINT_URL"):
        at("s3://any").read("x")


@pytest.mark.s3
def test_a_body_that_breaks_off_is_asked_for_again(bucket, monkeypatch):
    from botocore.exceptions import IncompleteReadError
    from botocore.response import StreamingBody

    at(bucket).write("x", b"whole")
    breaks = iter([True, True])
    read = StreamingBody.read

    def breaking(body, amt=None):
        if next(breaks, False):
            raise IncompleteReadError(actual_bytes=1, expected_bytes=5)
        return read(body, amt)

    monkeypatch.setattr(StreamingBody, "read", breaking)
    assert at(bucket).read("x") == b"whole"
    assert next(breaks, None) is None  # both faults were met
