"""What tests share: a store that speaks S3, a small local Ray, images and tars made from seeds."""

import io
import os
import signal
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import boto3
import hypothesis
import numpy as np
import pytest
from PIL import Image

from jobs.storage import open_store
from jobs.store import Store
from segmodel.allocator import ONE_ARENA

# No test asserts a time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ImageMaker = Callable[..., bytes]
TarMaker = Callable[..., bytes]

# Whatever the machine is logged in to, a test talks to the server below, or to nobody.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # As of a local Ray that a verb starts.
    **ONE_ARENA,
}
CLEARED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION", "RAY_ADDRESS")


@cache
def _client(endpoint_url: str) -> Any:
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url)


@dataclass(frozen=True)
class Bucket:
    """A bucket on the tests' S3 server."""

    endpoint_url: str
    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @property
    def client(self) -> Any:
        return _client(self.endpoint_url)

    def store(self, prefix: str = "") -> Store:
        return open_store(f"{self.uri}/{prefix}".rstrip("/"), self.endpoint_url)


@dataclass(frozen=True)
class S3:
    """A server in this process that speaks S3 and keeps objects in memory."""

    endpoint_url: str

    def bucket(self) -> Bucket:
        """Make an empty bucket."""
        made = Bucket(self.endpoint_url, f"bucket-{uuid.uuid4().hex}")
        made.client.create_bucket(Bucket=made.name)
        return made

    def new_bucket(self) -> str:
        """Make an empty bucket and return its URI."""
        return self.bucket().uri


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Dummy credentials, for this process and for Ray's workers; Ctrl-C that can be tested."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in what a shell starts in the background; whatever is started from here would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in CLEARED:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def s3(environment: None) -> Iterator[S3]:
    """An S3 server for the whole session; `s3.new_bucket()` gives the URI of an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def bucket(s3: S3) -> Bucket:
    """An empty bucket for one test: its `uri`, `endpoint_url`, `client`, and `store(prefix)`."""
    return s3.bucket()


@pytest.fixture(scope="session")
def ray_local(environment: None) -> Iterator[None]:
    """A Ray of two CPUs in processes of this machine, one for the whole session."""
    import ray

    from jobs import cluster

    cluster.quieten()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config=cluster.LOCAL["_system_config"],
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """`picture(seed, size_hw)`: a smooth picture with its own colours."""

    def make(seed: int = 0, size_hw: tuple[int, int] = (24, 32)) -> Image.Image:
        small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
        return Image.fromarray(small).resize(size_hw[::-1], Image.Resampling.BILINEAR)

    return make


@pytest.fixture(scope="session")
def jpeg(picture: Callable[..., Image.Image]) -> ImageMaker:
    """`jpeg(seed, size_hw)`: bytes of a JPEG file, another one for each seed."""
    return lambda seed=0, size_hw=(24, 32): _saved(picture(seed, size_hw), "JPEG", quality=90)


@pytest.fixture(scope="session")
def png(picture: Callable[..., Image.Image]) -> ImageMaker:
    """`png(seed, size_hw)`: bytes of a PNG file, another one for each seed."""
    return lambda seed=0, size_hw=(24, 32): _saved(picture(seed, size_hw), "PNG")


@pytest.fixture(scope="session")
def make_tar() -> TarMaker:
    """`make_tar(members, format_)`: bytes of a tar of (name, content) pairs or `TarInfo`s."""

    def make(
        members: Iterable[tuple[str, bytes] | tarfile.TarInfo], format_: int = tarfile.GNU_FORMAT
    ) -> bytes:
        file = io.BytesIO()
        with tarfile.open(
            fileobj=file, mode="w", format=format_, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    archive.addfile(member)
                    continue
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
        return file.getvalue()

    return make


def _saved(image: Image.Image, codec: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, codec, **options)
    return file.getvalue()
