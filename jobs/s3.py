"""`s3://`, through boto3.

A plan needs etags, reads need `If-Match` in the same request, and the ledger needs conditional
puts, none of which `pyarrow.fs` offers.
"""

import contextlib
import hashlib
import itertools
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
from typing_extensions import override

from jobs import retries, s3_errors, traffic
from jobs.redact import without_secrets
from jobs.store import ChangedError, DamagedError, ObjectInfo, StorageError, Store

# Reader tasks fetch loose images with this many threads at most, each with its own connection.
MAX_CONNECTIONS = 64
# Of a large file, uploaded at once: 10,000 parts are the most, so that 640 GB fit.
PART_BYTES = 64 * 2**20

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How much trouble a store may make before a job gives up.

    One loop asks again, whatever failed: botocore's own does not see bodies that break off, and
    has a quota that sixteen reading threads use up within seconds.

    Attributes:
        attempts: For each request; twelve ride out at least 42 s, and 64 s on average.
        checksum_attempts: Where what arrives is damaged: in transit it is once, in the store always.
        first_wait_s: Before the second attempt, at most; it doubles with each, and at least half of
            it is waited.
        longest_wait_s: Between two attempts, at most.
        connect_timeout_s: Without a connection for so long, an attempt has failed.
        read_timeout_s: Without a byte for so long.
    """

    attempts: int = 12
    checksum_attempts: int = 4
    first_wait_s: float = 0.1
    longest_wait_s: float = 20
    connect_timeout_s: float = 10
    read_timeout_s: float = 60

    def attempts_for(self, kind: str) -> int:
        """Return how often to ask where an attempt failed so; `kind` is empty where it is final."""
        if kind == s3_errors.CHECKSUM:
            return self.checksum_attempts
        return self.attempts if kind else 1

    def wait_s(self, number: int) -> float:
        """Return how long to wait after attempt `number`, counted from 0."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2**number)
        return random.uniform(longest / 2, longest)


PATIENCE = Patience()


class S3Store(Store):
    """A prefix of a bucket of Amazon S3 or of a store that speaks its protocol."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.uri = "s3://" + "/".join(part for part in (bucket, prefix) if part)
        # It travels with the store, so that all processes of a job have the same.
        self.patience = PATIENCE

    @property
    def _client(self) -> Any:
        return _s3_client(self.endpoint_url, self.patience)

    @override
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        wanted = {"Bucket": self.bucket, "Prefix": start + (f"{prefix}/" if prefix else "")}
        while True:
            page = self._ask(prefix, "list_objects_v2", wanted)
            if "IsTruncated" not in page:
                # A web page may be read as a listing, an empty one.
                raise StorageError(f"{self.url(prefix)}: {s3_errors.NO_STORE}")
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):
                    path, modified = found["Key"][len(start) :], found["LastModified"].timestamp()
                    yield ObjectInfo(path, found["Size"], found["ETag"], modified)
            if not page["IsTruncated"]:
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    @override
    def info(self, path: str) -> ObjectInfo | None:
        try:
            head = self._ask(path, "head_object", self._named(path))
        except FileNotFoundError:
            return None
        modified = head["LastModified"].timestamp()
        return ObjectInfo(path, head["ContentLength"], head["ETag"], modified)

    @override
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        wanted = self._named(path)
        if etag:
            wanted["IfMatch"] = etag
        if span is not None:
            wanted["Range"] = f"bytes={span[0]}-{span[1] - 1}"

        def whole_body(answer: Mapping[str, Any]) -> bytes:
            data = bytes(answer["Body"].read())
            if span is None or answer.get("ContentRange") == f"bytes 0-{len(data) - 1}/{len(data)}":
                self._check(path, data, answer)
            return data

        data: bytes = self._ask(path, "get_object", wanted, whole_body)
        traffic.note("read", len(data))
        if span is not None and len(data) != span[1] - span[0]:
            raise self.changed(path)
        return data

    @override
    def put(self, path: str, data: bytes) -> None:
        self._ask(
            path,
            "put_object",
            {**self._named(path), "Body": data},
            lambda answer: self._check(path, data, answer),
        )

    @override
    def put_file(self, path: str, source: Path) -> None:
        with source.open("rb") as file:
            parts = iter(lambda: file.read(PART_BYTES), b"")
            first = next(parts, b"")
            if len(first) < PART_BYTES:
                self.put(path, first)
            else:
                self._put_parts(path, itertools.chain([first], parts))

    def _put_parts(self, path: str, parts: Iterable[bytes]) -> None:
        """Upload an object in parts: each is asked for again by itself, and it appears at the end."""
        begun = self._ask(path, "create_multipart_upload", self._named(path))
        upload = {**self._named(path), "UploadId": begun["UploadId"]}
        done = []
        try:
            for number, part in enumerate(parts, start=1):
                wanted = {**upload, "PartNumber": number, "Body": part}
                etag = self._ask(path, "upload_part", wanted)["ETag"]
                done.append({"PartNumber": number, "ETag": etag})
            wanted = {**upload, "MultipartUpload": {"Parts": done}}
            self._ask(path, "complete_multipart_upload", wanted)
        except BaseException:
            # Parts without an end would be paid for until somebody finds them.
            with contextlib.suppress(OSError):
                self._ask(path, "abort_multipart_upload", upload)
            raise

    @override
    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self._put_if(path, data, {"IfNoneMatch": "*"})

    @override
    def put_over(self, path: str, data: bytes, etag: str) -> bool:
        return self._put_if(path, data, {"IfMatch": etag})

    def _put_if(self, path: str, data: bytes, condition: Mapping[str, str]) -> bool:
        """Write an object where a condition holds; return whether it did."""
        try:
            answer = self._ask(path, "put_object", {**self._named(path), "Body": data, **condition})
        except (ChangedError, FileNotFoundError):
            # After a lost answer the put is repeated, and meets our own object.
            with contextlib.suppress(FileNotFoundError):
                return self.read(path) == data
            return False
        try:
            self._check(path, data, answer)
        except DamagedError:
            # The object is ours, and not what was sent.
            retries.note(s3_errors.CHECKSUM)
            self.put(path, data)
        return True

    @override
    def delete(self, path: str) -> None:
        self._ask(path, "delete_object", self._named(path))

    def _named(self, path: str) -> dict[str, Any]:
        return {
            "Bucket": self.bucket,
            "Key": "/".join(part for part in (self.prefix, path) if part),
        }

    def _ask(
        self,
        path: str,
        call: str,
        wanted: Mapping[str, Any],
        use: Callable[[Mapping[str, Any]], Any] = lambda answer: answer,
    ) -> Any:
        """Make a request and use its answer, again with back-off and jitter after what may pass.

        Raises:
            FileNotFoundError: There is no such object.
            ChangedError: It is another one than asked for.
            StorageError: It cannot be used; the message names it and says what to do.
        """
        for number in itertools.count():
            try:
                done = use(getattr(self._client, call)(**wanted))
            except s3_errors.FAILURES as error:
                kind = s3_errors.passing(error)
                if number + 1 >= self.patience.attempts_for(kind):
                    # Not from the error: its text may repeat a token, and Ray logs the chain.
                    raise self._plain(path, error) from None
            else:
                traffic.note("written", len(wanted.get("Body", b"")))
                return done
            retries.note(kind)
            time.sleep(self.patience.wait_s(number))
        raise AssertionError

    def _check(self, path: str, data: bytes, answer: Mapping[str, Any]) -> None:
        """Compare a whole object with its etag, where that is its MD5 sum.

        It is none of objects of several parts, of those encrypted with keys of the customer or of
        KMS, and in directory buckets.

        Raises:
            DamagedError: They differ.
        """
        etag = str(answer.get("ETag", "")).strip('"').lower()
        encrypted = answer.get("SSECustomerAlgorithm") or "kms" in str(
            answer.get("ServerSideEncryption", "")
        )
        if encrypted or self.bucket.endswith("--x-s3") or not re.fullmatch("[0-9a-f]{32}", etag):
            return
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
            raise self.damaged(path, "its content does not have the MD5 sum that its etag states")

    def _plain(self, path: str, error: Exception) -> OSError:
        """Return the error that names the object and says what to do."""
        if isinstance(error, DamagedError):
            return error
        code = s3_errors.code(error)
        if code in ("404", "NoSuchKey"):
            return FileNotFoundError(f"{self.url(path)} does not exist")
        if code in ("412", "PreconditionFailed", "416", "InvalidRange"):
            return self.changed(path)
        if s3_errors.passing(error) == s3_errors.CHECKSUM:
            return self.damaged(path, without_secrets(str(error)))
        return StorageError(f"{self.url(path)}: {s3_errors.advice(error)}")


@cache
def _s3_client(endpoint_url: str | None, patience: Patience) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        config=botocore.config.Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=patience.connect_timeout_s,
            read_timeout=patience.read_timeout_s,
            max_pool_connections=MAX_CONNECTIONS,
        ),
    )
