"""Which nodes take part in a run, as a user says it."""

import pytest

from dist_mnist.elastic.rendezvous import Nodes
from dist_mnist.utils.errors import UserError


@pytest.mark.parametrize(
    ("nnodes", "endpoint", "expected"),
    [("1", None, (1, 1, False)), ("1", "a:1", (1, 1, True)), ("2", "a:1", (2, 2, True)), ("1:4", "a:1", (1, 4, True))],
)
def test_nodes_with_a_number_or_a_range_gives_least_and_most(nnodes, endpoint, expected):
    nodes = Nodes(nnodes, endpoint)
    assert (nodes.min_nodes, nodes.max_nodes, nodes.several) == expected


@pytest.mark.parametrize("nnodes", ["0", "4:1", "two", "1:", ":2", "-1", "1:2:3", ""])
def test_nodes_with_no_number_says_what_it_takes(nnodes):
    with pytest.raises(UserError, match="--nnodes takes a number of nodes"):
        Nodes(nnodes, "a:1")


def test_nodes_without_an_endpoint_says_what_to_give():
    with pytest.raises(UserError, match="several nodes need a rendezvous endpoint: give --rdzv-endpoint HOST:PORT"):
        Nodes("2")


def test_nodes_with_an_endpoint_without_port_is_refused():
    with pytest.raises(UserError, match="HOST:PORT"):
        Nodes("2", "node1")
