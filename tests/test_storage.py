"""One contract, kept by a local folder and by a real S3 service; and S3's own refusals."""

import errno
import fcntl
import io
import os
import pickle
import subprocess
import sys
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from s3_places import s3_environment

from mambaflow import local_storage, s3_storage
from mambaflow.disk import FullError
from mambaflow.local_storage import LocalStorage
from mambaflow.s3_storage import MULTIPART_BYTES
from mambaflow.storage import at
from mambaflow.storage_base import StorageError

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


@pytest.mark.parametrize("hidden", [".a", "b/.a", ".ipynb_checkpoints/a", "b/.ipynb_checkpoints/1"])
def test_what_is_hidden_or_in_a_hidden_folder_is_not_listed(storage, hidden):
    storage.write("b/1", b"")
    storage.write(hidden, b"")
    assert storage.list() == ["b/1"] == storage.list("b/")


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


def creators(storage, count: int) -> list[bool]:
    """Whether each of some writers, all at once, has created the same file."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda n: storage.create("a/one", b"%d" % n), range(count)))


def without_links(monkeypatch, number=errno.EPERM):
    """A file system as a mounted bucket is, exFAT, or many an SMB share."""

    def refused(self, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", refused)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links_lets_one_create(tmp_path, monkeypatch, number):
    without_links(monkeypatch, number)
    storage = at(tmp_path)
    won = creators(storage, 8)
    assert sum(won) == 1
    assert storage.read("a/one") == b"%d" % won.index(True)
    assert not storage.create("a/one", b"late")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one"]


def test_a_share_whose_files_have_no_mode_and_whose_readers_may_not_sync_is_written_to(
    tmp_path, monkeypatch
):
    """SMB mounted for somebody else, and some mounted buckets."""

    def refuse(handle: int, mode: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def sync(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "fsync", sync)
    storage = LocalStorage(tmp_path)
    storage.write("a", b"1")
    assert storage.create("b", b"2") and not storage.create("b", b"3")
    assert (storage.read("a"), storage.read("b")) == (b"1", b"2")


def test_a_process_that_was_killed_while_it_created_holds_nobody_up(tmp_path, monkeypatch):
    without_links(monkeypatch)
    monkeypatch.setattr(local_storage, "LOCK_S", 0.2)
    (tmp_path / ".one.lock").mkdir()
    assert at(tmp_path).create("one", b"mine")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_that_one_may_not_write_to_is_no_file_system_without_links(tmp_path, monkeypatch):
    without_links(monkeypatch, errno.EACCES)
    with pytest.raises(PermissionError):
        at(tmp_path).create("one", b"mine")


@pytest.mark.s3
def test_a_gateway_that_ignores_conditions_lets_one_create(strict_bucket):
    """rclone replaces what is there, whatever it is asked."""
    client, name = boto3.client("s3"), strict_bucket.removeprefix("s3://")
    for body in (b"one", b"two"):
        client.put_object(Bucket=name, Key="plain", Body=body, IfNoneMatch="*")
    assert client.get_object(Bucket=name, Key="plain")["Body"].read() == b"two"

    storage = at(strict_bucket)
    won = creators(storage, 4)
    assert sum(won) == 1 and storage.read("a/one") == b"%d" % won.index(True)
    assert not storage.create("a/one", b"late")
    assert storage.list() == ["a/one", "plain"]
    assert {path.name for path in strict_bucket_files(client, name)} == {"one", "plain"}


def strict_bucket_files(client, name) -> list[Path]:
    return [Path(o["Key"]) for o in client.list_objects_v2(Bucket=name)["Contents"]]


@pytest.mark.s3
def test_a_gateway_that_does_not_know_conditions_lets_one_create(bucket, monkeypatch):
    refused = []

    def gateway(model, params, request_signer, **rest):
        if "If-None-Match" in params["headers"]:
            refused.append(params["url_path"])
            error = {"Code": "NotImplemented", "Message": "A header you provided …"}
            return _Answer(501), {"Error": error, "ResponseMetadata": {"HTTPStatusCode": 501}}
        return None

    client = s3_storage._client()
    client.meta.events.register("before-call.s3.PutObject", gateway)
    try:
        storage = at(bucket)
        assert storage.create("a/one", b"mine") and not storage.create("a/one", b"yours")
    finally:
        client.meta.events.unregister("before-call.s3.PutObject", gateway)
    assert len(refused) == 1 and storage.read("a/one") == b"mine"  # asked once, and remembered


class _Answer:
    def __init__(self, status: int) -> None:
        self.status_code = status


@pytest.mark.s3
def test_who_died_with_a_claim_holds_nobody_up(strict_bucket, monkeypatch):
    storage = at(strict_bucket)
    storage.write(".one.claim-0000", b"")
    time.sleep(1.1)
    assert not storage.create("one", b"too soon")  # it may be alive
    monkeypatch.setattr(s3_storage, "CLAIM_S", 0.5)
    assert storage.create("one", b"mine")


@pytest.mark.s3
def test_who_created_and_did_not_hear_so_has_created(bucket, monkeypatch):
    storage = at(bucket)
    assert storage.create("before", b"")  # what the service can do is known from here on
    real, calls = s3_storage._client().put_object, []

    def twice(**what):
        """The request is done, its answer is lost, and boto3 repeats it."""
        calls.append(what)
        real(**what)
        return real(**what)

    with monkeypatch.context() as patched:
        patched.setattr(s3_storage._client(), "put_object", twice)
        assert storage.create("one", b"mine")
    assert len(calls) == 1 and not storage.create("one", b"yours")


@pytest.mark.parametrize(
    "name", ["AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"]
)
@pytest.mark.parametrize("end", ["\r", "\n", "\x07"])
def test_a_setting_with_a_stray_character_is_refused_by_name_and_never_told(
    name, end, monkeypatch, caplog, capsys
):
    s3_environment(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv(name, f"verysecretvalue{end}")
    for act in (lambda s: s.read("a"), lambda s: s.write("a", b""), lambda s: s.list()):
        with pytest.raises(ValueError, match=f"{name} .*must not hold") as refused:
            act(at("s3://bucket/prefix"))
        assert "verysecret" not in str(refused.value)
    captured = capsys.readouterr()
    assert "verysecret" not in caplog.text + captured.out + captured.err


@pytest.mark.s3
@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed", "BadDigest", "Odd"])
def test_no_message_holds_a_secret_and_common_faults_have_a_cure(bucket, code, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sessiontokenvalue")
    cures = {
        "ExpiredToken": "new AWS_SESSION_TOKEN", "RequestTimeTooSkewed": "set the clock",
        "BadDigest": "AWS_REQUEST_CHECKSUM_CALCULATION=when_required", "Odd": "see the cause",
    }  # fmt: skip

    def service(model, params, request_signer, **rest):
        # Some services quote what they were sent.
        secrets = (os.environ[name] for name in ("AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY"))
        error = {"Code": code, "Message": f"you sent {' and '.join(secrets)}"}
        return _Answer(400), {"Error": error, "ResponseMetadata": {"HTTPStatusCode": 400}}

    client = s3_storage._client()
    client.meta.events.register("before-call.s3", service)
    storage = at(bucket)
    acts = [lambda: storage.read("a"), lambda: storage.write("a", b""), lambda: storage.list(),
            lambda: storage.create("a", b""), lambda: storage.exists("a"),
            lambda: storage.delete("a")]  # fmt: skip
    try:
        for act in acts:
            with pytest.raises(StorageError, match=cures[code]) as refused:
                act()
            told = str(refused.value)
            assert "sessiontokenvalue" not in told and "TESTSECRET" not in told
    finally:
        client.meta.events.unregister("before-call.s3", service)


@pytest.mark.s3
def test_neither_a_message_nor_its_traceback_holds_a_secret_of_boto3s_own_file(
    bucket, tmp_path, monkeypatch
):
    key = os.environ["AWS_ACCESS_KEY_ID"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "keys").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = verysecretkey\n"
        "aws_session_token = verysecrettoken\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))

    def service(model, params, request_signer, **rest):
        told = "you sent verysecretkey and verysecrettoken to http://me:verysecret@proxy:3128"
        error = {"Code": "Odd", "Message": told}
        return _Answer(400), {"Error": error, "ResponseMetadata": {"HTTPStatusCode": 400}}

    s3_storage._client().meta.events.register("before-call.s3", service)
    with pytest.raises(StorageError, match="you sent .* to http://.*@proxy") as refused:
        at(bucket).read("a")
    assert "verysecret" not in "".join(traceback.format_exception(refused.value))


def test_a_profile_that_is_not_there_is_refused_by_name_whatever_is_asked_first(monkeypatch):
    s3_environment(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    for act in (lambda s: s.write("a", b""), lambda s: s.create("a", b""), lambda s: s.read("a")):
        with pytest.raises(StorageError, match="profile .*nobody.* could not be found"):
            act(at("s3://bucket/prefix"))


@pytest.mark.s3
def test_checksums_are_as_boto3s_own_file_says(bucket, tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_required\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    at(bucket).write("small", b"small")
    head = boto3.client("s3").head_object(
        Bucket=bucket.removeprefix("s3://"), Key="small", ChecksumMode="ENABLED"
    )
    assert "ChecksumSHA256" not in head


@pytest.mark.parametrize(
    ("file", "variables", "asked"),
    [
        ("", {}, ("adaptive", 5)),
        ("retry_mode = standard\nmax_attempts = 2", {}, ("standard", 2)),
        ("max_attempts = 2", {"AWS_MAX_ATTEMPTS": "7", "AWS_RETRY_MODE": "legacy"}, ("legacy", 7)),
    ],
)
def test_requests_are_repeated_as_boto3s_own_file_and_variables_say(
    file, variables, asked, tmp_path, monkeypatch
):
    s3_environment(monkeypatch, "http://127.0.0.1:9")
    (tmp_path / "config").write_text(f"[default]\n{file}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    retries = s3_storage._client().meta.config.retries
    assert (retries["mode"], retries["total_max_attempts"]) == asked


def test_a_number_in_boto3s_file_that_is_none_is_refused_by_name(tmp_path, monkeypatch):
    s3_environment(monkeypatch, "http://127.0.0.1:9")
    (tmp_path / "config").write_text("[default]\nmax_attempts = many\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StorageError, match=r"max_attempts \(='many'\) of boto3's file must be a"):
        at("s3://bucket/x").read("a")


def test_an_address_with_a_query_is_refused():
    with pytest.raises(ValueError, match=r"must have no '\?'.*AWS_ENDPOINT_URL"):
        at("s3://bucket/prefix?endpoint_override=localhost:9000")


def test_a_key_and_its_secret_in_an_address_are_refused_and_never_told():
    with pytest.raises(ValueError, match="no credentials before an '@'; set AWS_") as refused:
        at("s3://AKIA:verysecret@bucket/prefix")
    assert "verysecret" not in str(refused.value)
    assert at("s3://bucket/an@address").uri == "s3://bucket/an@address"


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
        *((odd, f"{odd!r} is not an S3 address; use s3://bucket/prefix")
          for odd in ("s3:/bucket/x", "S3:/bucket/x", "s3:bucket/x")),
        ("gs:/bucket/x", "'gs:/bucket/x' is no address; use a path, or s3://bucket/prefix"),
        ("file://data/x", "'file://data/x' must be file:///path, with three slashes; or give the "
         "path"),
        ("s3://b/runs/../x", "'s3://b/runs/../x' must have no part '.' or '..', which S3 does not "
         "follow"),
        *((odd, f"{odd!r} must have no blanks around it and no control characters, such as the end "
           "of a line that was copied with it, nor bytes that are not UTF-8")
          for odd in ("s3://b/x\r", "runs\n", " runs", "ru\0ns", "ru\udcffns")),
        *((odd, f"{odd!r} begins with a variable that no shell has put in; put it in")
          for odd in ("$SCRATCH/runs", "${HOME}/x")),
    ],
)  # fmt: skip
def test_an_address_that_leads_nowhere_is_refused(uri, message):
    with pytest.raises(ValueError) as refused:
        at(uri)
    assert str(refused.value) == message


def test_addresses_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert at("runs/x").uri == str(tmp_path / "runs" / "x") == at(f"file://{tmp_path}/runs/x").uri
    assert at("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert at("s3://bucket//a///b").uri == at("s3://bucket/a").child("b").uri
    assert at("./runs//x/").uri == at("runs/x").uri and at("what $it costs").is_local
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


def test_a_full_disk_names_the_file_says_what_to_do_and_leaves_nothing(small_disk, tmp_path):
    storage = at(small_disk)
    storage.write("before", b"kept")
    (tmp_path / "large").write_bytes(bytes(2**22))
    key = "step_0000001/model.safetensors"
    for put in (
        lambda: storage.write(key, bytes(2**22)),
        lambda: storage.create(key, bytes(2**22)),
        lambda: storage.upload(tmp_path / "large", key),
    ):
        with pytest.raises(FullError, match="No space left on device; free space there") as caught:
            put()
        assert str(caught.value).startswith(f"{small_disk}/{key}: ")
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), FullError), "Ray pickles it"
    files = [path for path in small_disk.rglob("*") if path.is_file()]
    assert files == [small_disk / "before"] and storage.read("before") == b"kept"


def test_a_quota_that_is_used_up_is_a_full_disk(tmp_path, monkeypatch):
    asked = []

    def used_up(self, data):
        asked.append(self)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_bytes", used_up)
    with pytest.raises(FullError, match="/x: Disk quota exceeded; free space there, or keep it"):
        at(tmp_path).write("x", b"1")
    assert len(asked) == 1 and not list(tmp_path.iterdir())
