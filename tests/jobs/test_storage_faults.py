"""A store in trouble, at the level of one request: what passes is ridden out and counted, what stays is named."""

import json
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs import documents, retries
from jobs import s3 as s3_module
from jobs.redact import holds_credentials, without_secrets
from jobs.s3 import Patience
from jobs.storage import open_store
from jobs.store import DamagedError, StorageError, Store
from tests.conftest import S3, Bucket
from tests.jobs.fault_server import (
    Answer,
    Exchange,
    Fault,
    FaultServer,
    cut,
    flip,
    flip_request,
    hang,
    lose_answer,
    pass_through,
    reset,
    slow,
    status,
)

DATA = bytes(range(256)) * 300
# Long enough for a busy machine that answers, short enough for the tests of one that hangs.
SHORT = Patience(attempts=4, first_wait_s=0.001, read_timeout_s=3)


@pytest.fixture(scope="module")
def server(s3: S3) -> Iterator[FaultServer]:
    with FaultServer(s3.endpoint_url) as made:
        yield made


@pytest.fixture
def faults(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    monkeypatch.setattr(s3_module, "PATIENCE", SHORT)
    retries.forget()
    server.clear()
    return server


@pytest.fixture
def store(faults: FaultServer, bucket: Bucket) -> Store:
    bucket.store("in").put("a", DATA)
    return open_store(f"{bucket.uri}/in", faults.url)


TRANSIENT: list[tuple[Fault, str]] = [
    (status(500, "InternalError"), "500"),
    (status(503, "SlowDown"), "503"),
    (status(503), "503"),
    (status(429, "TooManyRequests"), "429"),
    (status(400, "RequestTimeout"), "timeout"),
    (reset, "connection"),
]
IN_THE_BODY: list[tuple[Fault, str]] = [
    (cut(5000), "cut off"),
    (flip(7), "checksum"),
]
HANGING: list[tuple[Fault, str]] = [(hang(), "timeout"), (hang(after=5000), "timeout")]


@pytest.mark.parametrize(("fault", "kind"), HANGING)
def test_a_store_that_hangs_is_asked_again(
    store: Store, faults: FaultServer, fault: Fault, kind: str
) -> None:
    rule = faults.on("GET", "in/a", fault, times=1)
    assert store.read("a") == DATA
    assert rule.hits == 1
    assert retries.so_far() == {kind: 1}


@pytest.mark.parametrize(("fault", "kind"), TRANSIENT + IN_THE_BODY)
def test_what_passes_is_ridden_out_and_counted(
    store: Store, faults: FaultServer, fault: Fault, kind: str
) -> None:
    rule = faults.on("GET", "in/a", fault, times=2)
    assert store.read("a") == DATA
    assert rule.hits == 2
    assert retries.so_far() == {kind: 2}


@pytest.mark.parametrize(("fault", "kind"), [TRANSIENT[1], TRANSIENT[-1]])
@pytest.mark.parametrize("method", ["PUT", "HEAD", "DELETE", "GET list"])
def test_so_is_it_for_every_other_request(
    store: Store, faults: FaultServer, method: str, fault: Fault, kind: str
) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "PUT": lambda: store.put("b", DATA),
        "HEAD": lambda: store.info("a"),
        "DELETE": lambda: store.delete("a"),
        "GET list": lambda: list(store.list_objects()),
    }
    verb, _, what = method.partition(" ")
    rule = faults.on(verb, "list-type" if what else "in/", fault, times=1)
    calls[method]()
    assert rule.hits == 1
    assert retries.so_far() == {kind: 1}


def test_a_slow_store_is_no_broken_one(store: Store, faults: FaultServer) -> None:
    faults.on("GET", "in/a", slow(0.2))
    assert store.read("a") == DATA
    assert not retries.so_far()


@pytest.mark.parametrize(("fault", "kind"), [*TRANSIENT, IN_THE_BODY[0]])
def test_what_does_not_pass_is_given_up_and_named(
    store: Store, faults: FaultServer, fault: Fault, kind: str
) -> None:
    rule = faults.on("GET", "in/a", fault)
    with pytest.raises(StorageError) as caught:
        store.read("a")
    assert store.url("a") in str(caught.value)
    assert rule.hits == SHORT.attempts
    assert retries.so_far() == {kind: SHORT.attempts - 1}


def test_waits_double_with_jitter_up_to_a_limit() -> None:
    patience = Patience()
    waits = [[patience.wait_s(number) for _ in range(200)] for number in range(11)]
    for number, some in enumerate(waits):
        longest = min(20, 0.1 * 2**number)
        assert longest / 2 <= min(some) < max(some) <= longest
        assert max(some) - min(some) > longest / 4
    assert sum(min(some) for some in waits) > 42


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (403, "AccessDenied", "access is denied: check the credentials and the bucket's policy"),
        (400, "ExpiredToken", "have expired: renew them, and run the same command again"),
        (403, "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
        (404, "NoSuchBucket", "the bucket does not exist: check its name and --endpoint-url"),
        (400, "AuthorizationHeaderMalformed", "another region: check AWS_DEFAULT_REGION"),
        (405, "MethodNotAllowed", "check that --endpoint-url is an S3 store"),
        (403, "InvalidObjectState", "archived: restore it first"),
        (501, "NotImplemented", "conditional puts and ranged reads"),
    ],
)
def test_what_is_permanent_is_not_asked_again(
    store: Store, faults: FaultServer, number: int, code: str, words: str
) -> None:
    rule = faults.on("GET", "in/a", status(number, code))
    with pytest.raises(StorageError, match=words) as caught:
        store.read("a")
    assert str(caught.value).startswith(f"{store.url('a')}: ")
    assert rule.hits == 1
    assert not retries.so_far()


def test_a_missing_object_is_not_asked_again(store: Store, faults: FaultServer) -> None:
    rule = faults.on("GET", "in/a", status(404, "NoSuchKey"))
    with pytest.raises(FileNotFoundError, match=r"in/a does not exist"):
        store.read("a")
    assert rule.hits == 1


def test_an_endpoint_that_is_no_store(store: Store, faults: FaultServer) -> None:
    """A page of a web server must not be taken for an empty listing."""
    for page in (
        b"<html><body>It works!</body></html>",
        b"<!doctype html><meta charset=utf-8><title>Storage</title><br>It works!",
    ):
        answer = Answer(200, [], page)
        faults.on("GET", "list-type", lambda exchange, answer=answer: exchange.answer(answer))  # type: ignore[misc]
        with pytest.raises(StorageError, match="check that --endpoint-url is an S3 store"):
            list(store.list_objects())
        faults.clear()


def test_a_listing_that_is_cut_off_or_garbled_is_asked_again(
    store: Store, faults: FaultServer
) -> None:
    rules = [faults.on("GET", "list-type", fault, times=1) for fault in (cut(150), flip(-2))]
    assert [found.path for found in store.list_objects()] == ["a"]
    assert [found.path for found in store.list_objects()] == ["a"]
    assert [rule.hits for rule in rules] == [1, 1]
    assert sum(retries.so_far().values()) == 2


# --- damage ---------------------------------------------------------------------------------------


def test_damage_that_stays_is_named(store: Store, faults: FaultServer) -> None:
    rule = faults.on("GET", "in/a", flip(7))
    with pytest.raises(DamagedError, match=r"in/a was damaged in transit or in the store"):
        store.read("a")
    assert rule.hits == SHORT.checksum_attempts


@pytest.mark.parametrize("span", [None, (0, len(DATA))])
def test_an_etag_that_is_an_md5_sum_is_a_checksum(
    bucket: Bucket, faults: FaultServer, span: tuple[int, int] | None
) -> None:
    """Ranged reads have no checksum of the store's, but one over a whole object has its etag."""
    store = bucket.store("in")
    store.put("a", DATA)
    there = open_store(store.uri, faults.url)
    faults.on("GET", "in/a", without_checksums(flip(100)), times=1)
    assert there.read("a", span) == DATA
    assert retries.so_far() == {"checksum": 1}


def without_checksums(fault: Fault) -> Fault:
    """The same fault of a store that knows no checksums."""

    def stripped(exchange: Exchange) -> None:
        forward = exchange.forward

        def forward_stripped() -> Answer:
            answer = forward()
            answer.headers[:] = [h for h in answer.headers if not h[0].startswith("x-amz-checksum")]
            return answer

        exchange.forward = forward_stripped  # type: ignore[method-assign]
        fault(exchange)

    return stripped


def test_a_range_of_an_object_has_no_checksum(store: Store, faults: FaultServer) -> None:
    """What the README says cannot be caught; who reads ranges needs checksums of their own."""
    faults.on("GET", "in/a", flip(7))
    assert store.read("a", (0, 100)) != DATA[:100]


@pytest.mark.parametrize(
    "headers",
    [
        [("ETag", '"0123456789abcdef0123456789abcdef-2"')],
        [
            ("ETag", '"0123456789abcdef0123456789abcdef"'),
            ("x-amz-server-side-encryption", "aws:kms"),
        ],
    ],
)
def test_an_etag_that_is_none_is_not_taken_for_one(
    store: Store, faults: FaultServer, headers: list[tuple[str, str]]
) -> None:
    faults.on("GET", "in/a", with_headers(headers))
    assert store.read("a") == DATA
    assert not retries.so_far()


def with_headers(headers: list[tuple[str, str]]) -> Fault:
    names = {name.lower() for name, _ in headers}

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        kept = [header for header in answer.headers if header[0].lower() not in names]
        exchange.answer(Answer(answer.status, kept + headers, answer.body))

    return fault


def test_a_bit_flipped_on_its_way_to_the_store(store: Store, faults: FaultServer) -> None:
    rule = faults.on("PUT", "in/b", flip_request, times=1)
    store.put("b", DATA)
    assert rule.hits == 1
    assert retries.so_far() == {"checksum": 1}
    assert store.read("b") == DATA


# --- puts -----------------------------------------------------------------------------------------


def test_a_put_whose_answer_is_lost(store: Store, faults: FaultServer) -> None:
    rule = faults.on("PUT", "in/b", lose_answer, times=1)
    store.put("b", DATA)
    assert rule.seen == 2
    assert store.read("b") == DATA
    assert retries.so_far() == {"connection": 1}


@pytest.mark.parametrize(("there", "won"), [(None, True), (b"theirs", False)])
def test_a_conditional_put_whose_answer_is_lost(
    store: Store, faults: FaultServer, there: bytes | None, won: bool
) -> None:
    if there is not None:
        store.put("lease", there)
    rule = faults.on("PUT", "in/lease", lose_answer, times=1)
    assert store.put_if_absent("lease", b"mine") is won
    assert rule.seen == 2
    assert store.read("lease") == (there or b"mine")


def test_an_object_that_is_replaced_and_the_answer_lost(store: Store, faults: FaultServer) -> None:
    store.put("b", b"old")
    old = store.info("b")
    assert old is not None
    rule = faults.on("PUT", "in/b", lose_answer, times=1)
    assert store.put_over("b", b"new", old.etag)
    assert rule.seen == 2
    assert store.read("b") == b"new"


def test_a_conditional_put_of_which_a_bit_is_flipped_in_the_store(
    store: Store, faults: FaultServer
) -> None:
    faults.on("PUT", "in/b", flip_request, times=1)
    assert store.put_if_absent("b", DATA)
    assert retries.so_far() == {"checksum": 1}
    assert store.read("b") == DATA


def test_two_conditional_puts_at_once(store: Store, faults: FaultServer) -> None:
    faults.on("PUT", "in/lease", status(409, "ConditionalRequestConflict"), times=1)
    assert store.put_if_absent("lease", b"mine")
    assert retries.so_far() == {"conflict": 1}


def test_a_store_that_ignores_conditions_is_recognised(store: Store, faults: FaultServer) -> None:
    assert store.keeps_first("probe")
    faults.on("PUT", "in/probe", unconditionally)
    assert not store.keeps_first("probe")
    assert store.info("probe") is None


def unconditionally(exchange: Exchange) -> None:
    del exchange.headers["If-None-Match"]
    pass_through(exchange)


# --- documents ------------------------------------------------------------------------------------


def test_a_document_is_what_was_written(tmp_path: Path) -> None:
    local = open_store(str(tmp_path))
    document = {"ü": (1, 2.5), "none": None, "inner": {"1": [True]}}
    local.put("a.json", documents.dump(document))
    assert documents.read(local, "a.json") == {**document, "ü": [1, 2.5]}
    assert json.loads(local.read("a.json"))["ü"] == [1, 2.5]


def test_no_flipped_bit_of_a_document_is_taken_for_content(tmp_path: Path) -> None:
    local = open_store(str(tmp_path))
    document = {"name": "ü", "images": 1234, "notes": ["a b"], "limit": None}
    data = documents.dump(document)
    caught = 0
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        local.put("a.json", flipped)
        try:
            # Blanks between values carry nothing.
            assert documents.read(local, "a.json") == document
        except DamagedError:
            caught += 1
    assert caught > 0.8 * len(data)


def test_a_document_of_others_needs_no_digest(tmp_path: Path) -> None:
    local = open_store(str(tmp_path))
    local.put("a.json", b'{"a": 1}')
    assert documents.read(local, "a.json", made_by_us=False) == {"a": 1}
    with pytest.raises(DamagedError, match="it has no digest"):
        documents.read(local, "a.json")
    for bad in (b'{"a": 1', b"[1]", b'{"a": 1, "digest": "0"}'):
        local.put("a.json", bad)
        with pytest.raises(DamagedError, match=r"a\.json was damaged"):
            documents.read(local, "a.json", made_by_us=False)


# --- counting -------------------------------------------------------------------------------------


def test_retries_of_a_block_and_of_all() -> None:
    retries.forget()
    retries.note("503")
    with retries.counted() as inner, ThreadPoolExecutor(8) as pool:
        list(pool.map(retries.note, ["timeout"] * 200 + ["503"] * 100))
    assert inner == {"timeout": 200, "503": 100}
    with pytest.raises(ValueError), retries.counted() as failed:  # noqa: PT011, PT012
        retries.note("503")
        raise ValueError
    assert failed == {"503": 1}
    retries.add({"checksum": 2})
    assert retries.so_far() == {"timeout": 200, "503": 102, "checksum": 2}
    assert retries.in_words(retries.so_far()) == "200 x timeout, 102 x 503, 2 x checksum"


# --- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:hunter2@host:9000/b/k?x=1: no", "at http://***@host:9000/b/k?x=1: no"),
        ('"https://h/b?X-Amz-Date=1&X-Amz-Signature=abc&x=y" failed', '"https://h/b?***" failed'),
        ("https://h.blob/c?sv=1&sig=abc%3D", "https://h.blob/c?***"),
        ("s3://bucket/a:b@c?d", "s3://bucket/a:b@c?d"),
        ("at s3://AKIAIOSFODNN7EXAMPLE:wJa/lr+X@bucket/p: no", "at s3://***@bucket/p: no"),
        ("key secret-of-the-test, token token-of-the-test", "key ***, token ***"),
    ],
)
def test_texts_lose_their_secrets(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-test")
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("url", "held"),
    [
        ("http://me:hunter2@host", True),
        ("https://host/b?X-Amz-Credential=a&X-Amz-Signature=b", True),
        ("s3://key:secret@bucket/a", True),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJal/rX+U@bucket/a", True),
        ("http://host:9000", False),
        ("hdfs://me@host/a", False),
        ("https://TOKEN@host/a.jpg", True),
        ("https://host/a@b.jpg", False),
        ("abfs://container@account.dfs.core.windows.net/a?sig=x", True),
        ("abfs://container@account.dfs.core.windows.net/a?client_secret=x", True),
        ("abfs://container@account.dfs.core.windows.net/a", False),
        ("s3://bucket/a://b:c@d?sig=1", False),
        ("/data/a:b@c?sig=1", False),
    ],
)
def test_urls_with_credentials_are_refused(url: str, held: bool) -> None:
    assert holds_credentials(url) is held
    if held and url.startswith("s3"):
        with pytest.raises(ValueError, match=r"'s3://\*\*\*@bucket/a' holds credentials"):
            open_store(url)


def test_what_a_store_says_is_stripped_of_secrets(
    store: Store, faults: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-test")
    faults.on("GET", "in/a", status(400, "ExpiredToken", "the token token-of-the-test is too old"))
    with pytest.raises(StorageError, match=r"the token \*\*\* is too old") as caught:
        store.read("a")
    # Nor does the chain of errors, which Ray writes to its logs.
    assert "token-of-the-test" not in "".join(traceback.format_exception(caught.value))
