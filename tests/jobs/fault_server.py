"""An S3 server that makes trouble: a proxy in front of the tests' own, told what to do to which request.

    faults = FaultServer(s3.endpoint_url)
    faults.on("GET", "a.tar", status(503), times=3)

Every request that matches a rule meets the rule's fault; all others pass through unchanged.
"""

import http.client
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from typing_extensions import override

# What belongs to one connection, not to the message.
HOP_HEADERS = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})
# A server that hangs does so until the test is over, but no thread of it for ever.
HANG_S = 300


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """One request under way: a fault may forward it, answer it, or break the connection."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def meet(self) -> None:
        """Meet the fault that is meant for this request."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        (self.server.faults.fault_for(self.command, self.path) or pass_through)(self)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = meet  # noqa: N815 - names of the base class

    def forward(self) -> Answer:
        """Pass the request on; return what the server behind says."""
        behind = http.client.HTTPConnection(self.server.faults.behind, timeout=HANG_S)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_HEADERS}
        behind.request(self.command, self.path, self.body, headers)
        found = behind.getresponse()
        body = found.read()
        behind.close()
        kept = [(k, v) for k, v in found.getheaders() if k.lower() not in HOP_HEADERS]
        return Answer(found.status, kept, body)

    def answer(self, answer: Answer, *, send: int | None = None) -> None:
        """Send an answer, or only the first `send` bytes of its body, and break off."""
        self.send_response_only(answer.status)
        length = {k.lower(): v for k, v in answer.headers}.get("content-length")
        for name, value in answer.headers:
            self.send_header(name, value)
        if length is None:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[:send])
        self.wfile.flush()
        if send is not None:
            self.break_off()

    def break_off(self, *, reset: bool = False) -> None:
        """Close the connection, with a reset where asked."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        # What the base class would flush to is gone.
        self.wfile, self.rfile = _Nowhere(), _Nowhere()  # type: ignore[assignment]

    @override
    def log_message(self, *_: object) -> None: ...


class _Nowhere:
    closed = False

    def flush(self) -> None: ...

    def close(self) -> None: ...


Fault = Callable[[Exchange], None]


def pass_through(exchange: Exchange) -> None:
    exchange.answer(exchange.forward())


def status(number: int, code: str = "", message: str = "trouble") -> Fault:
    """Answer with an error, and do nothing."""
    body = (
        f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
    )
    return lambda exchange: exchange.answer(
        Answer(number, [], b"" if exchange.command == "HEAD" else body)
    )


def slow(seconds: float) -> Fault:
    """Answer late, and in two parts."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        time.sleep(seconds)
        half = len(answer.body) // 2
        exchange.answer(Answer(answer.status, answer.headers, answer.body[:half]))
        time.sleep(seconds)
        exchange.wfile.write(answer.body[half:])

    return fault


def hang(after: int | None = None) -> Fault:
    """Never answer; or answer, and stop after so many bytes of the body."""

    def fault(exchange: Exchange) -> None:
        if after is not None:
            answer = exchange.forward()
            exchange.answer(Answer(answer.status, answer.headers, answer.body[:after]))
        exchange.server.faults.over.wait(HANG_S)
        exchange.close_connection = True

    return fault


def cut(after: int) -> Fault:
    """Break off after so many bytes of the body."""
    return lambda exchange: exchange.answer(exchange.forward(), send=after)


def reset(exchange: Exchange) -> None:
    """Reset the connection before anything is done."""
    exchange.break_off(reset=True)


def flip(at: int = -1, bit: int = 0) -> Fault:
    """Answer with one bit of the body another way round."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        body = bytearray(answer.body)
        body[at] ^= 1 << bit
        exchange.answer(Answer(answer.status, answer.headers, bytes(body)))

    return fault


def flip_request(exchange: Exchange) -> None:
    """Flip the last bit of what is put."""
    exchange.body = exchange.body[:-1] + bytes([exchange.body[-1] ^ 1])
    pass_through(exchange)


def lose_answer(exchange: Exchange) -> None:
    """Do what was asked for, and say nothing."""
    exchange.forward()
    exchange.break_off()


def hold(until: threading.Event, done: threading.Event) -> Fault:
    """Do what was asked for only when told, whether or not somebody still waits; then say so."""

    def fault(exchange: Exchange) -> None:
        until.wait(HANG_S)
        exchange.forward()
        done.set()
        exchange.close_connection = True

    return fault


def keep_back(until: threading.Event) -> Fault:
    """Do what was asked for, and answer, only when told."""

    def fault(exchange: Exchange) -> None:
        until.wait(HANG_S)
        pass_through(exchange)

    return fault


def then(call: Callable[[], Any]) -> Fault:
    """Answer well, after something else has happened."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        call()
        exchange.answer(answer)

    return fault


@dataclass
class Rule:
    """Which requests of a method and a path meet a fault: `times` of them, behind the first `skip`."""

    method: str
    path: "re.Pattern[str]"
    fault: Fault
    times: float
    skip: int
    seen: int = 0

    @property
    def hits(self) -> int:
        """How many requests met it."""
        return int(max(0, min(self.seen - self.skip, self.times)))


@dataclass
class FaultServer:
    """The proxy: a context manager; `url` is its address, `behind` that of the server behind it."""

    endpoint_url: str
    rules: list[Rule] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.behind = urllib.parse.urlsplit(self.endpoint_url).netloc
        self.over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def on(
        self, method: str, path: str, fault: Fault, times: float = float("inf"), skip: int = 0
    ) -> Rule:
        """Let requests meet a fault; `path` is a pattern searched for in the path and query."""
        rule = Rule(method, re.compile(path), fault, times, skip)
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules."""
        self.rules = []

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Return what the next request of this kind meets; the first rule that applies."""
        plain = urllib.parse.unquote(path)
        with self._lock:
            for rule in self.rules:
                if rule.method == method and rule.path.search(plain):
                    rule.seen += 1
                    if 0 < rule.seen - rule.skip <= rule.times:
                        return rule.fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, faults: FaultServer) -> None:
        self.faults = faults
        super().__init__(("127.0.0.1", 0), Exchange)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that have gone away are what this server is for."""
