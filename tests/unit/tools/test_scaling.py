"""The model of a data-parallel step, against cases that can be worked out by hand."""

import pytest

from dist_mnist.tools.scaling import BETWEEN_NODES, WITHIN_NODE, Link, Work, all_reduce_s, batch_size_for, efficiency
from dist_mnist.tools.scaling import link_on_paper as link_of

LINK = Link(latency_s=1e-3, bytes_per_s=1e9)
WORK = Work(fixed_s=0.0, image_s=1e-3, gradient_bytes=10**9, hidden_share=0.0)


@pytest.mark.parametrize(
    ("ranks", "num_bytes", "seconds"), [(1, 10**9, 0), (2, 0, 2e-3), (2, 10**9, 1.002), (4, 10**9, 1.504), (8, 0, 6e-3)]
)
def test_an_all_reduce(ranks, num_bytes, seconds):
    assert all_reduce_s(num_bytes, ranks, LINK) == pytest.approx(seconds)


def test_one_rank_loses_nothing():
    assert efficiency(WORK, 1, 8, LINK) == 1


def test_what_is_not_hidden_is_lost():
    computing = 0.1
    assert efficiency(WORK, 2, 100, LINK) == pytest.approx(computing / (computing + 1.002))
    hidden = WORK._replace(hidden_share=0.5)
    assert efficiency(hidden, 2, 100, LINK) == pytest.approx(computing / (computing + 1.002 - 0.05))
    assert efficiency(hidden, 2, 10_000, LINK) == 1


def test_normalisation_is_never_hidden():
    work = WORK._replace(hidden_share=1.0, norm_layers=3)
    assert efficiency(work, 2, 10_000, LINK) == pytest.approx(10 / (10 + 3 * 2 * 2e-3))


def test_the_batch_from_which_it_holds():
    size = batch_size_for(0.9, WORK, 4, LINK)
    assert efficiency(WORK, 4, size, LINK) >= 0.9 > efficiency(WORK, 4, size // 2, LINK)


def test_nodes_hold_eight():
    assert [link_of(gpus) for gpus in (2, 8, 9, 512)] == [WITHIN_NODE] * 2 + [BETWEEN_NODES] * 2
