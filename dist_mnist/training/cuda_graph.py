"""A training step as one CUDA graph: some two hundred small kernels that are launched at once, without Python between.

The graph holds a step on a whole batch: random keys, augmentation, forward, backward, all-reduce, optimizer, averaged
weights. A batch is copied to where it reads, and what changes from step to step stands in `Trainer.controls`. Before it
is used, a step by the graph is compared with an eager step from the same state; all ranks must find them alike.
Otherwise, or if the step cannot be captured at all, steps are taken one operation after another, as ever.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress

import torch

from dist_mnist.data.loader import Batch
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import warn

WARM_UP = 3  # steps before capturing: libraries choose their kernels
# Of what a step changes in a tensor, at its largest: sums over ranks may be in another order, rounded to `all_reduce`.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Capture what `work` launches on the GPU, without doing it; gives what does it, as often as it is called."""
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        # A loader's thread may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # from here on all is as before, of which torch does not take care
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise (error.__context__ or error) from None  # what went wrong first
    return graph.replay


class StepGraph:
    """Takes steps on batches of one size, once it has found that it may.

    Args:
        eager_step: takes a step on a batch, one operation after another.
        captured_step: the same by operations that can be captured.
        state: gives all tensors that a step changes.
        parameters: of the model; a replay leaves their gradients where the capture has put them.
        all_reduce: the precision in which gradients are summed over ranks.
        on_phase: is told that a graph is launched.
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
        self.batch: Batch | None = None  # where the graph reads
        self.replay: Callable[[], None] | None = None
        self.gradients: list[torch.Tensor | None] = []  # where the graph writes them

    def launch(self, batch: Batch) -> bool:
        """Take a step, if this can. Collective; the first call prepares, and its batch is then of the size of all."""
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
        if self._all(not why):  # else a replay would wait for ranks that have none
            assert replay
            replay()
            why = _difference(before, expected, state, self.tolerance)
            _restore(before, state)
            if self._all(not why):
                self.replay = replay
        if not self.replay and self.world.is_main:
            warn(f"steps are not launched as one CUDA graph ({why or 'another rank cannot'}): training is slower")

    def _warm_up(self, batch: Batch) -> None:
        """On a stream of its own, as torch asks for before a capture."""
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
        """Whether all is well on all ranks. Collective."""
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
    """In words, what is wrong with a state that should be `expected`; nothing if nothing is."""
    for start, right, value in zip(before, expected, found, strict=True):
        change, apart = (right - start.nan_to_num()).double().abs().max(), (value - right).double().abs().max()
        if not apart <= tolerance * change:  # not a number is not alike either
            return f"it changed a tensor by up to {float(apart):.1e} beside {float(change):.1e}"
    return ""
