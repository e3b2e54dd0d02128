"""The way between machines: endpoints, whether something answers there, and the interface that leads there."""

import contextlib
import fcntl
import socket
import struct
from pathlib import Path

from dist_mnist.utils.errors import UserError

SIOCGIFADDR = 0x8915  # asks Linux for an interface's IPv4 address


def split_endpoint(text: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        UserError: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise UserError(f"a place to meet is HOST:PORT, such as node1:29400; {text!r} was given")
    return host.strip("[]"), int(port)


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def is_known(host: str) -> bool:
    """Whether the name stands for an address."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def route_to(host: str) -> tuple[str | None, str | None]:
    """Name and IPv4 address of the interface by which this machine reaches `host`.

    If that is this machine itself, those of the interface that leads to others: that of the default route, or of any.
    (None, None) where there is none, or no IPv4.
    """
    addresses = _addresses()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        mine = probe.getsockname()[0]
        for name, address in addresses.items():
            if address == mine:
                return name, address
    return next(((name, addresses[name]) for name in _routed() if name in addresses), (None, None))


def _addresses() -> dict[str, str]:
    """IPv4 addresses of this machine's interfaces, by name, without those that lead nowhere else."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def _routed() -> list[str]:
    """Interfaces with a route, that of the default route first."""
    try:
        rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    except OSError:
        return []
    return [row[0] for row in sorted(rows, key=lambda row: row[1] != "00000000")]
