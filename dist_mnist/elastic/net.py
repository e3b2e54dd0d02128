"""TCP between nodes: parse endpoints, probe them, and find the network interface that leads to a host."""

import socket
from contextlib import suppress

import psutil

from dist_mnist.utils.errors import UserError

LOOPBACK = "127.0.0.1"
ELSEWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737), so that only the default route leads there


def split_endpoint(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`.

    Raises:
        UserError: `text` does not have this form.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise UserError(f"expected a rendezvous endpoint HOST:PORT, such as node1:29400; got {text!r}")
    return host.strip("[]"), int(port)


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether a server accepts connections at `host:port`."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def is_known(host: str) -> bool:
    """Whether the name resolves to an address."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def route_to(host: str) -> tuple[str | None, str | None]:
    """Return name and IPv4 address of the network interface through which this node reaches `host`.

    If `host` is this node, return the interface of the default route, or else any that is up. Return (None, None) if
    there is no such interface, or no IPv4.
    """
    found = _addresses()
    for target in (host, ELSEWHERE):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing
            if (mine := probe.getsockname()[0]) in found:
                return found[mine], mine
    return next(((name, address) for address, name in found.items()), (None, None))


def _addresses() -> dict[str, str]:
    """Return the IPv4 addresses of this node, without loopback, with the name of their interface if it is up."""
    down = {name for name, status in psutil.net_if_stats().items() if not status.isup}
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name not in down and address.family == socket.AF_INET and not address.address.startswith("127.")
    }
