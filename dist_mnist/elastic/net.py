"""TCP between nodes: endpoints, whether something answers there, and the network interface that leads there."""

import socket
from contextlib import suppress

import psutil

from dist_mnist.utils.errors import UserError

ELSEWHERE = "192.0.2.1"  # an address that no host has (RFC 5737): only the default route leads there


def split_endpoint(text: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        UserError: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise UserError(f"a rendezvous endpoint is HOST:PORT, such as node1:29400; {text!r} was given")
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
    """Name and IPv4 address of the network interface by which this node reaches `host`.

    If that is this node itself, those of the interface of the default route, or of any that is up. (None, None) where
    there is none, or no IPv4.
    """
    found = _addresses()
    for target in (host, ELSEWHERE):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing
            if (mine := probe.getsockname()[0]) in found:
                return found[mine], mine
    return next(((name, address) for address, name in found.items()), (None, None))


def _addresses() -> dict[str, str]:
    """IPv4 addresses of this node by which others may reach it, each with the name of its interface, which is up."""
    down = {name for name, status in psutil.net_if_stats().items() if not status.isup}
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name not in down and address.family == socket.AF_INET and not address.address.startswith("127.")
    }
