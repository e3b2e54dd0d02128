"""What is said of ranks that differ: which, where, and in which tensor; see group_checks.py for how they notice."""

import pytest

from dist_mnist.distributed.states.compare import Place, explain, unlike

NAMES = ["model/a", "model/b", "average/a"]
PLACES = [Place(f"host{rank // 2}", f"Device {rank}", 1) for rank in range(5)]


def rows(count: int, **changed: list[int]) -> list[tuple[int, ...]]:
    """Digests of each rank; `rank2=[0, 3]`: other ones of tensors 0 and 3, of which the last is of earlier states."""
    found = [[10, 20, 30, 40] for _ in range(count)]
    for name, tensors in changed.items():
        rank = int(name.removeprefix("rank"))
        for at in tensors:
            found[rank][at] += rank
    return list(map(tuple, found))


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            rows(3, rank2=[1, 3]),
            "rank 2 on host1 (Device 2) computed other bits than the other 2 ranks by step 7: model/b differs",
        ),
        (
            rows(4, rank1=[0, 2, 3]),
            "rank 1 on host0 (Device 1) computed other bits than the other 3 ranks by step 7: model/a and 1 more "
            "tensor differ",
        ),
        (
            rows(5, rank1=[2, 3], rank4=[1, 3]),
            "rank 1 on host0 (Device 1), rank 4 on host2 (Device 4) computed other bits than the other 3 ranks by step "
            "7: model/b and 1 more tensor differ",
        ),
        (
            rows(3, rank1=[3]),
            "rank 1 on host0 (Device 1) computed other bits than the other 2 ranks by step 7: by now no tensor "
            "differs",
        ),
        (
            rows(2, rank1=[1, 3]),
            "ranks computed different bits by step 7: model/b differs. Which is right is unknown: rank 0 on "
            "host0 (Device 0); rank 1 on host0 (Device 1)",
        ),
    ],
)  # fmt: skip
def test_explain_names_who_is_outvoted_and_the_first_tensor_that_differs(found, sentence):
    assert explain(found, NAMES, PLACES, 7) == sentence


def test_explain_of_two_against_two_takes_no_side():
    both = rows(4, rank2=[0, 3], rank3=[0, 3])
    both[3] = both[2]
    assert explain(both, NAMES, PLACES, 7).endswith(
        "Which is right is unknown: rank 0 on host0 (Device 0), rank 1 on host0 (Device 1); rank 2 on host1 "
        "(Device 2), rank 3 on host1 (Device 3)"
    )


def test_unlike_devices_or_threads_are_named():
    assert unlike([Place("a", "CPU", 2), Place("b", "CPU", 2)]) is None
    assert "(CPU with 2 threads and CPU with 1 thread)" in str(unlike([Place("a", "CPU", 2), Place("b", "CPU", 1)]))
