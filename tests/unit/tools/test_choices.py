"""What bench and drill can be asked for is what they can do."""

from dist_mnist.tools.bench import Bench
from dist_mnist.tools.choices import BenchPart, Fault
from dist_mnist.tools.drill.faults import FAULTS


def test_bench_has_a_method_for_each_part():
    assert all(callable(getattr(Bench, part)) for part in BenchPart)


def test_drill_has_a_function_for_each_fault_but_a_flip_which_has_ranks_of_its_own():
    assert set(FAULTS) == set(Fault) - {Fault.FLIP}
