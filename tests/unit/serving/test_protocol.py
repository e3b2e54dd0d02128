"""Connections of slow clients, to a server of uvicorn's in this process whose patience is short."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from dist_mnist.serving import protocol
from dist_mnist.serving.protocol import PatientProtocol
from helpers import HANGS_AFTER_S
from helpers.web import request

LARGE = 1 << 26  # bytes of an answer, which no socket buffers


async def echo(scope, receive, send) -> None:
    """Answer with the length of the body, or, at /large, with much."""
    received, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        received, more = received + len(message["body"]), message["more_body"]
    body = bytes(LARGE) if scope["path"] == "/large" else str(received).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setattr(protocol, "PATIENCE_S", 0.3)
        patch.setattr(protocol, "GOODBYE_S", 0.3)
        config = uvicorn.Config(echo, http=PatientProtocol, ws="none", lifespan="off", log_config=None, loop="asyncio")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(HANGS_AFTER_S)


def until_closed(url: str, *sent: bytes) -> bytes:
    """All that comes from the server until it closes a connection, on which these bytes are all that is sent."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), HANGS_AFTER_S) as connection:
        for some in sent:
            connection.sendall(some)
            time.sleep(0.05)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"


@pytest.mark.parametrize("sent", [
    (b"GET / HT",), (b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n", b"X: y\r\n"), (HEAD,), (HEAD, b"1", b"2", b"3"),
], ids=["within the first line", "headers", "no body", "body"])  # fmt: skip
def test_protocol_request_that_does_not_come_is_given_up(url, sent):
    found = until_closed(url, *sent)
    assert found.startswith(b"HTTP/1.1 408 Request Timeout\r\n") and b"the request did not arrive within 0.3 s" in found


def test_protocol_second_request_that_does_not_come_is_given_up(url):
    found = until_closed(url, HEAD + b"1234567890" + HEAD)
    first, second = found.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ") and first.endswith(b"\r\n\r\n10") and second.startswith(b"408 ")


def test_protocol_connection_without_a_request_is_closed(url):
    assert until_closed(url) == b""


def test_protocol_client_that_takes_no_answer_is_left(url):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), HANGS_AFTER_S) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1)
        assert 0 < sum(len(some) for some in iter(lambda: connection.recv(1 << 20), b"")) < LARGE


def test_protocol_whole_requests_are_answered_also_where_the_client_says_no_more(url):
    for close in (False, True):
        found = request(url, "POST", "/", b"abc", close=close)
        assert (found.status, found.body) == (200, b"3")
    found = request(url, "POST", "/", b"abc", {"Content-Length": 5}, close=True)
    assert (found.status, found.json) == (400, {"error": "the request ended before it was complete"})


def test_protocol_refusal_reaches_a_client_that_goes_on_sending(url):
    for _ in range(5):
        found = request(url, "GET", "/" + "a" * 5_000_000)
        assert (found.status, found.json) == (400, {"error": "Invalid HTTP request received."})
