"""A training step as one CUDA graph: about two hundred small kernels in one launch, without Python in between.

The graph holds a step on a whole batch: random keys, augmentation, forward, backward, all-reduce, optimizer, EMA of the
weights. Each batch is copied to the graph's input, and what else changes from step to step is in `Trainer.controls`.
Before the graph is used, a replayed step is compared with an eager step from the same state, on all ranks. If a rank
finds a difference, or if the step cannot be captured, steps stay eager.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress

import torch

from dist_mnist.data.loader import Batch
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import warn

WARM_UP = 3  # steps before the capture, in which libraries choose their kernels
# Relative to a step's largest change of a tensor: all-reduce may sum in another order, in the precision `all_reduce`.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Capture what `work` launches on the GPU, without running it; return a function that replays it."""
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        # thread_local: a loader's thread may allocate memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # restore stream and allocator, which torch does not do
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise (error.__context__ or error) from None  # the first error
    return graph.replay


class StepGraph:
    """Runs steps on batches of one size as a CUDA graph, after it has verified the graph.

    Args:
        eager_step: runs a step on a batch eagerly.
        captured_step: runs the same step by operations that can be captured.
        state: returns all tensors that a step changes.
        parameters: of the model; a replay leaves their gradients in the tensors of the capture.
        all_reduce: the precision of the gradients' all-reduce.
        on_phase: called when a graph is launched.
    """

    def __init__(
        self,
        *,
        eager_step: Callable[[Batch], None],
        captured_step: Callable[[Batch], None],
        state: Callable[[], list[torch.Tensor]],
        parameters: Sequence[torch.nn.Parameter],
        world: World,
        all_reduce: str,
        on_phase: Callable[[str], object],
        capture: Capture = capture,
    ):
        self.eager_step, self.captured_step, self.state, self.parameters = eager_step, captured_step, state, parameters
        self.world, self.tolerance, self.on_phase, self.capture = world, TOLERANCE[all_reduce], on_phase, capture
        self.batch: Batch | None = None  # the graph's input
        self.replay: Callable[[], None] | None = None
        self.gradients: list[torch.Tensor | None] = []  # the graph's output

    def launch(self, batch: Batch) -> bool:
        """Run a step if the graph works; return whether it did. Collective; the first call captures the graph."""
        if self.batch is None:
            self.batch = Batch(*(torch.empty_like(tensor).copy_(tensor) for tensor in batch))
            self._prepare(self.batch)
        if self.replay is None:
            return False
        self.on_phase("graph")
        for target, tensor in zip(self.batch, batch, strict=True):
            target.copy_(tensor)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.replay()
        return True

    def _prepare(self, batch: Batch) -> None:
        state = self.state()
        before = _copies(state)
        self._warm_up(batch)
        _restore(before, state)
        self.eager_step(batch)
        expected = _copies(state)
        _restore(before, state)
        replay, why = None, ""
        try:
            replay = self.capture(lambda: self.captured_step(batch))
            self.gradients = [parameter.grad for parameter in self.parameters]
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        if self._all(not why):  # otherwise a replay would wait for ranks without a graph
            assert replay
            replay()
            why = _difference(before, expected, state, self.tolerance)
            _restore(before, state)
            if self._all(not why):
                self.replay = replay
        if not self.replay and self.world.is_main:
            warn(f"steps do not run as a CUDA graph ({why or 'it failed on another rank'}): training is slower")

    def _warm_up(self, batch: Batch) -> None:
        """Run warm-up steps on a side stream, which torch requires before a capture."""
        device = self.world.device
        aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        if aside:
            aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside) if aside else nullcontext():
            for _ in range(WARM_UP):
                self.captured_step(batch)
        if aside:
            torch.cuda.current_stream(device).wait_stream(aside)

    def _all(self, well: bool) -> bool:
        """Whether `well` is true on all ranks. Collective."""
        return not float(sum_over_ranks(torch.tensor([float(not well)], device=self.world.device), self.world))


def _copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _restore(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)


def _difference(
    before: list[torch.Tensor], expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float
) -> str:
    """Describe the first difference between a state and the expected one; empty if there is none."""
    for start, right, value in zip(before, expected, found, strict=True):
        change, apart = (right - start.nan_to_num()).double().abs().max(), (value - right).double().abs().max()
        if not apart <= tolerance * change:  # also catches NaN
            return f"a replayed step is off by {float(apart):.1e} in a tensor that changes by {float(change):.1e}"
    return ""
