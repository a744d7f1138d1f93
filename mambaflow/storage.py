"""Where files are kept: the storage at an address, a local folder or a prefix in S3.

`at("runs/x")`, `at("s3://bucket/runs/x")`.
"""

import re
from pathlib import Path

from mambaflow.local_storage import LocalStorage
from mambaflow.s3_storage import S3Storage
from mambaflow.storage_base import Storage


def at(uri: str | Path) -> Storage:
    """The storage at a local path, file:///path or s3://bucket/prefix.

    Raises:
        ValueError: another scheme, or an S3 address without a bucket.
    """
    # A Path made of s3://bucket reads s3:/bucket, which would be a folder called s3: here.
    text = str(uri)
    _require_plain(text)
    scheme, found, rest = text.partition("://")
    if not found:
        # Absolute, so that the address means the same to workers in folders of their own.
        return LocalStorage(Path(text).expanduser().resolve())
    if scheme == "file":
        # What stands before the first slash is a host's name there.
        if not rest.startswith("/"):
            raise ValueError(f"{text!r} must be file:///path, with three slashes; or give the path")
        return LocalStorage(Path(rest).resolve())
    if scheme != "s3":
        raise ValueError(f"unknown scheme {scheme!r} in {text!r}; valid: a path, file://, s3://")
    # Of pyarrow's addresses; here it would silently be a part of every key.
    if "?" in rest:
        raise ValueError(
            f"an S3 address must have no '?' ({text.partition('?')[0]}?…); set AWS_ENDPOINT_URL "
            "and the like in the environment"
        )
    # Of pyarrow's addresses, too: before it stand a key and its secret, which no message may hold.
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            "an S3 address must hold no credentials before an '@'; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and use s3://bucket/prefix"
        )
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ValueError(f"{text!r} must name a bucket; use s3://bucket/prefix")
    # As in a folder: what is joined with a slash too many is the same place.
    parts = [part for part in prefix.split("/") if part]
    if {".", ".."} & {*parts}:
        raise ValueError(f"{text!r} must have no part '.' or '..', which S3 does not follow")
    return S3Storage(bucket, "/".join(parts))


def _require_plain(text: str) -> None:
    """Refuse an address that would silently be another place than is meant."""
    if text != text.strip() or not text.isprintable():
        raise ValueError(
            f"{text!r} must have no blanks around it and no control characters, such as the end of "
            "a line that was copied with it, nor bytes that are not UTF-8"
        )
    if re.match(r"\$\{?\w", text):
        raise ValueError(f"{text!r} begins with a variable that no shell has put in; put it in")
    # What a Path makes of s3://bucket; it would be a folder called s3: here.
    if re.match(r"s3:(?!//)", text, re.IGNORECASE):
        raise ValueError(f"{text!r} is not an S3 address; use s3://bucket/prefix")
    if re.match(r"[A-Za-z][\w+.-]+:/(?!/)", text):
        raise ValueError(f"{text!r} is no address; use a path, or s3://bucket/prefix")
