"""What bench and drill can be asked for is what they can do."""

from dist_mnist.tools.bench import Bench
from dist_mnist.tools.choices import BenchPart, Fault
from dist_mnist.tools.drill import FAULTS


def test_bench_has_a_method_for_each_part():
    assert all(callable(getattr(Bench, part)) for part in BenchPart)


def test_drill_has_a_function_for_each_fault():
    assert set(FAULTS) == set(Fault)
