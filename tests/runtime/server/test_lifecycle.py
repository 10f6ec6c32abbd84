from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.fake_server import fake_server
from ziggurat.runtime.errors import ZigguratError
from ziggurat.runtime.server.lifecycle import serve
from ziggurat.runtime.server.listen import Listen


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="zl"))
    yield path
    shutil.rmtree(path)


PATIENCE = 60.0  # seconds in which a busy machine gets to anything


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something, and return it. Connections that are refused are not it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(httpx.TransportError):
            if found := condition():
                return found
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE)


def ready(url: str) -> None:
    until(lambda: get(f"{url}/health").status_code == 200, "the server did not come up")


class Stream(threading.Thread):
    """Reads a stream to its end; ``begun`` is set with its first event."""

    def __init__(self, url: str, pieces: int) -> None:
        super().__init__()
        self.begun, self.text, self._url, self._pieces = threading.Event(), "", url, pieces

    def run(self) -> None:
        body = {"prompt": str(self._pieces), "stream": True, "max_tokens": 1000}
        with (
            contextlib.suppress(httpx.TransportError),  # the server is gone
            httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=PATIENCE) as answer,
        ):
            for text in answer.iter_text():
                self.text += text
                self.begun.set()

    @property
    def events(self) -> list[Any]:
        return [json.loads(line[6:]) for line in self.text.splitlines() if line.startswith("data: {")]


def begun(url: str, pieces: int) -> Stream:
    ready(url)
    stream = Stream(url, pieces)
    stream.start()
    assert stream.begun.wait(PATIENCE)
    return stream


def ended(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    """Wait for the end; return the exit code and the lines of the log."""
    _, log = process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in log.splitlines()]


def test_running_streams_end_and_new_requests_are_refused() -> None:
    with fake_server(delay=0.05) as (process, url):
        stream = begun(url, 60)
        process.send_signal(signal.SIGTERM)
        until(lambda: get(f"{url}/health").status_code == 503, "the server does not close")
        got = httpx.post(f"{url}/v1/completions", json={"prompt": "1"}, timeout=PATIENCE)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "server_closing")
        assert int(got.headers["retry-after"]) > 0
        stream.join()
        assert stream.text.count("x ") == 60 and stream.text.endswith("data: [DONE]\n\n")
        code, log = ended(process)
        assert code == 0 and not [line for line in log if "traceback" in line]


def test_after_the_grace_streams_end_with_an_error_event() -> None:
    with fake_server(delay=0.05, grace=0.2) as (process, url):
        stream = begun(url, 1000)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        stream.join()
        code, log = ended(process)
        assert time.monotonic() - started < 20
        assert stream.events[-1]["error"]["code"] == "server_closing" and "[DONE]" not in stream.text
        assert code == 130
        lines = [line for line in log if line.get("path") == "/v1/completions"]
        assert [line["error"] for line in lines] == ["server_closing"]
        assert not [line for line in log if "traceback" in line]


def test_a_second_signal_ends_at_once() -> None:
    with fake_server(delay=0.05) as (process, url):
        stream = begun(url, 1000)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        stream.join()


def test_without_requests_it_ends_soon() -> None:
    with fake_server() as (process, url):
        ready(url)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0 and time.monotonic() - started < 20


def test_while_the_model_loads() -> None:
    with fake_server(loading=600) as (process, url):
        got = until(lambda: get(f"{url}/health"), "nothing answers")
        assert (got.status_code, got.json()["error"]["code"]) == (503, "model_loading")
        assert got.headers["X-Load-Progress"] == "0.000"
        assert httpx.post(f"{url}/v1/completions", json={}, timeout=PATIENCE).status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def make(_phase: Any, _url: str) -> Any:
        raise ZigguratError("no such model")

    with pytest.raises(ZigguratError, match="no such model"):
        serve(make, Listen(port=0))


def test_over_a_unix_socket_and_again_after_a_kill(folder: Path) -> None:
    path = folder / "s"
    for number in range(2):
        with fake_server(unix_socket=str(path)) as (process, _url):
            transport = httpx.HTTPTransport(uds=str(path), retries=8)
            with httpx.Client(transport=transport, base_url="http://test", timeout=60) as client:
                until(lambda: client.get("/health").status_code == 200, "the server did not come up")
                got = client.post("/v1/completions", json={"prompt": "3"})
            assert got.json()["choices"][0]["text"] == "x x x "
            process.send_signal(signal.SIGTERM if number else signal.SIGKILL)
            assert process.wait(timeout=60) == (0 if number else -signal.SIGKILL)
        assert path.exists() is not bool(number)


def talk(url: str, data: bytes, *, seconds: float = PATIENCE) -> bytes:
    """Send bytes and return all that comes until the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
        return answer


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    """A server that waits for nothing."""
    limits = {"head_timeout": 0.3, "body_timeout": 0.3, "stall_timeout": 0.5, "idle_timeout": 1, "max_connections": 5}
    with fake_server(**limits) as (_process, url):
        ready(url)
        yield url


def test_slow_heads_are_cut_off(impatient: str) -> None:
    for data in (b"", b"GET /health HTTP/1.1\r\nHost:", b"\r\n\r\n\r\n"):
        assert talk(impatient, data) == b""
    # the second request on a connection as well
    answer = talk(impatient, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HT")
    assert answer.count(b"HTTP/1.1 200") == 1


def test_slow_bodies_are_told_so(impatient: str) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    assert talk(impatient, head).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 40_000, b"431"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
    ],
)
def test_what_is_not_http_gets_an_error_object(impatient: str, data: bytes, status: bytes) -> None:
    head, _, body = talk(impatient, data).partition(b"\r\n\r\n")
    assert head.split(b" ", 2)[1] == status
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_connections_beyond_the_limit_are_told_so(impatient: str) -> None:
    host, port = impatient.removeprefix("http://").split(":")
    held: list[socket.socket] = []

    def refused() -> bytes:
        """With five others there; what waits for long is cut off, so that they are new each time."""
        while held:
            held.pop().close()
        held.extend(socket.create_connection((host, int(port))) for _ in range(5))
        answer = talk(impatient, b"")
        return answer if answer.startswith(b"HTTP/1.1 503 ") else b""

    assert b"too_many_connections" in until(refused, "a sixth connection is not refused")
    while held:
        held.pop().close()
    until(lambda: get(f"{impatient}/health").status_code == 200, "those that are closed count on")


def test_a_client_that_does_not_read_is_cut_off(impatient: str) -> None:
    host, port = impatient.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "400x100000", "stream": True, "max_tokens": 1000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(head % len(body) + body)
        ended = 'ziggurat_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0'
        until(lambda: ended in get(f"{impatient}/metrics").text, "the stream was not given up")
        idle = "ziggurat_generations_running 0.0"
        until(lambda: idle in get(f"{impatient}/metrics").text, "the request was not cancelled")
