"""HTTP for tests: exact bytes over a socket, and forms."""

import json
import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from helpers import HANGS_AFTER_S

BOUNDARY = "between-parts"


class Reply(NamedTuple):
    """A server's response: status (0: the connection was closed without one), headers in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def exchange(url: str, *sent: bytes, close: bool = False) -> Reply:
    """Send raw bytes (`close`: then close our side), and read until the server closes the connection."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), HANGS_AFTER_S) as connection:
        try:
            for some in sent:
                connection.sendall(some)
            if close:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server answered before everything was sent
        return _reply(b"".join(_received(connection)))


def _received(connection: socket.socket):
    while some := _some(connection):
        yield some


def _some(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:
        return b""


def _reply(content: bytes) -> Reply:
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Reply(int(lines[0].split()[1]) if head else 0, headers, body)


def request(
    url: str, method: str, path: str, body: bytes = b"", headers: dict[str, object] | None = None, **more: bool
) -> Reply:
    """Send a request on a new connection; a header of None is omitted, including Host and Content-Length."""
    standard = {"Host": urlsplit(url).netloc, "Connection": "close", "Content-Length": len(body)}
    lines = [f"{name}: {value}" for name, value in (standard | (headers or {})).items() if value is not None]
    return exchange(url, "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body, **more)


def form(files: list[tuple[str, bytes]]) -> bytes:
    """Return the body of a form of files with these names, for `FORM`."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="picture"; filename="{name}"\r\n\r\n'.encode() + content
        for name, content in files
    ]
    return b"".join(part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
PNG = {"Content-Type": "image/png"}
