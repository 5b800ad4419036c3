"""`s3://`, through boto3.

A plan needs etags, reads need `If-Match` in the same request, and the ledger needs conditional
puts, none of which `pyarrow.fs` offers.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
from typing_extensions import override

from jobs.store import ChangedError, ObjectInfo, StorageError, Store

# Ten attempts with back-off ride out about 25 s of 503s; botocore waits up to 20 s between two.
MAX_ATTEMPTS = 10
# A body that breaks off is not retried by botocore: so many times by us, waiting up to 0.1, 0.2,
# 0.4 ... s.
BODY_ATTEMPTS = 6
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
# Reader tasks fetch loose images with this many threads at most, each with its own connection.
MAX_CONNECTIONS = 64

Result = TypeVar("Result")


class S3Store(Store):
    """A prefix of a bucket of Amazon S3 or of a store that speaks its protocol."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.uri = "s3://" + "/".join(part for part in (bucket, prefix) if part)

    @property
    def _client(self) -> Any:
        return _s3_client(self.endpoint_url)

    @override
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=start + (f"{prefix}/" if prefix else "")
        )
        with self._errors(prefix):
            for page in pages:
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):
                        yield ObjectInfo(
                            found["Key"][len(start) :],
                            found["Size"],
                            found["ETag"],
                            found["LastModified"].timestamp(),
                        )

    @override
    def info(self, path: str) -> ObjectInfo | None:
        try:
            with self._errors(path):
                head = self._client.head_object(Bucket=self.bucket, Key=self._key(path))
        except FileNotFoundError:
            return None
        modified = head["LastModified"].timestamp()
        return ObjectInfo(path, head["ContentLength"], head["ETag"], modified)

    @override
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        wanted: dict[str, str] = {"Bucket": self.bucket, "Key": self._key(path)}
        if etag:
            wanted["IfMatch"] = etag
        if span is not None:
            wanted["Range"] = f"bytes={span[0]}-{span[1] - 1}"

        def attempt() -> bytes:
            return bytes(self._client.get_object(**wanted)["Body"].read())

        with self._errors(path):
            data = _again_when_broken_off(attempt)
        if span is not None and len(data) != span[1] - span[0]:
            raise self.changed(path)
        return data

    @override
    def put(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    @override
    def put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            with self._errors(path):
                self._client.put_object(
                    Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*"
                )
        except ChangedError:
            # A lost answer makes botocore repeat the put, which then meets our own object.
            return self.read(path) == data
        return True

    @override
    def delete(self, path: str) -> None:
        with self._errors(path):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path) if part)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn botocore's errors into ones that name the object and say what to do."""
        url = self.url(path)
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = str(error.response["Error"].get("Code"))
            if code in ("404", "NoSuchKey"):
                raise FileNotFoundError(f"{url} does not exist") from error
            if code in ("412", "PreconditionFailed", "416", "InvalidRange"):
                raise self.changed(path) from error
            raise StorageError(f"{url}: {_ADVICE.get(code, code)} ({error})") from error
        except botocore.exceptions.NoCredentialsError as error:
            raise StorageError(f"{url}: {_ADVICE['NoCredentials']}") from error
        except botocore.exceptions.EndpointConnectionError as error:
            raise StorageError(f"{url}: {error}: check --endpoint-url and the network") from error
        except botocore.exceptions.BotoCoreError as error:
            raise StorageError(f"{url}: {error}") from error


_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: check its name and --endpoint-url",
    "403": "access is denied: check the credentials and the bucket's policy",
    "AccessDenied": "access is denied: check the credentials and the bucket's policy",
    "InvalidAccessKeyId": "the access key is unknown to this store: check AWS_ACCESS_KEY_ID",
    "NoCredentials": "no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or give the machine a role",
}


@cache
def _s3_client(endpoint_url: str | None) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        config=botocore.config.Config(
            retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=MAX_CONNECTIONS,
        ),
    )


def _again_when_broken_off(attempt: Callable[[], Result]) -> Result:
    """Call `attempt`, again with back-off and jitter when a body breaks off or arrives damaged."""
    for number in range(BODY_ATTEMPTS - 1):
        with contextlib.suppress(
            botocore.exceptions.ReadTimeoutError,
            botocore.exceptions.ResponseStreamingError,
            botocore.exceptions.IncompleteReadError,
            botocore.exceptions.FlexibleChecksumError,
        ):
            return attempt()
        time.sleep(random.uniform(0, 0.1 * 2**number))
    return attempt()
