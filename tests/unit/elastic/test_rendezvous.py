"""Which nodes take part in a run, as a user says it."""

import socket
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig

from dist_mnist.elastic.rendezvous import Nodes, end_start, find_endpoint
from dist_mnist.utils.errors import UserError

OF_OPERATOR = {"PET_MASTER_ADDR": "dist-mnist-node-0-0.dist-mnist", "PET_MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("nnodes", "endpoint", "expected"),
    [("1", None, (1, 1, False)), ("1", "a:1", (1, 1, True)), ("2", "a:1", (2, 2, True)), ("1:4", "a:1", (1, 4, True))],
)
def test_nodes_with_a_number_or_a_range_gives_least_and_most(nnodes, endpoint, expected):
    nodes = Nodes(nnodes, endpoint)
    assert (nodes.min_nodes, nodes.max_nodes, nodes.several) == expected


@pytest.mark.parametrize("nnodes", ["0", "4:1", "two", "1:", ":2", "-1", "1:2:3", ""])
def test_nodes_with_no_number_says_what_it_takes(nnodes):
    with pytest.raises(UserError, match="--nnodes expects a number of nodes"):
        Nodes(nnodes, "a:1")


def test_nodes_without_an_endpoint_says_what_to_give():
    with pytest.raises(UserError, match="several nodes need a rendezvous endpoint: give --rdzv-endpoint HOST:PORT"):
        Nodes("2")


def test_nodes_with_an_endpoint_without_port_is_refused():
    with pytest.raises(UserError, match="HOST:PORT"):
        Nodes("2", "node1")


@pytest.fixture
def variables(monkeypatch):
    """A function that sets torchrun's variables."""

    def write(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return write


def test_nodes_given_by_an_operators_variables_meet_at_node_0(variables):
    variables(**OF_OPERATOR, PET_NODE_RANK="1")
    assert Nodes.given("2", None, None) == Nodes("2", "dist-mnist-node-0-0.dist-mnist:29400", None, 1)
    assert Nodes.given("2", "head:1", "x") == Nodes("2", "head:1", "x"), "an option wins"
    assert not Nodes.given("1", None, None).several, "of one node there is nobody to meet"


@pytest.mark.parametrize(
    ("values", "endpoint"),
    [({"PET_MASTER_ADDR": "a"}, "a:29500"), ({"PET_MASTER_ADDR": "fd00::1", "PET_MASTER_PORT": "7"}, "[fd00::1]:7")],
)
def test_nodes_given_by_an_address_alone_meet_at_torchruns_port(variables, values, endpoint):
    variables(**values)
    assert Nodes.given("2", None, None) == Nodes("2", endpoint)


@pytest.mark.parametrize("rank", ["2", "-1", "first"])
def test_nodes_given_a_number_that_is_none_says_so(variables, rank):
    variables(**OF_OPERATOR, PET_NODE_RANK=rank)
    with pytest.raises(UserError, match="PET_NODE_RANK must be this node's number"):
        Nodes.given("2", None, None)


@pytest.fixture
def endpoint() -> Iterator[str]:
    """The endpoint that `dist-mnist rendezvous` would serve on this machine."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield f"127.0.0.1:{store.port}"


def config(endpoint: str) -> LaunchConfig:
    return LaunchConfig(1, 2, 1, run_id="run#1@here", rdzv_backend="c10d", rdzv_endpoint=endpoint)


def test_find_endpoint_numbers_starts_that_follow_on_one_that_ended(endpoint):
    first, second = config(endpoint), config(endpoint)
    ended = [find_endpoint(one, None, 30) for one in (first, second)]
    assert ended == [0, 0] and first.run_id == second.run_id == "run#1@here", "both take part in the same"
    for one in (first, second):
        end_start(one, 0)
    later, another = config(endpoint), config(endpoint)
    assert find_endpoint(later, None, 30) == 1 and later.run_id == "run#1@here#1"
    end_start(later, 1)
    assert find_endpoint(another, None, 30) == 2 and another.run_id == "run#1@here#2"


def test_find_endpoint_on_node_0_keeps_it_whatever_its_name_is():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    own = config(f"no-such-host.invalid:{port}")
    assert find_endpoint(own, 0, 30) is None
    assert (own.rdzv_endpoint, own.rdzv_configs["is_host"]) == (f"localhost:{port}", 1)
    end_start(own, None)
