"""TCP between nodes: endpoints, and the network interface that leads to another host."""

import socket

import psutil
import pytest

from dist_mnist.elastic.net import answers, is_known, route_to, split_endpoint
from dist_mnist.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("node1:29400", ("node1", 29400)), ("[fe80::1]:1", ("fe80::1", 1)), ("a:65535", ("a", 65535))],
)
def test_split_endpoint_with_a_port_gives_host_and_port(text, expected):
    assert split_endpoint(text) == expected


@pytest.mark.parametrize("text", ["node1", ":29400", "node1:", "node1:0", "node1:65536", "node1:http", "node1:²"])
def test_split_endpoint_without_host_or_port_says_what_was_given(text):
    with pytest.raises(UserError, match="HOST:PORT") as error:
        split_endpoint(text)
    assert repr(text) in str(error.value)


def test_answers_follows_whether_something_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers("127.0.0.1", port)
    assert not answers("127.0.0.1", port)


def test_is_known_tells_names_that_stand_for_no_address():
    assert is_known("localhost") and not is_known("no-such-host.invalid")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "no-such-host.invalid"])
def test_route_to_this_node_gives_an_interface_that_others_can_reach(host):
    name, address = route_to(host)
    others = {
        one.address
        for addresses in psutil.net_if_addrs().values()
        for one in addresses
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    }
    if not others:
        assert (name, address) == (None, None)
    else:
        assert address in {one.address for one in psutil.net_if_addrs()[name]} & others
