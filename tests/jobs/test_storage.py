import contextlib
import http.server
import io
import os
import pickle
import threading
import uuid
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.exceptions
import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import s3 as s3_module
from jobs.s3 import Patience, S3Store
from jobs.storage import ArrowStore, lies_within, open_store, open_uri, split_uri
from jobs.store import ChangedError, ObjectInfo, StorageError, Store, WindowedFile

STRANGE_NAMES = [
    "a#b.jpg",
    "100%25.jpg",
    "%2F.jpg",
    "with space +plus.jpg",
    "übung/日本語/😀.jpg",
    "quote'\"\\.jpg",
]
# fsspec takes these for patterns when it moves a file.
PATTERNS = ["a?b=c&d.jpg", "~/[x]*{y}.jpg"]


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each sort, at a folder whose name needs no quoting but begs for it."""
    if request.param == "s3":
        return request.getfixturevalue("bucket").store("some folder/100%#x")
    if request.param == "memory":
        return open_store(f"fsspec+memory://{uuid.uuid4().hex}/some folder")
    return open_store(str(tmp_path / "some folder" / "100%#x"))


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """Clients of the test are made by the test, and forgotten."""
    s3_module._s3_client.cache_clear()
    yield
    s3_module._s3_client.cache_clear()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time; the list says how long it would have been."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


# --- every store ----------------------------------------------------------------------------------


def test_round_trip(place: Store) -> None:
    assert list(place.list_objects()) == []
    assert place.info("folder/a") is None
    place.put("folder/a", b"first")
    place.put("folder/a", b"second, longer")
    assert place.read("folder/a") == b"second, longer"
    info = place.info("folder/a")
    assert info is not None
    assert (info.path, info.size) == ("folder/a", 14)
    assert place.read("folder/a", etag=info.etag) == b"second, longer"
    assert list(place.list_objects()) == [info]
    place.delete("folder/a")
    place.delete("folder/a")
    assert list(place.list_objects()) == []


def test_empty_object(place: Store) -> None:
    place.put("empty", b"")
    assert place.read("empty") == b""
    info = place.info("empty")
    assert info is not None
    assert place.open(info, 10).read() == b""


def test_list_is_sorted_and_relative(place: Store) -> None:
    paths = ["b/2", "a/x/1", "a/1", "a.b/1", "a-b", "a/1.tar", "B", "é"]
    for number, path in enumerate(paths):
        place.put(path, bytes(number))
    assert [info.path for info in place.list_objects()] == sorted(paths)
    assert [info.path for info in place.list_objects("a")] == ["a/1", "a/1.tar", "a/x/1"]
    assert list(place.list_objects("nothing")) == []
    sizes = {info.path: info.size for info in place.list_objects()}
    assert sizes == {path: number for number, path in enumerate(paths)}


def test_list_below_an_object_is_empty(place: Store) -> None:
    place.put("a.tar", b"1")
    assert list(place.list_objects("a.tar")) == []


@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place in ("local", "s3", "memory") for name in STRANGE_NAMES]
    + [(place, name) for place in ("local", "s3") for name in PATTERNS]
    + [("s3", "a/./b..jpg"), ("s3", "a//b.jpg")],
    indirect=["place"],
)
def test_names_are_taken_literally(place: Store, name: str) -> None:
    place.put(name, name.encode())
    assert [info.path for info in place.list_objects()] == [name]
    assert place.read(name, (1, 3)) == name.encode()[1:3]
    assert not place.put_if_absent(name, b"other")


def test_long_names(place: Store) -> None:
    name = "/".join(["x" * 99] * 8) + "/" + "y" * 99
    assert len(name) == 899
    place.put(name, b"1")
    assert [info.path for info in place.list_objects()] == [name]
    assert place.read(name) == b"1"


def test_ranges(place: Store) -> None:
    data = bytes(range(256))
    place.put("a", data)
    assert place.read("a", (0, 1)) == data[:1]
    assert place.read("a", (10, 20)) == data[10:20]
    assert place.read("a", (255, 256)) == data[255:]


@pytest.mark.parametrize("span", [(250, 260), (256, 257), (300, 301)])
def test_a_range_behind_the_end_is_a_change(place: Store, span: tuple[int, int]) -> None:
    place.put("a", bytes(256))
    with pytest.raises(ChangedError, match="changed after it was planned"):
        place.read("a", span)


def test_changed_object(place: Store) -> None:
    place.put("a", b"planned")
    planned = place.info("a")
    assert planned is not None
    place.put("a", b"another one")
    for span in (None, (0, 3)):
        with pytest.raises(ChangedError, match="start a new output") as caught:
            place.read("a", span, planned.etag)
        assert place.url("a") in str(caught.value)
    with pytest.raises(ChangedError):
        place.open(planned, 100).read()


def test_change_of_the_same_size_is_seen(bucket: Any, tmp_path: Path) -> None:
    for store in (bucket.store(), open_store(str(tmp_path))):
        store.put("a", b"one")
        planned = store.info("a")
        store.put("a", b"two")
        if isinstance(store, ArrowStore):
            os.utime(tmp_path / "a", ns=(1, 1))
        with pytest.raises(ChangedError):
            store.read("a", etag=planned.etag)


def test_missing_object(place: Store) -> None:
    place.put("a", b"1")
    for path in ("b", "a/b", "c/d"):
        for etag in ("", '"etag"'):
            with pytest.raises(FileNotFoundError) as caught:
                place.read(path, etag=etag)
            assert str(caught.value) == f"{place.uri}/{path} does not exist"


def test_put_if_absent(place: Store) -> None:
    assert place.put_if_absent("lease/1", b"mine")
    assert not place.put_if_absent("lease/1", b"yours")
    assert place.read("lease/1") == b"mine"
    assert [info.path for info in place.list_objects()] == ["lease/1"]


def test_put_over(place: Store) -> None:
    assert not place.put_over("a", b"1", '"etag"')
    assert place.info("a") is None
    place.put("a", b"1")
    first = place.info("a")
    assert first is not None
    assert place.put_over("a", b"22", first.etag)
    assert not place.put_over("a", b"333", first.etag)
    assert place.read("a") == b"22"
    assert [info.path for info in place.list_objects()] == ["a"]


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_one_of_sixteen_puts_wins(place: Store) -> None:
    for race in range(5):
        start = threading.Barrier(16)

        def put(number: int, path: str = f"lease-{race}", start: threading.Barrier = start) -> bool:
            start.wait()
            return place.put_if_absent(path, str(number).encode())

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(put, range(16)))
        assert won.count(True) == 1
        assert place.read(f"lease-{race}") == str(won.index(True)).encode()
    assert len(list(place.list_objects())) == 5


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_readers_never_see_a_part(place: Store) -> None:
    versions = [bytes([number]) * 200_000 for number in range(20)]
    place.put("a", versions[0])
    stop = threading.Event()

    def seen() -> set[bytes]:
        found = set()
        while not stop.is_set():
            found.add(place.read("a"))
        return found

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(seen) for _ in range(2)]
        for version in versions[1:]:
            place.put("a", version)
        stop.set()
    assert readers[0].result() | readers[1].result() <= set(versions)
    assert place.read("a") == versions[-1]


def test_a_store_travels_without_credentials(place: Store) -> None:
    place.put("a", b"1")
    list(place.list_objects())
    packed = pickle.dumps(place)
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[secret].encode() not in packed
        assert os.environ[secret] not in repr(place) + str(vars(place))
    there = pickle.loads(packed)
    assert there.uri == place.uri
    assert there.read("a") == b"1"


# --- local and other file systems -----------------------------------------------------------------


class Faulty:
    """A file system that fails at one call."""

    def __init__(self, filesystem: pafs.FileSystem, call: str, error: Exception) -> None:
        self._filesystem, self._call, self._error = filesystem, call, error

    def __getattr__(self, name: str) -> Any:
        if name != self._call:
            return getattr(self._filesystem, name)

        def fail(*arguments: Any, **options: Any) -> None:
            raise self._error

        return fail


class HalfStream:
    """A stream that takes half of what it is given, and fails: a full disk."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> "HalfStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, data: bytes) -> None:
        self.stream.write(data[: len(data) // 2])
        raise OSError("No space left on device")


class FullDisk:
    def __init__(self, filesystem: pafs.FileSystem) -> None:
        self._filesystem = filesystem

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    def open_output_stream(self, path: str) -> HalfStream:
        return HalfStream(self._filesystem.open_output_stream(path))


def test_failed_put_leaves_the_old_object(tmp_path: Path) -> None:
    good = pafs.LocalFileSystem()
    store = ArrowStore(good, str(tmp_path), str(tmp_path))
    store.put("a", b"the old one")
    store.filesystem = FullDisk(good)
    with pytest.raises(OSError, match="No space left"):
        store.put("a", b"the new one")
    assert store.read("a") == b"the old one"
    visible = [i.path for i in store.list_objects() if not i.path.startswith(".")]
    assert visible == ["a"]


def test_unreadable_file_is_an_error_of_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert isinstance(store, ArrowStore)
    store.put("a", b"1")
    store.filesystem = Faulty(store.filesystem, "open_input_file", PermissionError("no access"))
    with pytest.raises(StorageError, match="cannot be read: no access") as caught:
        store.read("a")
    assert str(tmp_path / "a") in str(caught.value)


def test_object_stores_are_written_directly() -> None:
    class Gcs(Faulty):
        type_name = "gcs"

    memory, root = pafs.FileSystem.from_uri(f"fsspec+memory://{uuid.uuid4().hex}")
    store = ArrowStore(Gcs(memory, "move", AssertionError("moved")), root, "gs://bucket")
    store.put("folder/a", b"1")
    assert [info.path for info in store.list_objects()] == ["folder/a"]


def test_a_root_without_a_name(tmp_path: Path) -> None:
    store = ArrowStore(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "", "sub:")
    store.put("a", b"1")
    store.put("folder/b", b"22")
    assert [(info.path, info.size) for info in store.list_objects()] == [("a", 1), ("folder/b", 2)]
    assert (tmp_path / "folder" / "b").read_bytes() == b"22"


def test_the_root_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("/")
    (tmp_path / "here").write_bytes(b"1")
    assert store.info("here") is None
    assert store.read(f"{tmp_path}/here".lstrip("/")) == b"1"
    assert store.url("a") == "/a"
    below = str(tmp_path).lstrip("/")
    assert [info.path for info in store.list_objects(below)] == [f"{below}/here"]


def test_a_relative_path_means_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("out")
    store.put("a", b"1")
    assert store.uri == str(tmp_path / "out")
    monkeypatch.chdir("/")
    assert store.read("a") == b"1"


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    store = open_store(str(tmp_path))
    assert store.info("folder.tar") is None
    for name in ("folder.tar", "a" * 300, "zero\0byte"):
        with pytest.raises(FileNotFoundError, match=r"is no file|does not exist"):
            store.read(name)


# --- S3 -------------------------------------------------------------------------------------------


def test_listing_goes_on_behind_a_page(bucket: Any) -> None:
    store = bucket.store("input")
    for number in range(5):
        store.put(f"{number}.jpg", b"")
    bucket.client.put_object(Bucket=bucket.name, Key="input/placeholder/", Body=b"")
    bucket.client.put_object(Bucket=bucket.name, Key="input-2/other.jpg", Body=b"")
    events = store._client.meta.events
    pages: list[Any] = []

    def two(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        pages.append(params)
        return {**params, "MaxKeys": 2}

    events.register("provide-client-params.s3.ListObjectsV2", two)
    found = [info.path for info in store.list_objects()]
    events.unregister("provide-client-params.s3.ListObjectsV2", two)
    assert found == [f"{number}.jpg" for number in range(5)]
    assert len(pages) == 3


@pytest.mark.parametrize(("there", "won"), [(None, True), (b"theirs", False)])
def test_a_lost_answer(bucket: Any, there: bytes | None, won: bool) -> None:
    store = bucket.store()
    if there is not None:
        store.put("lease", there)
    client = store._client
    calls: list[str] = []

    def lose_the_first_answer(request: Any, **_: Any) -> None:
        calls.append(request.method)
        if calls == ["PUT"]:
            client._endpoint.http_session.send(request)
            raise botocore.exceptions.ConnectionClosedError(endpoint_url=request.url)

    client.meta.events.register("before-send.s3.PutObject", lose_the_first_answer)
    try:
        assert store.put_if_absent("lease", b"mine") is won
    finally:
        client.meta.events.unregister("before-send.s3.PutObject", lose_the_first_answer)
    assert calls == ["PUT", "PUT"]
    assert store.read("lease") == (there or b"mine")


def test_no_such_bucket(bucket: Any) -> None:
    store = open_store(f"{bucket.uri}-not/there", bucket.endpoint_url)
    calls: list[Callable[[], Any]] = [
        lambda: list(store.list_objects()),
        lambda: store.read("a"),
        lambda: store.put("a", b""),
        lambda: store.delete("a"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="bucket does not exist: check its name and"):
            call()


def test_no_credentials(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, fresh_client: None, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        StorageError, match="Unable to locate credentials: set AWS_PROFILE"
    ) as caught:
        bucket.store().read("a")
    assert f"{bucket.uri}/a" in str(caught.value)


def test_no_server(monkeypatch: pytest.MonkeyPatch, fresh_client: None) -> None:
    monkeypatch.setattr(s3_module, "PATIENCE", Patience(attempts=1))
    with pytest.raises(StorageError, match=r"s3://bucket/a: .*http://127\.0\.0\.1:9"):
        open_store("s3://bucket", "http://127.0.0.1:9").read("a")


class Moody(http.server.BaseHTTPRequestHandler):
    """Answers as the list of its server says, one entry for each request, then well."""

    protocol_version = "HTTP/1.1"
    body = bytes(range(256)) * 40

    def do_GET(self) -> None:
        mood = self.server.moods.pop(0) if self.server.moods else "well"  # type: ignore[attr-defined]
        if mood.isdigit():
            error = f"<Error><Code>{self.server.code}</Code></Error>".encode()  # type: ignore[attr-defined]
            self.send_response(int(mood))
            self.send_header("Content-Length", str(len(error)))
            self.end_headers()
            self.wfile.write(error)
            return
        body = self.body
        crc = b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("x-amz-checksum-crc32", crc)
        self.end_headers()
        if mood == "cut":
            self.wfile.write(body[:5000])
            self.close_connection = True
        elif mood == "flipped":
            self.wfile.write(body[:-1] + b"?")
        else:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def moody() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    server.moods, server.code = [], "SlowDown"  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "moods",
    [["cut"], ["flipped"], ["cut", "flipped", "cut", "cut", "cut"], ["503"] * 9, ["500", "cut"]],
)
def test_transient_trouble_is_ridden_out(
    moody: Any, moods: list[str], no_waiting: list[float], fresh_client: None
) -> None:
    moody.moods = list(moods)
    assert open_store("s3://bucket", moody.url).read("a") == Moody.body
    assert moody.moods == []
    assert len(no_waiting) == len(moods)


def test_lasting_trouble_names_the_object(
    moody: Any, no_waiting: list[float], fresh_client: None
) -> None:
    for moods in (["cut"] * 99, ["503"] * 99, ["flipped"] * 99):
        moody.moods = moods
        with pytest.raises(StorageError, match=r"s3://bucket/a(: | was damaged)") as caught:
            open_store("s3://bucket", moody.url).read("a")
        assert not isinstance(caught.value, ChangedError)
        assert 85 < len(moody.moods) < 99


def test_a_range_that_is_ignored_is_no_content(moody: Any, fresh_client: None) -> None:
    with pytest.raises(ChangedError):
        open_store("s3://bucket", moody.url).read("a", (0, 10))


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("AccessDenied", "access is denied: check the credentials"),
        ("InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        ("SomethingElse", "SomethingElse"),
    ],
)
def test_refusals_say_what_to_do(moody: Any, code: str, advice: str, fresh_client: None) -> None:
    moody.moods, moody.code = ["403"], code
    with pytest.raises(StorageError, match=advice) as caught:
        open_store("s3://bucket/x", moody.url).read("a")
    assert "s3://bucket/x/a" in str(caught.value)


def test_a_head_that_is_refused_is_not_a_missing_object(moody: Any, fresh_client: None) -> None:
    with pytest.raises(StorageError, match="access is denied"):
        open_store("s3://bucket/x", moody.url).info("a")


# --- URIs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket/a/b.tar", ("s3://bucket/a", "b.tar")),
        ("s3://bucket/b.tar/", ("s3://bucket", "b.tar")),
        ("s3://bucket", ("s3://bucket", "")),
        ("/data/b.tar", ("/data", "b.tar")),
        ("/b.tar", ("/", "b.tar")),
        ("b.tar", (".", "b.tar")),
        ("data/b.tar", ("data", "b.tar")),
        ("file:///b.tar", ("file:///", "b.tar")),
        ("file:///data/b.tar", ("file:///data", "b.tar")),
    ],
)
def test_split_uri(uri: str, parts: tuple[str, str]) -> None:
    assert split_uri(uri) == parts


@pytest.mark.parametrize("form", ["{}", "file://{}", "{}/"])
def test_local_uris(tmp_path: Path, form: str) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(b"1")
    store = open_store(form.format(tmp_path / "a b"))
    assert store.read("x") == b"1"
    assert store.uri == str(tmp_path / "a b")


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix", "shown"),
    [
        ("s3://bucket", "bucket", "", "s3://bucket"),
        ("s3://bucket/", "bucket", "", "s3://bucket"),
        ("s3://bucket/a//b/", "bucket", "a//b", "s3://bucket/a//b"),
    ],
)
def test_s3_uris(uri: str, bucket: str, prefix: str, shown: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix, store.uri) == (bucket, prefix, shown)
    assert store.url("x") == f"{shown}/x"
    assert store.url("") == shown


def test_other_schemes() -> None:
    store = open_store("mock://bucket/folder/")
    store.put("a/b", b"1")
    assert store.read("a/b") == b"1"
    assert [info.path for info in store.list_objects()] == ["a/b"]
    assert store.url("a/b") == "mock://bucket/folder/a/b"
    bucket = open_store(f"fsspec+memory://{uuid.uuid4().hex}")
    bucket.put("a", b"1")
    assert [info.path for info in bucket.list_objects()] == ["a"]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "names no bucket: write s3://BUCKET/PREFIX"),
        ("s3:///a", "names no bucket"),
        ("s3://bad bucket!/a", "'bad bucket!' is no name of a bucket"),
        ("s3://me@bucket/a", "'me@bucket' is no name of a bucket"),
        ("nope://bucket/a", "cannot use 'nope://bucket/a'"),
    ],
)
def test_uris_that_name_no_place(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_store(uri)


def test_endpoint_of_the_environment(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.store("x").put("a", b"1")
    s3_module._s3_client.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint_url)
    assert open_store(f"{bucket.uri}/x").read("a") == b"1"
    s3_module._s3_client.cache_clear()


def test_open_uri_remembers_folders(bucket: Any) -> None:
    first, name = open_uri(f"{bucket.uri}/x/a.jpg", bucket.endpoint_url)
    second, other = open_uri(f"{bucket.uri}/x/b.jpg", bucket.endpoint_url)
    assert (name, other) == ("a.jpg", "b.jpg")
    assert first is second


# --- the windowed file ----------------------------------------------------------------------------


class Recorder:
    """Stands in for a store; notes what is read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.spans: list[tuple[int, int]] = []

    def read(self, path: str, span: tuple[int, int], etag: str) -> bytes:
        assert (path, etag) == ("a", "etag")
        assert 0 <= span[0] < span[1] <= len(self.data)
        self.spans.append(span)
        return self.data[slice(*span)]


calls = st.one_of(
    st.tuples(st.just("read"), st.none() | st.integers(-1, 60)),
    st.tuples(st.just("readinto"), st.integers(0, 60)),
    st.tuples(st.just("seek"), st.integers(-60, 60), st.sampled_from([0, 1, 2])),
    st.tuples(st.just("tell")),
    st.tuples(st.just("readall")),
)


@given(st.binary(max_size=50), st.integers(1, 60), st.lists(calls, max_size=20))
def test_a_windowed_file_is_a_file(data: bytes, window: int, made: list[Any]) -> None:
    plain = io.BytesIO(data)
    info = ObjectInfo("a", len(data), "etag")
    windowed = WindowedFile(Recorder(data), info, window)  # type: ignore[arg-type]
    assert windowed.readable()
    assert windowed.seekable()
    for name, *arguments in made:
        if name == "readinto":
            mine, theirs = bytearray(arguments[0]), bytearray(arguments[0])
            assert windowed.readinto(mine) == plain.readinto(theirs)
            assert mine == theirs
        elif name == "readall":
            assert windowed.readall() == plain.read()
        elif name == "seek" and (
            {0: 0, 1: plain.tell(), 2: len(data)}[arguments[1]] + arguments[0] < 0
        ):
            # A file refuses this from the start; BytesIO stops there otherwise.
            with pytest.raises(ValueError, match="before the start"):
                windowed.seek(*arguments)
        else:
            assert getattr(windowed, name)(*arguments) == getattr(plain, name)(*arguments)


def test_a_window_serves_many_reads() -> None:
    recorder = Recorder(bytes(range(200)))
    file = WindowedFile(recorder, ObjectInfo("a", 200, "etag"), 64)  # type: ignore[arg-type]
    assert b"".join(file.read(10) for _ in range(6)) == bytes(range(60))
    assert recorder.spans == [(0, 64)]
    assert file.read(100) == bytes(range(60, 160))
    assert recorder.spans == [(0, 64), (60, 160)]
    file.seek(-10, io.SEEK_END)
    assert file.read() == bytes(range(190, 200))
    assert recorder.spans[2:] == [(190, 200)]


def test_a_buffered_reader_stands_on_it(bucket: Any) -> None:
    store = bucket.store()
    store.put("a", b"one\ntwo\r\nthree")
    file = store.open(store.info("a"), 4)
    with contextlib.closing(io.TextIOWrapper(io.BufferedReader(file))) as lines:
        assert list(lines) == ["one\n", "two\n", "three"]


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))).write_bytes(b"1")
    with pytest.raises(StorageError, match=r"whose name is no UTF-8, .*xff\.jpg"):
        list(open_store(str(tmp_path)).list_objects())


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(FileNotFoundError, match="is a pipe or a device"):
        open_store(str(tmp_path)).read("pipe.jpg")


def test_within_is_said_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for spelled in ("in/out", "link/out", "other/../in/out"):
        assert lies_within(str(tmp_path / spelled), str(tmp_path / "in")), spelled
    assert not lies_within(str(tmp_path / "inside"), str(tmp_path / "in"))
